"""Cross-version alignment: carry an update from the space of its base version to the current one.

A map belongs to a version, not to a client: it is computed once for a group and applied to each
member. All maps are closed forms; none needs an ``in x in`` matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, LoraFactors, norm
from alignfed.core.ports import Calibrator


@dataclass(frozen=True, slots=True)
class RankMap:
    """The map of one module: ``delta_A -> left delta_A`` and ``delta_B -> delta_B right``.

    Attributes:
        left: shape ``(rank, rank)``.
        right: shape ``(rank, rank)``.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class ActivationMap:
    """``M = I + X^T S`` for one module, identity plus low rank.

    Attributes:
        inputs: X, inputs of the module under the current version, ``(positions, in_dim)``.
        solved: S, shape ``(positions, in_dim)``.
    """

    inputs: Tensor
    solved: Tensor


def rank_maps(base: Adapter, current: Adapter, ridge: float) -> Mapping[str, RankMap]:
    """Return the maps that replay factor updates of ``base`` on ``current``, module by module.

    To first order an update changes the product by ``delta_B A_base + B_base delta_A``. Replayed on
    other factors it gives ``delta_B A_t + B_t delta_A``, an error that only asynchrony has. The
    maps are the least-squares answers to each part,

        min_X |X A_t - delta_B A_base|^2 + e |X - delta_B|^2
        min_Y |B_t Y - B_base delta_A|^2 + e |Y - delta_A|^2,

    namely ``X = delta_B (A_base A_t^T + e I)(A_t A_t^T + e I)^-1`` and
    ``Y = (B_t^T B_t + e I)^-1 (B_t^T B_base + e I) delta_A``: ``rank x rank`` matrices without
    calibration data, the identity where both versions agree. They are the reported linear T of
    arXiv 2606.08197, Eq. 6, fitted in the weights instead of in the features.

    Args:
        base: adapter of the update's base version.
        current: adapter of the current version, of the same ranks.
        ridge: e as a multiple of the module's mean squared row of A and column of B, over both
            versions. One e for both parts, so that a part whose effect is small beside the
            other's (B early on) is left alone.
    """
    maps = {}
    for name, old in base.lora.items():
        new = current.lora[name]
        a_old, a_new = old.a.float(), new.a.float()
        b_old, b_new = old.b.float(), new.b.float()
        a_square, b_square = a_new @ a_new.T, b_new.T @ b_new
        squares = torch.stack([t.norm().square() for t in (a_old, b_old)]).sum()
        floor = ridge * (squares + a_square.trace() + b_square.trace()) / (4 * old.rank)
        # The right factor is the transpose of a system solved from the left.
        right = _damped_solve(a_square, a_new @ a_old.T, floor).T
        left = _damped_solve(b_square, b_new.T @ b_old, floor)
        maps[name] = RankMap(left, right)
    return maps


def apply_rank_maps(maps: Mapping[str, RankMap], delta: Adapter) -> tuple[Adapter, float]:
    """Return an update's ``delta`` carried to the current version, and how much it was shortened.

    Dense tensors pass unchanged. The result is never longer than ``delta``: growth would come from
    directions in which the current factors are weak, where the least-squares answer is mostly
    noise. The LoRA part is multiplied by the number returned, at most 1, to keep it so.
    """
    carried = Adapter(
        delta.layout, {dtype: torch.empty_like(buffer) for dtype, buffer in delta.buffers.items()}
    )
    for name, factors in delta.lora.items():
        target = carried.lora[name]
        target.a.copy_(maps[name].left @ factors.a.float())
        target.b.copy_(factors.b.float() @ maps[name].right)
    for name, tensor in delta.dense.items():
        carried.dense[name].copy_(tensor)
    before, after = norm(delta), norm(carried)
    if after <= before:
        return carried, 1.0
    dense_square = math.fsum(float(t.float().square().sum()) for t in delta.dense.values())
    allowed = math.sqrt(max(0.0, before**2 - dense_square))
    shortened = allowed / math.sqrt(after**2 - dense_square)
    for target in carried.lora.values():
        target.a.mul_(shortened)
        target.b.mul_(shortened)
    return carried, shortened


