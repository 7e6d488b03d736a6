import math

import pytest
import torch

from alignfed.core.adapter import (
    Adapter,
    LoraFactors,
    difference,
    inner_product,
    linear_combination,
    norm,
    zeros_like,
)
from alignfed.errors import AdapterError
from tests.core.adapters import make_adapter, moved


def test_factors_are_views_into_one_flat_buffer():
    adapter = make_adapter()
    (buffer,) = adapter.buffers.values()
    factors = adapter.lora["layers.0.q_proj"]
    assert factors.a.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert factors.a.shape == (2, 6)
    assert factors.b.shape == (5, 2)
    assert factors.scale == 2.0
    assert adapter.dense["score.weight"].shape == (3, 6)


def test_packing_copies_so_that_later_changes_do_not_reach_the_adapter():
    a, b = torch.ones(1, 3), torch.zeros(2, 1)
    adapter = Adapter.pack({"layer": LoraFactors(a, b, 1.0)})
    a.zero_()
    assert adapter.lora["layer"].a.sum() == 3


def test_checksum_is_blind_to_insertion_order_and_sees_every_bit():
    adapter = make_adapter()
    again = Adapter.pack(
        dict(reversed(list(adapter.lora.items()))), dict(reversed(list(adapter.dense.items())))
    )
    assert adapter.checksum == again.checksum
    nudged = {dtype: buffer.clone() for dtype, buffer in adapter.buffers.items()}
    nudged[torch.float32][7] = torch.nextafter(nudged[torch.float32][7], torch.tensor(9.0))
    assert Adapter(adapter.layout, nudged).checksum != adapter.checksum
    assert make_adapter(alpha=8.0).checksum != adapter.checksum


def test_mixed_dtypes_keep_one_buffer_each():
    adapter = Adapter.pack(
        {"layer": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0)},
        {"head": torch.ones(4, dtype=torch.bfloat16)},
    )
    assert set(adapter.buffers) == {torch.float32, torch.bfloat16}
    assert adapter.size_bytes == 5 * 4 + 4 * 2
    assert adapter.to(torch.bfloat16).size_bytes == 9 * 2
    assert len(adapter.checksum) == 64


def test_linear_combination_and_difference_agree_with_plain_tensors():
    first, other = make_adapter(1), make_adapter(2)
    mixed = linear_combination([(2.0, first), (-0.5, other)])
    for name, factors in mixed.lora.items():
        expected = 2.0 * first.lora[name].a - 0.5 * other.lora[name].a
        torch.testing.assert_close(factors.a, expected)
    delta = difference(first, other)
    assert norm(delta) == pytest.approx(math.sqrt(inner_product(delta, delta)), rel=1e-5)
    assert norm(zeros_like(first)) == 0.0


def test_a_bf16_combination_is_accumulated_in_fp32():
    one = make_adapter(1, dtype=torch.bfloat16)
    tiny = linear_combination([(1e-3, one)] * 1000)
    (total,), (original,) = tiny.buffers.values(), one.buffers.values()
    assert total.dtype == torch.bfloat16
    torch.testing.assert_close(total.float(), original.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_makes_an_adapter_not_finite(value):
    adapter = moved(make_adapter(), 3)
    assert adapter.is_finite()
    adapter.dense["score.weight"][1, 1] = value
    assert not adapter.is_finite()


def test_huge_but_finite_elements_are_finite():
    adapter = make_adapter()
    adapter.dense["score.weight"].fill_(3e38)
    assert adapter.is_finite()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_adapter(rank=3), "rank=3"),
        (make_adapter(alpha=1.0), "alpha=1.0"),
        (make_adapter(dense=False), "missing"),
        (make_adapter(dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(other, words):
    with pytest.raises(AdapterError, match=words):
        difference(make_adapter(), other)


@pytest.mark.parametrize(
    "factors",
    [
        LoraFactors(torch.ones(2, 3), torch.ones(4, 3), 1.0),
        LoraFactors(torch.ones(0, 3), torch.ones(4, 0), 1.0),
        LoraFactors(torch.ones(3), torch.ones(4, 1), 1.0),
        LoraFactors(torch.ones(1, 3), torch.ones(4, 1).bfloat16(), 1.0),
        LoraFactors(torch.ones(1, 3), torch.ones(4, 1), 0.0),
        LoraFactors(torch.ones(1, 3, dtype=torch.int64), torch.ones(4, 1).long(), 1.0),
    ],
)
def test_impossible_factors_are_refused(factors):
    with pytest.raises(AdapterError):
        Adapter.pack({"layer": factors})


def test_adapters_of_equal_sizes_share_one_layout_whose_alpha_is_a_float():
    first, other = make_adapter(1, alpha=4), make_adapter(2, alpha=4.0)
    assert first.layout is other.layout
    assert [repr(shape.alpha) for _, shape in first.layout.lora] == ["4.0", "4.0"]
    assert make_adapter(1, alpha=5.0).layout is not first.layout
