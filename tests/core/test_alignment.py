import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors, difference, linear_combination, norm
from alignfed.core.alignment import (
    activation_gain,
    activation_maps,
    apply_activation_maps,
    apply_block_scales,
    apply_rank_maps,
    fit_block_scales,
    rank_maps,
    replay_errors,
    replay_grams,
)
from tests.core.adapters import make_adapter, moved
from tests.core.test_algebra import turned

torch.set_num_threads(1)
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)


def first_order(delta: Adapter, at: Adapter) -> dict[str, torch.Tensor]:
    """Return ``delta_B A + B delta_A`` by module."""
    return {name: d.b @ at.lora[name].a + at.lora[name].b @ d.a for name, d in delta.lora.items()}


def assert_same(found: Adapter, expected: Adapter, tolerance: float = 1e-4) -> None:
    for dtype, buffer in found.buffers.items():
        torch.testing.assert_close(buffer, expected.buffers[dtype], atol=tolerance, rtol=tolerance)


@few
@given(seeds)
def test_maps_between_equal_versions_are_the_identity(seed):
    base = make_adapter(seed)
    delta = difference(moved(base, seed + 1), base)
    assert_same(apply_rank_maps(rank_maps(base, base, 0.05), delta)[0], delta)


@few
@given(seeds, st.floats(1e-3, 1.0), st.floats(0.01, 2.0))
def test_rank_maps_never_raise_the_first_order_replay_error(seed, ridge, drift):
    base = make_adapter(seed)
    current = moved(base, seed + 1, scale=drift)
    delta = difference(moved(base, seed + 2), base)
    maps = rank_maps(base, current, ridge)
    # The least-squares answer itself, before its length is bounded.
    without, aligned = replay_errors(replay_grams(maps, base, current), delta)
    assert aligned <= without * (1 + 1e-3) + 1e-9


@few
@given(seeds, st.floats(0.01, 2.0), st.floats(0.1, 1.0))
def test_replay_errors_are_those_of_the_products_themselves(seed, drift, shortened):
    base = make_adapter(seed)
    current = moved(base, seed + 1, scale=drift)
    delta = difference(moved(base, seed + 2), base)
    maps = rank_maps(base, current, 0.05)
    expected = [0.0, 0.0]
    for name, raw in delta.lora.items():
        old, new, d_b, d_a = base.lora[name], current.lora[name], raw.b, raw.a
        moved_b, moved_a = d_b @ maps[name].right * shortened, maps[name].left @ d_a * shortened
        gaps = [
            (d_b @ (new.a - old.a), (new.b - old.b) @ d_a),
            (moved_b @ new.a - d_b @ old.a, new.b @ moved_a - old.b @ d_a),
        ]
        for which, parts in enumerate(gaps):
            expected[which] += raw.scale**2 * sum(float(p.square().sum()) for p in parts)
    found = replay_errors(replay_grams(maps, base, current), delta, shortened)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


@few
@given(seeds, seeds)
def test_rank_maps_undo_a_pure_change_of_coordinates(seed, turn):
    base = make_adapter(seed)
    current = turned(base, turn)
    delta = difference(moved(base, seed + 1), base)
    maps = rank_maps(base, current, 1e-6)
    lora = {
        name: LoraFactors(maps[name].left @ d.a, d.b @ maps[name].right, d.alpha)
        for name, d in delta.lora.items()
    }
    carried = first_order(Adapter.pack(lora), current)
    for name, effect in first_order(delta, base).items():
        torch.testing.assert_close(carried[name], effect, atol=2e-2, rtol=2e-2)


def test_factors_that_shrank_do_not_lengthen_an_update():
    # Least squares alone would ask for ten times the update.
    base = make_adapter(1, dense=False)
    current = linear_combination([(0.1, base)])
    delta = difference(moved(base, 2), base)
    carried = apply_rank_maps(rank_maps(base, current, 1e-4), delta)[0]
    assert norm(carried) == pytest.approx(norm(delta), rel=1e-4)


@few
@given(seeds, st.floats(0.1, 20))
def test_a_carried_update_is_never_longer_than_the_update(seed, drift):
    base = make_adapter(seed)
    current = moved(base, seed + 1, scale=drift)
    delta = difference(moved(base, seed + 2), base)
    carried = apply_rank_maps(rank_maps(base, current, 1e-4), delta)[0]
    assert norm(carried) <= norm(delta) * (1 + 1e-4)
    assert torch.equal(carried.dense["score.weight"], delta.dense["score.weight"])


