"""The algebra against dense products, which only a test may afford to form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors, zeros_like
from alignfed.core.algebra import (
    FRESH_ROW_NORM,
    innovation,
    product_gram,
    product_inner,
    product_norm,
    refactor,
    stack,
)
from alignfed.errors import AdapterError
from tests.core.adapters import make_adapter, moved

torch.set_num_threads(1)
few = settings(max_examples=30, deadline=None)

seeds = st.integers(0, 10_000)
ranks = st.integers(1, 7)
"""Up to above both dimensions of the small layers (6 x 5), so that both paths are met."""
coefficients = st.floats(-3, 3, allow_nan=False)


def products(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return what the adapter does to the model, in fp64."""
    found = {
        name: factors.scale * factors.b.double() @ factors.a.double()
        for name, factors in adapter.lora.items()
    }
    return found | {name: tensor.double() for name, tensor in adapter.dense.items()}


def turned(adapter: Adapter, seed: int) -> Adapter:
    """Return the same products from other factors: ``(B R, R^-1 A)``."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, factors in adapter.lora.items():
        rank = factors.rank
        turn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(turn)[0] * (0.5 + torch.rand(rank, generator=generator))
        a = torch.linalg.solve(turn, factors.a.double()).float()
        lora[name] = LoraFactors(a, (factors.b.double() @ turn).float(), factors.alpha)
    return Adapter.pack(lora, adapter.dense)


def ranked(seed: int, rank: int) -> Adapter:
    """Return an adapter with ``alpha / rank = 2`` whatever its rank."""
    return make_adapter(seed, rank=rank, alpha=2.0 * rank)


def assert_same_products(found: Adapter, expected: dict[str, torch.Tensor]) -> None:
    for name, product in products(found).items():
        torch.testing.assert_close(product, expected[name].double(), atol=1e-4, rtol=1e-4)


@few
@given(seeds, seeds, ranks, ranks)
def test_innovation_is_the_difference_of_products(first, second, rank, base_rank):
    update, base = ranked(first, rank), ranked(second, base_rank)
    found = innovation(update, base)
    new, old = products(update), products(base)
    assert_same_products(found, {name: new[name] - old[name] for name in new})
    for name, factors in found.lora.items():
        assert factors.rank == rank + base_rank
        assert factors.scale == pytest.approx(update.lora[name].scale)


def test_innovation_folds_unequal_scales():
    update, base = make_adapter(1, rank=2, alpha=2.0), make_adapter(2, rank=2, alpha=16.0)
    new, old = products(update), products(base)
    assert_same_products(innovation(update, base), {name: new[name] - old[name] for name in new})


def test_a_tiny_innovation_does_not_drown_in_its_base():
    base = make_adapter(1, scale=100.0)
    update = moved(base, 2, scale=1e-3)
    new, old = products(update), products(base)
    exact = sum(float((new[name] - old[name]).square().sum()) for name in new) ** 0.5
    assert product_norm(innovation(update, base)) == pytest.approx(exact, rel=1e-3)


@few
@given(st.lists(st.tuples(coefficients, seeds, ranks), min_size=1, max_size=4))
def test_stacking_adds_products_of_any_ranks_exactly(drawn):
    terms = [(coefficient, ranked(seed, rank)) for coefficient, seed, rank in drawn]
    expected: dict[str, torch.Tensor] = {}
    for coefficient, adapter in terms:
        for name, product in products(adapter).items():
            expected[name] = expected.get(name, 0.0) + coefficient * product
    found = stack(terms)
    assert_same_products(found, expected)
    assert found.lora["layers.0.q_proj"].rank == sum(rank for _, _, rank in drawn)
    assert found.lora["layers.0.q_proj"].scale == pytest.approx(2.0)


@few
@given(seeds, ranks, ranks)
def test_refactoring_gives_the_nearest_product_of_that_rank(seed, rank, target):
    adapter = ranked(seed, rank)
    found = refactor(adapter, target)
    for name, factors in adapter.lora.items():
        exact = products(adapter)[name]
        lost = torch.linalg.svdvals(exact)[target:].square().sum().sqrt()
        error = (products(found)[name] - exact).norm()
        assert float(error) == pytest.approx(float(lost), abs=1e-3)
        assert found.lora[name].rank == target
        assert found.lora[name].scale == pytest.approx(factors.scale)


def test_refactoring_takes_the_layout_of_the_current_adapter_to_the_letter():
    current = make_adapter(1, rank=3, alpha=0.7, dtype=torch.bfloat16)
    found = refactor(stack([(0.3, ranked(2, 5)), (0.4, ranked(3, 4))]), current)
    assert found.layout == current.layout


@few
@given(seeds, seeds, ranks)
def test_a_change_of_gauge_changes_no_result(seed, turn, rank):
    adapter, other = ranked(seed, rank), ranked(seed + 1, rank)
    again = turned(adapter, turn)
    assert product_norm(again) == pytest.approx(product_norm(adapter), rel=1e-3)
    assert product_inner(again, other) == pytest.approx(
        product_inner(adapter, other), abs=1e-3 * product_norm(adapter) * product_norm(other)
    )
    assert_same_products(innovation(again, other), products(innovation(adapter, other)))
    assert_same_products(refactor(again, 2), products(refactor(adapter, 2)))


def test_refactored_factors_depend_on_the_product_alone():
    adapter = ranked(3, 2)
    first, again = refactor(adapter, 2), refactor(turned(adapter, 4), 2)
    for name, factors in first.lora.items():
        torch.testing.assert_close(factors.a, again.lora[name].a, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(factors.b, again.lora[name].b, atol=1e-3, rtol=1e-3)


def test_refactoring_twice_gives_the_same_bytes():
    adapter = stack([(1.0, ranked(1, 3)), (-0.5, ranked(2, 2))])
    assert refactor(adapter, 3).checksum == refactor(adapter, 3).checksum


def test_large_directions_are_balanced_and_small_ones_keep_a_row_of_fresh_norm():
    large, small = make_adapter(1, scale=5.0), make_adapter(1, scale=1e-3)
    for factors in refactor(large, 2).lora.values():
        torch.testing.assert_close(factors.a.norm(dim=1), factors.b.norm(dim=0))
    for factors in refactor(small, 2).lora.values():
        torch.testing.assert_close(factors.a.norm(dim=1), torch.full((2,), FRESH_ROW_NORM))
    assert_same_products(refactor(small, 2), products(small))


@few
@given(seeds, ranks, st.integers(1, 9))
def test_a_zero_direction_keeps_a_row_that_can_learn_and_a_zero_column(seed, rank, target):
    zero = zeros_like(ranked(seed, rank))
    for factors in refactor(zero, target).lora.values():
        norms = factors.a.norm(dim=1)
        assert float(norms.min()) == pytest.approx(FRESH_ROW_NORM, rel=1e-3)
        assert not factors.b.any()


@few
@given(seeds, st.integers(1, 3))
def test_rows_beyond_the_stacked_rank_are_orthogonal_to_those_in_use(seed, rank):
    adapter = ranked(seed, rank)
    for name, factors in refactor(adapter, 5).lora.items():
        gram = factors.a @ factors.a.T
        off = gram - torch.diag(gram.diagonal())
        assert float(off.abs().max()) < 1e-3 * float(gram.diagonal().max())
        assert float(factors.b[:, rank:].abs().max()) < 1e-3 * float(factors.b.abs().max())
        torch.testing.assert_close(
            products(refactor(adapter, 5))[name], products(adapter)[name], atol=1e-4, rtol=1e-4
        )


@few
@given(st.lists(st.tuples(seeds, ranks), min_size=1, max_size=4))
def test_the_gram_matrix_holds_frobenius_products_of_any_ranks(drawn):
    adapters = [ranked(seed, rank) for seed, rank in drawn]
    dense = [torch.cat([p.reshape(-1) for p in products(a).values()]) for a in adapters]
    expected = torch.stack(dense) @ torch.stack(dense).T
    torch.testing.assert_close(product_gram(adapters), expected, rtol=1e-4, atol=1e-3)
    assert product_norm(adapters[0]) == pytest.approx(float(dense[0].norm()), rel=1e-4)


def test_bf16_is_computed_in_fp32_and_rounded_once():
    current = make_adapter(1, dtype=torch.bfloat16)
    terms = [(0.5, make_adapter(seed, dtype=torch.bfloat16)) for seed in (2, 3, 4)]
    found = refactor(stack(terms), current)
    exact = refactor(stack([(c, adapter.to(torch.float32)) for c, adapter in terms]), 2)
    assert set(found.buffers) == {torch.bfloat16}
    assert found.checksum == exact.to(torch.bfloat16).checksum
    assert set(innovation(terms[0][1], current).buffers) == {torch.float32}


def test_an_infinite_product_is_passed_on_for_the_caller_to_refuse():
    adapter = make_adapter(1, scale=1e30)
    assert not refactor(adapter, 2).is_finite()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stack([]), "at least one term"),
        (lambda: product_gram([]), "at least one adapter"),
        (lambda: refactor(make_adapter(), 0), "rank=0, must be at least 1"),
        (lambda: innovation(make_adapter(), make_adapter(dense=False)), "'score.weight'"),
        (lambda: stack([(1.0, _wider()), (1.0, make_adapter(dense=False))]), "maps 6 to 5"),
        (lambda: refactor(_headed(4), _headed(5)), r"\(5,\), expected \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_sizes(call, words):
    with pytest.raises(AdapterError, match=words):
        call()


def _wider() -> Adapter:
    lora = dict(make_adapter().lora)
    lora["layers.0.q_proj"] = LoraFactors(torch.ones(2, 7), torch.ones(5, 2), 4.0)
    return Adapter.pack(lora)


def _headed(size: int) -> Adapter:
    return Adapter.pack({}, {"score.bias": torch.ones(size)})
