"""How far an adapter has moved: the same number, to the bit, for one upload and for many."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.distance import SMALL, distance, small_distances


def adapter(size, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(1, size, generator=generator)
    b = scale * torch.randn(1, 1, generator=generator)
    return Adapter.pack({"q": LoraFactors(a.to(dtype), b.to(dtype), 1.0)})


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, SMALL - 1),
    count=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]),
)
def test_many_small_adapters_are_as_far_away_as_each_is_alone(size, count, seed, scale):
    adapters = [adapter(size, seed + i, scale=scale) for i in range(count)]
    bases = [adapter(size, seed + 1000 + i % 3, scale=scale) for i in range(count)]
    alone = [distance(one, base) for one, base in zip(adapters, bases, strict=True)]
    assert small_distances(adapters, bases) == alone


@pytest.mark.parametrize("size", [5, SMALL, 300_000, 600_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_is_that_of_the_whole_vector(size, dtype):
    one, base = adapter(size, 1, dtype), adapter(size, 2, dtype)
    gap = one.buffers[dtype].double() - base.buffers[dtype].double()
    assert distance(one, base) == pytest.approx(gap.norm().item(), rel=1e-5)
    assert distance(one, one) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_element_that_is_no_number_shows_in_its_own_distance_alone(bad):
    adapters, base = [adapter(20, seed) for seed in range(3)], adapter(20, 9)
    adapters[1].buffers[torch.float32][7] = bad
    found = small_distances(adapters, [base] * 3)
    assert [math.isfinite(one) for one in found] == [True, False, True]
    assert not math.isfinite(distance(adapters[1], base))


def test_what_is_odd_or_large_is_left_to_be_measured_alone():
    base = adapter(20, 1)
    for other in (adapter(21, 2), adapter(20, 2, torch.bfloat16)):
        assert small_distances([adapter(20, 3), other], [base, base]) is None
        assert small_distances([other], [base]) is None
    large = adapter(SMALL, 1)
    assert small_distances([large], [large]) is None
    for buffer in (
        torch.zeros(5),
        torch.zeros(1, 21),
        torch.zeros(21, dtype=torch.float64),
        torch.zeros(21, dtype=torch.bfloat16),
    ):
        claimed = Adapter(base.layout, {torch.float32: buffer})
        assert small_distances([claimed], [base]) is None
        assert small_distances([base, claimed], [base, base]) is None
    assert small_distances([Adapter(base.layout, {})], [base]) is None