@dataclass(frozen=True, slots=True)
class ReplayGrams:
    """How one module's factors moved between two versions, as inner products, fp64.

    With N the current factor and D what it has moved since the base version, each of shape
    ``(rank, rank)``, by rows for A and by columns for B.

    Attributes:
        map: left factor of the map of N, ``right`` of the module's map for A and ``left^T`` for B.
        now: ``<N, N>``.
        cross: ``<N, D>``.
        moved: ``<D, D>``.
    """

    map: Tensor
    now: Tensor
    cross: Tensor
    moved: Tensor

    def left_over(self, shortened: float) -> Tensor:
        """Return ``<E, E>`` of ``E = shortened * map N - (N - D)``, so that nothing cancels."""
        turn = shortened * self.map
        turn.diagonal().sub_(1.0)
        mixed = turn @ self.cross
        return turn @ self.now @ turn.T + mixed + mixed.T + self.moved


def replay_grams(
    maps: Mapping[str, RankMap], base: Adapter, current: Adapter
) -> Mapping[str, tuple[ReplayGrams, ReplayGrams]]:
    """Return what ``replay_errors`` needs of two versions, for A and B, by module."""
    found = {}
    for name, old in base.lora.items():
        new = current.lora[name]
        right, left = maps[name].right.double(), maps[name].left.double()
        found[name] = (
            _replay_gram(right, new.a.float(), old.a.float()),
            _replay_gram(left.T, new.b.float().T, old.b.float().T),
        )
    return found


def replay_errors(
    grams: Mapping[str, tuple[ReplayGrams, ReplayGrams]], delta: Adapter, shortened: float = 1.0
) -> tuple[float, float]:
    """Return the squared first-order replay error without and with alignment.

    Of ``delta_B A_base`` and ``B_base delta_A`` separately, summed over both and over modules, in
    Gram form: of an update, only ``delta_B^T delta_B`` and ``delta_A delta_A^T`` are formed.

    Args:
        grams: of the update's base version and the current one.
        delta: the update.
        shortened: what ``apply_rank_maps`` returned beside the carried update.
    """
    without = aligned = 0.0
    for name, raw in delta.lora.items():
        a, b = raw.a.float(), raw.b.float()
        for sides, square in zip(grams[name], (b.T @ b, a @ a.T), strict=True):
            weight = square.double() * raw.scale**2
            without += max(0.0, float((weight * sides.moved).sum()))
            aligned += max(0.0, float((weight * sides.left_over(shortened)).sum()))
    return without, aligned


def activation_maps(
    before: Mapping[str, Tensor], now: Mapping[str, Tensor], ridge: float, max_positions: int
) -> Mapping[str, ActivationMap]:
    """Return the maps that make the current inputs of each module look like those of the base.

    ``M = argmin |X_t M - X_base|^2 + e |M - I|^2 = I + X_t^T (X_t X_t^T + e I)^-1 (X_base - X_t)``,
    so that ``X_t (M A^T) B^T`` is near what the update did at its base, ``X_base A^T B^T``.

    Args:
        before: inputs under the base version, ``(positions, in_dim)`` by module.
        now: inputs under the current version, same positions.
        ridge: e as a multiple of the mean squared length of a row of ``X_t``.
        max_positions: use at most this many positions, evenly spread; the system is that square.
    """
    maps = {}
    for name, x_now in now.items():
        stride = _stride(x_now.shape[0], max_positions)
        x_t, x_base = x_now[::stride].float(), before[name][::stride].float()
        gram = x_t @ x_t.T
        floor = ridge * gram.diagonal().mean()
        if not float(floor) > 0:
            maps[name] = ActivationMap(x_t, torch.zeros_like(x_t))
            continue
        eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(gram + floor * eye, x_base - x_t)
        maps[name] = ActivationMap(x_t, solved)
    return maps


def apply_activation_maps(maps: Mapping[str, ActivationMap], adapter: Adapter) -> Adapter:
    """Return the adapter with every ``A`` replaced by ``A M^T = A + (A S^T) X``."""
    lora = {}
    for name, factors in adapter.lora.items():
        a = factors.a.float()
        if (found := maps.get(name)) is not None:
            a = a + (a @ found.solved.T.to(a.device)) @ found.inputs.to(a.device)
        lora[name] = LoraFactors(a.to(factors.a.dtype), factors.b, factors.alpha)
    return Adapter.pack(lora, adapter.dense)


