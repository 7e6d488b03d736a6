"""Which client holds which example, through flwr-datasets' partitioners. Only indices move."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    ShardPartitioner,
)

from alignfed.errors import DataError

Kind = Literal["iid", "dirichlet", "natural", "shard", "files"]


@dataclass(frozen=True, slots=True)
class PartitionSettings:
    """How examples are dealt to clients.

    Attributes:
        kind: ``iid`` (shuffled, equal shares), ``dirichlet`` (shares of each value of ``column``
            drawn from Dirichlet(``alpha``), Yurochkin et al. 2019), ``natural`` (one client a
            value of ``column``), ``shard`` (sorted by ``column`` and cut into equal pieces,
            ``shards_per_client`` each, McMahan et al. 2017; rows that fill no piece stay out),
            ``files`` (one file a client; nothing is dealt).
        num_clients: number of clients. ``natural``: None keeps every client, a number keeps
            those with the most examples. ``files``: None keeps every file, a number the first.
        alpha: concentration of ``dirichlet``; smaller is less even.
        column: the column that ``dirichlet``, ``natural`` and ``shard`` go by.
        min_size: fewest examples a client may hold. ``natural`` leaves smaller clients out,
            ``dirichlet`` draws again (ten times), then gives those below it rows of the clients
            with the most; the others refuse.
        shards_per_client: pieces each client gets of ``shard``.
        seed: seed of the deal.

    Raises:
        DataError: a value outside its range, or a column missing.
    """

    kind: Kind = "iid"
    num_clients: int | None = None
    alpha: float = 0.5
    column: str | None = None
    min_size: int = 2
    shards_per_client: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check each value against its range."""
        if self.kind not in get_args(Kind):
            raise DataError(
                f"partition kind {self.kind!r} is not one of {', '.join(get_args(Kind))}"
            )
        if self.num_clients is None and self.kind not in ("natural", "files"):
            raise DataError(f"partition kind {self.kind!r} needs num_clients")
        for name in ("num_clients", "min_size", "shards_per_client"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"partition {name} is {value}, must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise DataError(f"partition alpha is {self.alpha}, must be above 0 and finite")
        if self.seed < 0:
            raise DataError(f"partition seed is {self.seed}, must be at least 0")
        if self.column is None and self.kind in ("dirichlet", "natural", "shard"):
            raise DataError(f"partition kind {self.kind!r} needs the column it goes by")


@dataclass(frozen=True, slots=True)
class Share:
    """The examples of one client, as row numbers, and the client's name."""

    name: str
    rows: tuple[int, ...]


def partition(
    num_examples: int, values: Sequence[Any] | None, settings: PartitionSettings
) -> list[Share]:
    """Deal ``num_examples`` rows to clients.

    Args:
        num_examples: rows to deal.
        values: each row's value in ``settings.column`` (None for ``iid``).
        settings: how to deal; ``files`` is not dealt and must not come here.

    Raises:
        DataError: the rows do not suffice for the clients asked for.
    """
    if settings.kind == "natural":
        return _by_natural_id(_column(values, settings), settings)
    clients = settings.num_clients or 0
    pieces = clients * (settings.shards_per_client if settings.kind == "shard" else 1)
    if num_examples < max(pieces, clients * settings.min_size):
        raise DataError(
            f"{num_examples} examples do not give {clients} clients {settings.min_size} each (in"
            f" {pieces} pieces); lower num_clients, min_size or shards_per_client",
            num_examples=num_examples,
            num_clients=clients,
        )
    shares = _deal(num_examples, values, settings)
    smallest = min(range(clients), key=lambda client: len(shares[client].rows))
    if len(shares[smallest].rows) < settings.min_size:
        raise DataError(
            f"client {smallest} would hold {len(shares[smallest].rows)} examples, fewer than"
            f" min_size {settings.min_size}; lower num_clients, min_size or shards_per_client",
            client_id=smallest,
        )
    return shares


def _partitioner(settings: PartitionSettings, min_size: int) -> Partitioner:
    clients = settings.num_clients or 0
    if settings.kind == "iid":
        return IidPartitioner(num_partitions=clients)
    if settings.kind == "dirichlet":
        return DirichletPartitioner(
            num_partitions=clients,
            partition_by="value",
            alpha=float(settings.alpha),
            min_partition_size=min_size,
            self_balancing=False,
            shuffle=True,
            seed=settings.seed,
        )
    if settings.kind == "shard":
        return ShardPartitioner(
            num_partitions=clients,
            partition_by="value",
            num_shards_per_partition=settings.shards_per_client,
            shuffle=True,
            seed=settings.seed,
        )
    raise DataError(f"partition kind {settings.kind!r} is not dealt from one pool of examples")


def _deal(
    num_examples: int, values: Sequence[Any] | None, settings: PartitionSettings
) -> list[Share]:
    # The partitioner for equal shares cuts runs of rows, so the rows are shuffled first.
    order = np.random.default_rng(settings.seed).permutation(num_examples)
    columns: dict[str, Any] = {"row": order}
    every: list[str | int] = []
    if settings.kind != "iid":
        every = _column(values, settings)
        columns["value"] = [every[row] for row in order]
    dataset = Dataset.from_dict(columns)
    try:
        dealt = _load(_partitioner(settings, settings.min_size), dataset)
    except ValueError as error:
        if settings.kind != "dirichlet":
            raise DataError(
                f"{num_examples} examples cannot be dealt to {settings.num_clients} clients by"
                f" column {settings.column!r} (kind {settings.kind!r}, {len(set(every))} different"
                " values); name a column with fewer values, or lower num_clients or min_size"
            ) from error
        dealt = _load(_partitioner(settings, 0), dataset)
        _top_up(dealt, every, settings.min_size)
    return [Share(name=f"client-{client}", rows=tuple(rows)) for client, rows in enumerate(dealt)]


def _load(partitioner: Partitioner, dataset: Dataset) -> list[list[int]]:
    partitioner.dataset = dataset
    # Warnings of drawing again are the normal course of a small alpha; giving up is an error.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # datasets 4.8 sorts with an argument that pyarrow 25 deprecates.
        warnings.filterwarnings("ignore", ".*null_placement.*", FutureWarning)
        count = partitioner.num_partitions
        parts = [partitioner.load_partition(client) for client in range(count)]
    return [[int(row) for row in part["row"]] for part in parts]


def _top_up(dealt: list[list[int]], values: Sequence[str | int], min_size: int) -> None:
    """Give each client below ``min_size`` rows of whoever holds the most, of one value first.

    With many clients and a small alpha, some client draws next to nothing of every value, however
    often all draw again. The rows come from the giver's most frequent value, so that a client
    topped up is as uneven as the others.
    """
    for rows in sorted(dealt, key=len):
        while (missing := min_size - len(rows)) > 0:
            giver = max(dealt, key=len)
            common, _ = Counter(values[row] for row in giver).most_common(1)[0]
            spare = min(missing, len(giver) - min_size)
            given = [row for row in giver if values[row] == common][-spare:]
            rows += given
            giver[:] = [row for row in giver if row not in given]


def _by_natural_id(values: list[str | int], settings: PartitionSettings) -> list[Share]:
    partitioner = NaturalIdPartitioner(partition_by="value")
    partitioner.dataset = Dataset.from_dict({"row": range(len(values)), "value": values})
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar unasked
        parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    names = partitioner.partition_id_to_natural_id
    shares = [
        Share(name=str(names[i]), rows=tuple(int(row) for row in part["row"]))
        for i, part in enumerate(parts)
        if len(part) >= settings.min_size
    ]
    wanted = settings.num_clients
    if not shares or (wanted is not None and len(shares) < wanted):
        sizes = Counter(values).most_common(1)
        raise DataError(
            f"column {settings.column!r} gives {len(shares)} clients of at least"
            f" {settings.min_size} examples (the largest holds {sizes[0][1]}),"
            f" {wanted or 'at least 1'} wanted; lower num_clients or min_size",
            num_clients=len(shares),
        )
    if wanted is not None:
        largest = sorted(range(len(shares)), key=lambda i: (-len(shares[i].rows), i))[:wanted]
        shares = [shares[i] for i in sorted(largest)]
    return shares


def _column(values: Sequence[Any] | None, settings: PartitionSettings) -> list[str | int]:
    """Return values the partitioners can sort: whole numbers as they are, the rest as text."""
    if values is None:
        raise DataError("this kind of partition needs a column")
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return list(values)
    for row, value in enumerate(values):
        if isinstance(value, float) and not value.is_integer():
            raise DataError(
                f"column {settings.column!r} holds the number {value!r} (row {row}); kind"
                f" {settings.kind!r} deals by classes: name a column of text or whole numbers, or"
                ' use kind "iid"',
                column=settings.column,
                row=row,
            )
    return [str(value) for value in values]
