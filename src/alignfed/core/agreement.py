"""Agreement: how much of each buffered update to take, from the angles between them.

Clients that say the same thing must be averaged, clients that say different things may be added.
All of it happens in coefficients: the updates enter through their Gram matrix only, whose size is
the number of buffered updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, pieces, require_same_layout

GRAM_PIECE = 1 << 14
"""Elements of every update that are compared at a time."""


def factor_gram(
    updates: Sequence[Adapter], bases: Sequence[Adapter | None] | None = None
) -> Tensor:
    """Return the inner products of all pairs over factors' elements, ``(K, K)``, fp64.

    Taken piece by piece: the differences of one piece of all updates fit in cache, and none is
    ever formed whole. Inner products are exact to fp32 within a piece, and summed in fp64.

    Args:
        updates: adapters of one layout.
        bases: what to subtract from each; None, for one or for all, is nothing.

    Raises:
        AdapterError: the layouts differ.
    """
    first, origins = updates[0], bases or [None] * len(updates)
    for adapter in (*updates[1:], *origins):
        if adapter is not None:
            require_same_layout(first, adapter)
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for dtype, buffer in first.buffers.items():
        count = min(GRAM_PIECE, buffer.numel())
        rows = torch.empty(len(updates), count, dtype=torch.float32, device=buffer.device)
        added = [pieces(adapter.buffers[dtype], GRAM_PIECE) for adapter in updates]
        taken = [
            None if base is None else pieces(base.buffers[dtype], GRAM_PIECE) for base in origins
        ]
        for number, piece in enumerate(added[0]):
            part = rows[:, : piece.numel()]
            for row, new, old in zip(part.unbind(), added, taken, strict=True):
                if old is None:
                    row.copy_(new[number])
                elif dtype is torch.float32:
                    torch.sub(new[number], old[number], out=row)
                else:
                    row.copy_(new[number]).sub_(old[number])
            gram += (part @ part.T).double().cpu()
    return gram


def lengths(gram: Tensor) -> tuple[float, ...]:
    """Return the norms of the vectors whose Gram matrix is given; infinity where one overflowed."""
    return tuple(
        math.sqrt(max(0.0, square)) if math.isfinite(square) else math.inf
        for square in gram.diagonal().tolist()
    )


def clip_scales(
    norms: Sequence[float], earlier: Sequence[float], ratio: float
) -> tuple[float, ...]:
    """Return factors in (0, 1] that shorten long updates to ``ratio`` times the median length.

    Args:
        norms: lengths of the buffered updates.
        earlier: lengths of updates applied lately, so that a buffer of one has a measure too.
        ratio: longest accepted multiple of the median over both; zero lengths do not count, and
            an infinite one gets the factor 0.
    """
    known = [norm for norm in (*earlier, *norms) if 0 < norm < math.inf]
    limit = ratio * median(known) if known else 0.0
    return tuple(min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms)


def agreement_coefficients(
    gram: Tensor,
    weights: Sequence[float],
    regularisation: float,
    repeats: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Return coefficients ``c_i`` in ``[0, w_i]``: a sum of what differs, a mean of what agrees.

    Solves ``(G + lambda diag G) c = (1 + lambda) diag(G) w``. With ``y_i = c_i |delta_i|`` and the
    cosines C that is ``(C + lambda I) y = (1 + lambda) |delta| w``. Orthogonal updates get
    ``c = w``; K identical ones with ``w = 1`` get ``(1 + lambda) / (K + lambda)`` each.

    Three things keep c bounded for every buffer. Only positive cosines count, since a negative
    one would raise the coefficients of two updates that contradict each other. Negative
    eigenvalues of what remains are set to zero, so that the system is at least lambda times the
    identity. And agreement only ever lowers a coefficient: c is cut to ``[0, w]``.

    Args:
        gram: inner products of the updates, shape ``(K, K)``.
        weights: fairness weights w, not negative.
        regularisation: lambda > 0; the larger, the nearer identical updates are to a sum.
        repeats: for each update, how many like it were applied since its base was sent out and
            are not in the buffer; added to its diagonal element.
    """
    norms = torch.tensor(lengths(gram), dtype=torch.float64)
    moving = norms > 0
    safe = torch.where(moving, norms, torch.ones_like(norms))
    wanted = torch.tensor(weights, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(_positive_cosines(gram))
    system = (vectors * values.clamp_min(0.0)) @ vectors.T
    diagonal = torch.full_like(norms, regularisation)
    if repeats is not None:
        diagonal = diagonal + torch.tensor(repeats, dtype=torch.float64)
    solved = torch.linalg.solve(system + torch.diag(diagonal), norms * wanted)
    found = (1.0 + regularisation) * solved / safe
    found = torch.where(moving, found, wanted).clamp_min(0.0).minimum(wanted)
    return tuple(float(value) for value in found)


def contradiction_factors(gram: Tensor, count: int, limit: float) -> tuple[float, ...]:
    """Return factors in [0, 1] that damp updates pointing against all the others together.

    With ``q_i`` the cosine between an update and the sum of the directions of everything else given
    (the other updates, and whatever follows them, for example what absent clients said last), the
    factor is ``1 + q_i / limit``, cut to [0, 1]: 1 for whoever does not contradict, 0 from a cosine
    of ``-limit`` on. Where an update has fewer than two others to contradict nobody can tell who
    is right, and it gets 1. Where everybody contradicts the rest, whoever does so least gets 1 and
    the others in proportion.

    Args:
        gram: inner products, the updates first, shape at least ``(count, count)``.
        count: how many of them are updates.
        limit: in (0, 1].
    """
    norms = torch.tensor(lengths(gram), dtype=torch.float64)
    safe = torch.where((norms > 0) & norms.isfinite(), norms, torch.inf)
    cosines = gram.double().nan_to_num(0.0, 0.0, 0.0) / safe[:, None] / safe[None, :]
    found = []
    for i in range(count):
        others = [j for j in range(len(norms)) if j != i and math.isfinite(float(safe[j]))]
        if len(others) < 2 or not math.isfinite(float(safe[i])):
            found.append(1.0)
            continue
        along = float(cosines[i, others].sum())
        length = math.sqrt(max(0.0, float(cosines[others][:, others].sum())))
        found.append(min(1.0, max(0.0, 1.0 + along / (length * limit))) if length > 1e-6 else 1.0)
    most = max(found, default=1.0)
    return tuple(one / most if most > 0 else 1.0 for one in found)


def _positive_cosines(gram: Tensor) -> Tensor:
    """Return cosines cut to [0, 1], fp64; 1 on the diagonal, 0 beside an update of length zero."""
    norms = torch.tensor(lengths(gram), dtype=torch.float64)
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    cosines = (gram.double() / safe[:, None] / safe[None, :]).clamp(0.0, 1.0)
    cosines = (cosines + cosines.T) / 2
    return cosines.fill_diagonal_(1.0)


def accord(gram: Tensor, coefficients: Sequence[float]) -> float:
    """Return the cosine between ``sum_i c_i delta_i`` and the vector after it, at least 0.

    Args:
        gram: inner products of the updates and one more vector, shape ``(K + 1, K + 1)``.
        coefficients: c, of the K updates.
    """
    c = torch.tensor(coefficients, dtype=torch.float64)
    own, other = gram.double()[:-1, :-1], float(gram[-1, -1])
    square = float(c @ own @ c) * other
    if not square > 0 or not math.isfinite(square):
        return 0.0
    return min(1.0, max(0.0, float(c @ gram.double()[:-1, -1]) / math.sqrt(square)))


def step_length(gram: Tensor, coefficients: Sequence[float]) -> float:
    """Return ``|sum_i c_i delta_i|`` from the Gram matrix."""
    c = torch.tensor(coefficients, dtype=torch.float64)
    return math.sqrt(max(0.0, float(c @ gram.double() @ c)))