def activation_gain(
    maps: Mapping[str, ActivationMap], before: Mapping[str, Tensor], max_positions: int
) -> tuple[float, float]:
    """Return the squared distance of inputs between versions, without and with the maps."""
    without = aligned = 0.0
    for name, found in maps.items():
        x_base = before[name][:: _stride(before[name].shape[0], max_positions)].float()
        gap = found.inputs - x_base
        without += float(gap.square().sum())
        aligned += float((gap + found.inputs @ found.inputs.T @ found.solved).square().sum())
    return without, aligned


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The reported linear map T of one version, as two scales.

    Attributes:
        a: multiplies ``delta_A``.
        b: multiplies ``delta_B``.
        forwards: calibration mini-batches sent forward to fit it.
        without: squared distance to the current features that ``T = I`` leaves, to first order.
        aligned: the same with T.
    """

    a: float
    b: float
    forwards: int
    without: float
    aligned: float


def fit_block_scales(
    delta: Adapter,
    base: Adapter,
    features_base: Tensor,
    features_now: Tensor,
    calibrator: Calibrator,
    ridge: float,
) -> BlockScales:
    """Return T such that features of ``base + T(delta)`` come close to the current model's.

    As reported of arXiv 2606.08197, Eq. 6; how T is parametrised was not reported. Here it is the
    smallest linear family that any ranks and shapes allow, one scale for all of ``delta_A`` and
    one for all of ``delta_B`` (dense tensors pass unchanged), because then it has a closed form:
    with ``Phi_k = features(base + part k of delta) - features(base)``,

        min_theta |sum_k theta_k Phi_k - (F_t - F_base)|^2 + e |theta - 1|^2.

    Args:
        delta: the group's mean update, factor by factor.
        base: adapter of the group's version.
        features_base: features under it, ``(positions, hidden_dim)``.
        features_now: features under the current version, same shape.
        calibrator: computes features.
        ridge: e as a multiple of the mean squared norm of the ``Phi_k``; no effect on features
            leaves a scale at 1.
    """
    effects = torch.stack(
        [
            (calibrator.features(_plus_part(base, delta, part)) - features_base).reshape(-1)
            for part in ("a", "b")
        ]
    ).double()
    gap = (features_now - features_base).reshape(-1).double()
    gram = effects @ effects.T
    floor = ridge * gram.diagonal().mean()
    scales = torch.ones(2, dtype=gram.dtype, device=gram.device)
    if float(floor) > 0:
        eye = torch.eye(2, dtype=gram.dtype, device=gram.device)
        scales = torch.linalg.solve(gram + floor * eye, effects @ gap + floor)
    return BlockScales(
        a=float(scales[0]),
        b=float(scales[1]),
        forwards=2,
        without=float((effects.sum(0) - gap).square().sum()),
        aligned=float((scales @ effects - gap).square().sum()),
    )


def apply_block_scales(scales: BlockScales, update: Adapter, base: Adapter) -> Adapter:
    """Return ``base + T(update - base)``."""
    lora = {}
    for name, new in update.lora.items():
        old = base.lora[name]
        a = old.a.float() + scales.a * (new.a.float() - old.a.float())
        b = old.b.float() + scales.b * (new.b.float() - old.b.float())
        lora[name] = LoraFactors(a.to(new.a.dtype), b.to(new.b.dtype), new.alpha)
    return Adapter.pack(lora, update.dense)


def _stride(positions: int, max_positions: int) -> int:
    return max(1, math.ceil(positions / max_positions))


def _damped_solve(gram: Tensor, cross: Tensor, floor: Tensor) -> Tensor:
    """Return ``(gram + e I)^-1 (cross + e I)``; the identity where both versions are zero."""
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    if not float(floor) > torch.finfo(gram.dtype).tiny:
        return eye
    solved: Tensor = torch.linalg.solve(gram + floor * eye, cross + floor * eye)
    return solved


def _replay_gram(turn: Tensor, new: Tensor, old: Tensor) -> ReplayGrams:
    # Taken first: it is small beside what did not move, and its products stay exact to fp32.
    moved = new - old
    now, cross, square = (new @ new.T, new @ moved.T, moved @ moved.T)
    return ReplayGrams(turn, now.double(), cross.double(), square.double())


def _plus_part(base: Adapter, delta: Adapter, part: str) -> Adapter:
    lora = {}
    for name, old in base.lora.items():
        a, b = old.a, old.b
        if part == "a":
            a = (a.float() + delta.lora[name].a.float()).to(a.dtype)
        else:
            b = (b.float() + delta.lora[name].b.float()).to(b.dtype)
        lora[name] = LoraFactors(a, b, old.alpha)
    return Adapter.pack(lora, base.dense)
