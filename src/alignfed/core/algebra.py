"""Exact algebra on products: what an adapter does to the model, whatever its factors look like.

A LoRA module stands for ``(alpha / rank) B A``, which is unchanged by ``(B R, R^-1 A)`` for any
invertible ``R``; so is everything here. Sums of products are exact by stacking factors, so that no
``out x in`` matrix is formed while the stacked rank is below both. Intermediate adapters are fp32
whatever goes in; only ``refactor`` rounds to the dtype of its target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, LoraFactors, Term
from alignfed.errors import AdapterError

FRESH_ROW_NORM = 3.0**-0.5
"""Smallest norm of a row of A that ``refactor`` gives out.

It is the norm of a row as PEFT initialises it (Kaiming uniform with a = sqrt 5: elements within
``in_dim ** -0.5`` of zero, variance ``1 / (3 in_dim)``). The gradient of a column of B is
proportional to its row of A, so a direction that is zero, or nearly so, learns at the pace of a
fresh one; balanced factors alone would leave it a row of norm ``sqrt(sigma)``, frozen for good at
zero.
"""


def innovation(update: Adapter, base: Adapter) -> Adapter:
    """Return ``D = s' B'A' - s BA`` per module, of rank ``r' + r``; dense tensors subtract.

    The result keeps the scale ``s' = alpha' / r'`` of the update; a different scale of the base is
    folded into its B. Where ranks and scales agree the same matrix is written
    ``s ((B' - B) A' + B (A' - A))``, in which both terms are as small as the update, so that
    nothing cancels.

    Raises:
        AdapterError: names or outer sizes differ.
    """
    _require_same_modules(update, base)
    lora = {}
    for name, new in update.lora.items():
        old = base.lora[name]
        a_new, b_new, a_old, b_old = new.a.float(), new.b.float(), old.a.float(), old.b.float()
        if new.rank == old.rank and new.scale == old.scale:
            a, b = torch.cat([a_new, a_new - a_old]), torch.cat([b_new - b_old, b_old], dim=1)
        else:
            a = torch.cat([a_new, a_old])
            b = torch.cat([b_new, b_old * (-old.scale / new.scale)], dim=1)
        lora[name] = LoraFactors(a, b, new.scale * a.shape[0])
    dense = {name: tensor.float() - base.dense[name].float() for name, tensor in _dense(update)}
    return Adapter.pack(lora, dense)


def stack(terms: Sequence[Term]) -> Adapter:
    """Return the adapter whose product is ``sum_j c_j s_j B_j A_j``, exactly, for any ranks.

    Its rank is the sum of the ranks and its scale that of the first term; coefficients and other
    scales are folded into B. Dense tensors are summed.

    Raises:
        AdapterError: no terms, or names or outer sizes that differ.
    """
    if not terms:
        raise AdapterError("a weighted sum of adapters needs at least one term")
    first = terms[0][1]
    for _, adapter in terms[1:]:
        _require_same_modules(first, adapter)
    lora = {}
    for name, factors in first.lora.items():
        parts = [(coefficient, adapter.lora[name]) for coefficient, adapter in terms]
        a = torch.cat([part.a.float() for _, part in parts])
        columns = [part.b.float() * (c * (part.scale / factors.scale)) for c, part in parts]
        b = torch.cat(columns, dim=1)
        lora[name] = LoraFactors(a, b, factors.scale * a.shape[0])
    dense = {}
    for name, tensor in _dense(first):
        total = tensor.float() * terms[0][0]
        for coefficient, adapter in terms[1:]:
            total.add_(adapter.dense[name].float(), alpha=coefficient)
        dense[name] = total
    return Adapter.pack(lora, dense)


def refactor(adapter: Adapter, like: Adapter | int) -> Adapter:
    """Return the adapter nearest in product (Frobenius) with the layout of ``like``.

    The product is decomposed as ``U diag(sigma) V^T`` (Eckart and Young 1936: the leading ``rank``
    directions are the best approximation, exact where the product's rank allows). Each kept
    direction is balanced, ``|A row| = |B column|``, down to ``FRESH_ROW_NORM`` for the row; below,
    the row keeps that norm and the column carries the rest, so a zero direction has a zero column
    beside a row that can still learn. Rows are orthogonal wherever ``rank <= in_dim``, the largest
    element of each is positive, and the result depends on the product alone where its singular
    values differ. A product with NaN or infinite elements gives factors of NaN, for the caller's
    check of finiteness to find.

    Args:
        adapter: any stacked ranks.
        like: an adapter whose ranks, alphas and dtypes the result takes, or one rank for all
            modules, with ``alpha / rank`` and dtypes kept.

    Raises:
        AdapterError: names or outer sizes differ, or a rank below 1.
    """
    if isinstance(like, int):
        if like < 1:
            raise AdapterError(f"rank={like}, must be at least 1", rank=like)
    else:
        _require_same_modules(adapter, like)
    lora = {}
    for name, factors in adapter.lora.items():
        if isinstance(like, int):
            rank, scale, dtype = like, factors.scale, factors.a.dtype
        else:
            target = like.lora[name]
            rank, scale, dtype = target.rank, target.scale, target.a.dtype
        a, b = _leading_factors(factors, rank, scale)
        # rank * (alpha / rank) may miss alpha by a rounding, and alphas are compared exactly.
        alpha = scale * rank if isinstance(like, int) else like.lora[name].alpha
        lora[name] = LoraFactors(a.to(dtype), b.to(dtype), alpha)
    dense: Mapping[str, Tensor] = adapter.dense
    if not isinstance(like, int):
        dense = {name: tensor.to(like.dense[name].dtype) for name, tensor in _dense(adapter)}
    return Adapter.pack(lora, dense)


def product_gram(adapters: Sequence[Adapter]) -> Tensor:
    """Return the inner products of all pairs of products, shape ``(K, K)``, fp64.

    ``<s BA, s' B'A'> = s s' sum((B^T B') * (A A'^T))`` (Frobenius), summed over modules, plus the
    inner products of dense tensors. All pairs of one module come from two tall products of stacked
    factors.

    Raises:
        AdapterError: no adapters, or names or outer sizes that differ.
    """
    if not adapters:
        raise AdapterError("a Gram matrix needs at least one adapter")
    first = adapters[0]
    for adapter in adapters[1:]:
        _require_same_modules(first, adapter)
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in first.lora:
        parts = [adapter.lora[name] for adapter in adapters]
        a = torch.cat([part.a.float() for part in parts])
        b = torch.cat([part.b.float() * part.scale for part in parts], dim=1)
        pairs = (b.T @ b).double() * (a @ a.T).double()
        owner = torch.repeat_interleave(
            torch.arange(len(parts)), torch.tensor([part.rank for part in parts])
        ).to(pairs.device)
        blocks = torch.zeros(len(parts), pairs.shape[1], dtype=torch.float64, device=pairs.device)
        blocks.index_add_(0, owner, pairs)
        summed = torch.zeros(len(parts), len(parts), dtype=torch.float64, device=pairs.device)
        gram += summed.index_add_(1, owner, blocks).cpu()
    for name in first.dense:
        rows = torch.stack([adapter.dense[name].reshape(-1).float() for adapter in adapters])
        gram += (rows @ rows.T).double().cpu()
    return gram


def product_inner(first: Adapter, other: Adapter) -> float:
    """Return the Frobenius inner product of two products, dense tensors included.

    Raises:
        AdapterError: names or outer sizes differ.
    """
    return float(product_gram([first, other])[0, 1])


def product_norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of the product, dense tensors included, without forming it."""
    return math.sqrt(max(0.0, float(product_gram([adapter])[0, 0])))


def _leading_factors(factors: LoraFactors, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return fp32 ``A (rank, in_dim)`` and ``B (out_dim, rank)`` with ``scale B A`` the product."""
    a, b = factors.a.float(), factors.b.float() * (factors.scale / scale)
    in_dim, out_dim = a.shape[1], b.shape[0]
    if factors.rank < min(in_dim, out_dim):
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        core = r_b @ r_a.T
    else:
        core = b @ a
    if not bool(torch.isfinite(core).all()):
        return a.new_full((rank, in_dim), math.nan), b.new_full((out_dim, rank), math.nan)
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    if factors.rank < min(in_dim, out_dim):
        left, right = q_b @ left, right @ q_a.T
    kept = min(rank, sigma.shape[0])
    left, sigma, right = left[:, :kept], sigma[:kept], right[:kept]
    row_norms = sigma.sqrt().clamp_min(FRESH_ROW_NORM)
    signs = torch.where(right.gather(1, right.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    rows = right * signs * row_norms[:, None]
    columns = left * signs.T * (sigma / row_norms)
    if kept < rank:
        spare = _completing_rows(right, rank - kept) * FRESH_ROW_NORM
        rows = torch.cat([rows, spare])
        columns = torch.cat([columns, columns.new_zeros(out_dim, rank - kept)], dim=1)
    return rows, columns


def _completing_rows(right: Tensor, count: int) -> Tensor:
    """Return ``count`` unit rows, orthogonal to the orthonormal ``right`` while room is left.

    The seeds are rows of the discrete cosine transform, fixed and spread over all inputs. QR makes
    them orthonormal to ``right`` and to each other. An ``in_dim`` smaller than the rank has no
    more than ``in_dim`` orthogonal rows; the others repeat seeds as they are.
    """
    kept, in_dim = right.shape
    positions = torch.arange(in_dim, device=right.device) + 0.5
    orders = torch.arange(1, count + 1, device=right.device)[:, None]
    seeds = torch.cos(math.pi / in_dim * orders * positions)
    # An order of in_dim is zero at every position; a constant row stands in for it.
    norms = seeds.norm(dim=1, keepdim=True)
    seeds = torch.where(norms > 0.1, seeds / norms, in_dim**-0.5)
    room = min(count, in_dim - kept)
    if room > 0:
        basis, _ = torch.linalg.qr(torch.cat([right, seeds[:room]]).T)
        seeds = torch.cat([basis.T[kept : kept + room], seeds[room:]])
    return seeds


def _dense(adapter: Adapter) -> list[tuple[str, Tensor]]:
    return list(adapter.dense.items())


def _require_same_modules(first: Adapter, other: Adapter) -> None:
    """Refuse adapters of different modules; ranks, alphas and dtypes may differ."""
    for name in sorted(set(first.lora) ^ set(other.lora) | set(first.dense) ^ set(other.dense)):
        raise AdapterError(f"adapters do not fit: only one of them holds {name!r}", module=name)
    for name, factors in first.lora.items():
        mine = (factors.a.shape[1], factors.b.shape[0])
        theirs = (other.lora[name].a.shape[1], other.lora[name].b.shape[0])
        if mine != theirs:
            raise AdapterError(
                f"adapters do not fit: {name!r} maps {theirs[0]} to {theirs[1]},"
                f" expected {mine[0]} to {mine[1]}",
                module=name,
            )
    for name, tensor in first.dense.items():
        if tensor.shape != other.dense[name].shape:
            raise AdapterError(
                f"adapters do not fit: {name!r} is {tuple(other.dense[name].shape)},"
                f" expected {tuple(tensor.shape)}",
                module=name,
            )
