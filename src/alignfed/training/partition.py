"""Which client holds which example. Only row numbers move.

Equal and Dirichlet shares are dealt here, exactly as flwr-datasets deals them; it deals natural ids
and shards itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from alignfed.errors import DataError
from alignfed.training.dealing import dirichlet_shares, equal_shares

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


def _deal(
    num_examples: int, values: Sequence[Any] | None, settings: PartitionSettings
) -> list[Share]:
    clients = settings.num_clients or 0
    # Equal shares are runs of rows, so the rows are shuffled first.
    order = np.random.default_rng(settings.seed).permutation(num_examples).tolist()
    if settings.kind == "iid":
        dealt = equal_shares(num_examples, clients)
    else:
        every = _column(values, settings)
        shuffled = [every[row] for row in order]
        if settings.kind == "shard":
            dealt = _shards(shuffled, settings)
        else:
            dealt = _dirichlet(shuffled, settings)
    return [
        Share(name=f"client-{client}", rows=tuple(order[place] for place in places))
        for client, places in enumerate(dealt)
    ]


def _dirichlet(values: list[str | int], settings: PartitionSettings) -> list[list[int]]:
    clients, alpha, seed = settings.num_clients or 0, settings.alpha, settings.seed
    dealt = dirichlet_shares(values, clients, alpha, settings.min_size, seed)
    if dealt is None:
        dealt = dirichlet_shares(values, clients, alpha, 0, seed)
        assert dealt is not None  # nobody's share is smaller than none
        _top_up(dealt, values, settings.min_size)
    return dealt


def _shards(values: list[str | int], settings: PartitionSettings) -> list[list[int]]:
    from alignfed.training.library_deals import shards

    try:
        return shards(values, settings.num_clients or 0, settings.shards_per_client, settings.seed)
    except ValueError as error:
        raise DataError(
            f"{len(values)} examples cannot be dealt to {settings.num_clients} clients by"
            f" column {settings.column!r} (kind 'shard', {len(set(values))} different values);"
            " name a column with fewer values, or lower num_clients or min_size"
        ) from error


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
    from alignfed.training.library_deals import natural_ids

    shares = [
        Share(name=name, rows=tuple(rows))
        for name, rows in natural_ids(values)
        if len(rows) >= settings.min_size
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
