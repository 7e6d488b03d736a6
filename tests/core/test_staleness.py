import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core.staleness import (
    DISCOUNTS,
    constant,
    discount,
    hinge,
    polynomial,
    staleness,
)
from alignfed.errors import FutureVersionError, RuleError

ages = st.integers(0, 10_000)


def test_staleness_counts_versions_since_the_base():
    assert staleness(7, 7) == 0
    assert staleness(7, 3) == 4


def test_a_base_from_the_future_is_refused_with_both_versions():
    with pytest.raises(FutureVersionError, match="base_version=5, server_version=4") as caught:
        staleness(4, 5)
    assert caught.value.base_version == 5
    assert caught.value.server_version == 4


@pytest.mark.parametrize("kind", DISCOUNTS)
@given(age=ages, slope=st.floats(0.01, 50), exponent=st.floats(0, 3), start=st.integers(0, 20))
def test_a_discount_lies_above_zero_up_to_one_and_never_grows(kind, age, slope, exponent, start):
    settings = {"exponent": exponent, "slope": slope, "start": start}
    now, later = discount(kind, age, **settings), discount(kind, age + 1, **settings)
    assert 0.0 < later <= now <= 1.0


def test_discounts_have_their_published_values():
    assert constant(9) == 1.0
    assert polynomial(3) == 0.5
    assert polynomial(1, exponent=2.0) == 0.25
    assert hinge(6) == 1.0
    # 1 / (10 (8 - 6) + 1): without the 1 it would be 1 / 20.
    assert hinge(8) == pytest.approx(1 / 21)


def test_a_flat_hinge_never_exceeds_one():
    # Without the 1 in the denominator this would be 10.
    assert hinge(7, slope=0.1, start=6) == pytest.approx(1 / 1.1)


def test_negative_staleness_and_unknown_discounts_are_refused():
    for kind in DISCOUNTS:
        with pytest.raises(RuleError, match="staleness=-1"):
            discount(kind, -1, exponent=0.5, slope=1.0, start=0)
    with pytest.raises(RuleError, match="discount='linear', must be one of constant"):
        discount("linear", 0, exponent=0.5, slope=1.0, start=0)
