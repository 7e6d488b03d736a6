"""Deals that flwr-datasets makes; importing it brings pandas and matplotlib along."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

from datasets import Dataset
from flwr_datasets.partitioner import NaturalIdPartitioner, ShardPartitioner


def shards(
    values: Sequence[str | int], clients: int, shards_per_client: int, seed: int
) -> list[list[int]]:
    """Return each client's rows: rows sorted by value and cut into equal pieces, dealt at random.

    Raises:
        ValueError: the rows do not suffice.
    """
    partitioner = ShardPartitioner(
        num_partitions=clients,
        partition_by="value",
        num_shards_per_partition=shards_per_client,
        shuffle=True,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict({"row": range(len(values)), "value": values})
    with warnings.catch_warnings():
        # datasets 4.8 sorts with an argument that pyarrow 25 deprecates.
        warnings.filterwarnings("ignore", ".*null_placement.*", FutureWarning)
        parts = [partitioner.load_partition(client) for client in range(clients)]
    return [[int(row) for row in part["row"]] for part in parts]


def natural_ids(values: Sequence[str | int]) -> list[tuple[str, list[int]]]:
    """Return each value's name and rows, in the library's order of the values."""
    partitioner = NaturalIdPartitioner(partition_by="value")
    partitioner.dataset = Dataset.from_dict({"row": range(len(values)), "value": values})
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar unasked
        parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    names = partitioner.partition_id_to_natural_id
    return [(str(names[i]), [int(row) for row in part["row"]]) for i, part in enumerate(parts)]