def test_a_b_still_at_zero_leaves_updates_alone():
    base = make_adapter(1)
    lora = {n: LoraFactors(f.a, torch.zeros_like(f.b), f.alpha) for n, f in base.lora.items()}
    base = Adapter.pack(lora, base.dense)
    delta = difference(moved(base, 2), base)
    assert_same(apply_rank_maps(rank_maps(base, base, 0.05), delta)[0], delta)
    nothing = Adapter.pack({n: LoraFactors(0 * f.a, f.b, f.alpha) for n, f in lora.items()})
    delta = Adapter.pack(delta.lora)
    assert_same(apply_rank_maps(rank_maps(nothing, nothing, 0.05), delta)[0], delta)


def test_bf16_updates_are_carried_in_fp32_and_come_back_as_bf16():
    base = make_adapter(1, dtype=torch.bfloat16)
    current = moved(base, 2)
    delta = difference(moved(base, 3), base)
    carried = apply_rank_maps(rank_maps(base, current, 0.05), delta)[0]
    assert carried.layout == delta.layout


def _inputs(seed: int, positions: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj": torch.randn(positions, 6, generator=generator),
        "layers.1.up_proj": torch.randn(positions, 5, generator=generator),
    }


def test_the_activation_map_is_the_ridge_solution_without_forming_it():
    before, now = _inputs(1), _inputs(2)
    adapter = make_adapter(3)
    mapped = apply_activation_maps(activation_maps(before, now, 0.1, 100), adapter)
    for name, factors in adapter.lora.items():
        x_t, x_base = now[name], before[name]
        floor = 0.1 * x_t.square().sum(1).mean()
        eye = torch.eye(x_t.shape[1])
        m = torch.linalg.solve(x_t.T @ x_t + floor * eye, x_t.T @ x_base + floor * eye)
        torch.testing.assert_close(mapped.lora[name].a, factors.a @ m.T, atol=1e-3, rtol=1e-3)
        assert torch.equal(mapped.lora[name].b, factors.b)


def test_equal_inputs_need_no_map_and_maps_bring_unequal_ones_closer():
    adapter = make_adapter(1)
    same = activation_maps(_inputs(1), _inputs(1), 0.1, 100)
    assert_same(apply_activation_maps(same, adapter), adapter)
    before, now = _inputs(1, 4), _inputs(2, 4)
    without, aligned = activation_gain(activation_maps(before, now, 0.1, 100), before, 100)
    assert aligned < 0.5 * without


def test_positions_beyond_the_limit_are_thinned_evenly():
    maps = activation_maps(_inputs(1, 100), _inputs(2, 100), 0.1, 30)
    assert maps["layers.0.q_proj"].inputs.shape == (25, 6)


class _LinearFeatures:
    """Features that are linear in the factors: 3 times A's sum and 2 times B's."""

    def features(self, adapter: Adapter) -> torch.Tensor:
        a = sum(factors.a.sum() for factors in adapter.lora.values())
        b = sum(factors.b.sum() for factors in adapter.lora.values())
        return torch.stack([torch.as_tensor(3.0 * a), torch.as_tensor(2.0 * b)])


def test_block_scales_reach_features_that_scaling_can_reach():
    base = make_adapter(1)
    update = moved(base, 2)
    delta = difference(update, base)
    calibrator = _LinearFeatures()
    goal = Adapter.pack(
        {
            name: LoraFactors(f.a + 0.5 * d.a, f.b + 2.0 * d.b, f.alpha)
            for (name, f), d in zip(base.lora.items(), delta.lora.values(), strict=True)
        },
        base.dense,
    )
    fit = fit_block_scales(
        delta, base, calibrator.features(base), calibrator.features(goal), calibrator, 1e-8
    )
    assert (fit.a, fit.b) == pytest.approx((0.5, 2.0), rel=1e-2)
    assert fit.aligned < 1e-3 * fit.without
    assert_same(
        Adapter.pack(apply_block_scales(fit, update, base).lora), Adapter.pack(goal.lora), 1e-2
    )


def test_an_update_without_effect_on_features_keeps_its_scale():
    base = make_adapter(1)
    zero = difference(base, base)
    calibrator = _LinearFeatures()
    features = calibrator.features(base)
    fit = fit_block_scales(zero, base, features, features + 1.0, calibrator, 0.1)
    assert (fit.a, fit.b) == (1.0, 1.0)
