"""Claims about sketches: inner products survive, and nothing is drawn anew."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors, inner_product, norm
from alignfed.core.aggregation.sketching import Sketching, sketched_products, sketching
from alignfed.core.alignment import RankMap, apply_rank_maps

torch.set_num_threads(1)

BUCKETS = 1 << 9
NARROWEST = 1 << 6


def wide(seed: int, *, dtype: torch.dtype = torch.float32, modules: int = 4) -> Adapter:
    """Return an adapter whose factors are halved two to four times, with a dense head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lora = {
        f"layers.{i}": LoraFactors(draw(4, 256), draw(1024 if i % 2 else 320, 4), 8.0)
        for i in range(modules)
    }
    return Adapter.pack(lora, {"head": draw(5, 300)})


def drawn(adapter: Adapter, seed: int) -> Sketching:
    return sketching(adapter.layout, BUCKETS, seed, NARROWEST)


def estimates(first: Adapter, other: Adapter, draws: int) -> torch.Tensor:
    """Return estimated inner products less the true one, as shares of the product of lengths."""
    found = []
    for seed in range(draws):
        method = drawn(first, seed)
        found.append(sketched_products([method.sketch(one, {}) for one in (first, other)])[:, 0, 1])
    exact = inner_product(first, other)
    return (torch.stack(found).sum(1) - exact) / (norm(first) * norm(other))


def filled(like: Adapter, value: float) -> Adapter:
    return Adapter(like.layout, {k: torch.full_like(b, value) for k, b in like.buffers.items()})


def mixed(first: Adapter, other: Adapter, share: float) -> Adapter:
    buffers = {k: share * b + (1 - share) * other.buffers[k] for k, b in first.buffers.items()}
    return Adapter(first.layout, buffers)


def one_column(like: Adapter) -> Adapter:
    """Return an adapter with the same single column in every A: one input feature is active."""
    found = filled(like, 0.0)
    for factors in found.lora.values():
        factors.a[:, 17] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    return found


PAIRS = {
    "unrelated": (wide(1), wide(2)),
    "nearly the same": (mixed(wide(1), wide(2), 0.98), wide(1)),
    "the same": (wide(1), wide(1)),
    "opposite": (mixed(filled(wide(1), 0.0), wide(1), 2.0), wide(1)),
    "constant": (filled(wide(1), 0.3), filled(wide(1), -2.0)),
    "one column": (one_column(wide(1)), one_column(wide(1))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_inner_products_are_right_on_average_and_within_the_error_that_is_promised(name):
    draws = 150
    errors = estimates(*PAIRS[name], draws)
    # Four factors at least, so that the error of the halvings is small beside that of the buckets.
    assert float(errors.std()) <= 1.5 * math.sqrt(2 / BUCKETS)
    assert abs(float(errors.mean())) <= 4 * float(errors.std()) / math.sqrt(draws) + 1e-6


def test_errors_of_full_factors_are_those_of_the_buckets_alone():
    errors = estimates(*PAIRS["unrelated"], 150)
    assert 0.7 / math.sqrt(BUCKETS) < float(errors.std()) < 1.2 / math.sqrt(BUCKETS)


def test_the_worst_case_is_a_lone_factor_of_rank_one():
    one = filled(wide(1), 0.0)
    rows = torch.randn(1024, generator=torch.Generator().manual_seed(3))
    one.lora["layers.1"].b[:] = torch.outer(rows, torch.tensor([1.0, 2.0, -1.0, 0.5]))
    promised = math.sqrt(2 / BUCKETS + 2 / NARROWEST)
    assert 0.7 * promised < float(estimates(one, one, 150).std()) < 1.1 * promised


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)), max_size=3),
    st.integers(0, 90),
    st.integers(1, 200),
    st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_a_sketch_of_any_layout_is_linear(shapes, dense, buckets, narrowest):
    generator = torch.Generator().manual_seed(len(shapes) + dense)

    def make() -> Adapter:
        lora = {
            f"m{i}": LoraFactors(
                torch.randn(rank, columns, generator=generator),
                torch.randn(rows, rank, generator=generator),
                1.0,
            )
            for i, (rank, columns, rows) in enumerate(shapes)
        }
        return Adapter.pack(lora, {"head": torch.randn(dense + 1, generator=generator)})

    first, other = make(), make()
    method = sketching(first.layout, buckets, 0, narrowest)
    whole = method.sketch(mixed(first, other, 0.3), {})
    parts = 0.3 * method.sketch(first, {}) + 0.7 * method.sketch(other, {})
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    less = method.sketch(first, {}, other)
    torch.testing.assert_close(
        less, method.sketch(first, {}) - method.sketch(other, {}), rtol=1e-4, atol=1e-4
    )


def test_a_map_after_the_halvings_is_the_map_before_them():
    update, generator = wide(1), torch.Generator().manual_seed(7)
    turns = 0.3 * torch.randn(4, 2, 4, 4, generator=generator)  # nothing gets longer
    maps = {name: RankMap(*turn) for name, turn in zip(update.lora, turns, strict=True)}
    carried, shortened = apply_rank_maps(maps, update)
    assert shortened == 1.0
    method = drawn(update, 0)
    torch.testing.assert_close(
        method.sketch(update, maps), method.sketch(carried, {}), rtol=1e-4, atol=1e-4
    )


def test_halves_of_a_dtype_are_sketched_in_fp32():
    update, base = wide(1, dtype=torch.bfloat16), wide(2, dtype=torch.bfloat16)
    method = drawn(update, 0)
    as_fp32 = drawn(update.to(torch.float32), 0)
    expected = as_fp32.sketch(update.to(torch.float32), {}, base.to(torch.float32))
    assert torch.equal(method.sketch(update, {}, base), expected)


def test_dense_tensors_are_kept_apart_from_factors():
    update = wide(1)
    changed = Adapter(update.layout, {k: b.clone() for k, b in update.buffers.items()})
    changed.dense["head"].add_(1.0)
    before, after = (drawn(update, 0).sketch(one, {}) for one in (update, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    bare = Adapter.pack(update.lora)
    assert drawn(bare, 0).sketch(bare, {}).shape == (1, BUCKETS)


def test_places_and_signs_are_the_same_everywhere():
    like = wide(1)
    whole = Adapter(
        like.layout,
        {k: torch.arange(b.numel()).remainder(101.0) for k, b in like.buffers.items()},
    )
    sketch = drawn(like, 5).sketch(whole, {})
    # Whole numbers add up exactly in any order. Made by printing what is compared here.
    assert sketch[:, :4].tolist() == [[-225.0, -225.0, -61.0, 6.0], [33.0, -67.0, 126.0, 69.0]]
    assert int((sketch[0] * torch.arange(BUCKETS)).double().sum()) == -2885570
    assert not torch.equal(sketch, drawn(like, 6).sketch(whole, {}))
