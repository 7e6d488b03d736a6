"""Equal and Dirichlet shares of rows, draw for draw those of flwr-datasets 0.6.

They are here and not the library's because importing it takes a second of every run: it brings
matplotlib and pandas along. A test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_DRAWS = 11
"""Draws of Dirichlet shares until somebody's smallest share is accepted or given up."""


def equal_shares(num_rows: int, clients: int) -> list[list[int]]:
    """Return runs of rows, one a client, the first ones longer by one where it does not come out.

    Args:
        num_rows: rows ``0 .. num_rows - 1``.
        clients: at least 1.
    """
    size, longer = divmod(num_rows, clients)
    ends = [client * size + min(client, longer) for client in range(clients + 1)]
    return [list(range(ends[client], ends[client + 1])) for client in range(clients)]


def dirichlet_shares(
    values: Sequence[str | int], clients: int, alpha: float, min_size: int, seed: int
) -> list[list[int]] | None:
    """Deal the rows of each value in shares drawn from Dirichlet(``alpha``).

    Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks"
    (arXiv 1905.12022), section 4, without balancing.

    Args:
        values: each row's value; all text or all numbers.
        clients: at least 1.
        alpha: concentration, above 0.
        min_size: draw again while somebody has fewer rows.
        seed: seed of all draws.

    Returns:
        Each client's rows, shuffled; None where ``MOST_DRAWS`` draws left somebody short.
    """
    rng, column, concentration = np.random.default_rng(seed), np.array(values), [alpha] * clients
    rows_of = [np.nonzero(column == value)[0] for value in sorted(set(values))]
    for _ in range(MOST_DRAWS):
        dealt: list[list[int]] = [[] for _ in range(clients)]
        for rows in rows_of:
            ends = np.cumsum(rng.dirichlet(concentration)) * len(rows)
            for share, part in zip(dealt, np.split(rows, ends.astype(int)[:-1]), strict=True):
                share.extend(part.tolist())
        if min(map(len, dealt)) >= min_size:
            for share in dealt:
                rng.shuffle(share)
            return dealt
    return None


__all__ = ["MOST_DRAWS", "dirichlet_shares", "equal_shares"]
