import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core.fairness import (
    cap_mean,
    evenness,
    freshness,
    participation,
    reported_weight,
    shares,
)

weights = st.lists(st.floats(1e-3, 100), min_size=1, max_size=12)


@given(st.integers(0, 500), st.floats(0, 1))
def test_freshness_never_grows_with_staleness(age, decay):
    assert 0.0 <= freshness(age + 1, decay) <= freshness(age, decay) <= 1.0
    assert freshness(0, decay) == 1.0


@given(st.integers(1, 1000), st.floats(0.5, 500), st.floats(0, 2), st.floats(1, 10))
def test_participation_never_grows_with_uploads_and_stays_in_its_limits(
    uploads, mean, exponent, limit
):
    now = participation(uploads, mean, exponent, limit)
    assert participation(uploads + 1, mean, exponent, limit) <= now
    assert 1 / limit - 1e-12 <= now <= limit


def test_participation_is_one_for_the_average_client():
    assert participation(6, 6.0, 0.5, 4.0) == 1.0
    assert participation(1, 4.0, 0.5, 4.0) == 2.0
    assert participation(1, 100.0, 0.5, 4.0) == 4.0
    assert participation(100, 1.0, 0.5, 4.0) == 0.25


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(0, 1), st.floats(1, 16))
def test_a_longer_update_never_weighs_more_by_its_length(norm, middle, exponent, limit):
    now = evenness(norm, middle, exponent, limit)
    assert evenness(2 * norm, middle, exponent, limit) <= now
    assert 1 / limit - 1e-12 <= now <= limit


def test_an_update_of_the_middle_length_keeps_its_weight_and_a_quarter_of_it_counts_twice():
    assert evenness(3.0, 3.0, 0.5, 4.0) == 1.0
    assert evenness(0.75, 3.0, 0.5, 4.0) == 2.0
    assert evenness(0.75, 3.0, 0.0, 4.0) == 1.0
    assert evenness(0.0, 3.0, 0.5, 4.0) == 1.0
    assert evenness(1e-9, 3.0, 0.5, 4.0) == 4.0
    assert evenness(0.0, 0.0, 0.5, 4.0) == 1.0


@given(weights)
def test_shares_sum_to_one_over_the_whole_buffer(drawn):
    assert sum(shares(drawn)) == pytest.approx(1.0)


@given(weights)
def test_capped_weights_keep_their_ratios_and_never_average_above_one(drawn):
    capped = cap_mean(drawn)
    assert sum(capped) <= len(drawn) * (1 + 1e-9)
    for weight, other in zip(drawn, capped, strict=True):
        assert other / capped[0] == pytest.approx(weight / drawn[0])
        assert other <= weight


def test_the_reported_weight_falls_with_staleness_norm_and_uploads():
    weight = reported_weight(2, 1.0, 3, decay=0.2)
    assert reported_weight(3, 1.0, 3, decay=0.2) < weight
    assert reported_weight(2, 2.0, 3, decay=0.2) < weight
    assert reported_weight(2, 1.0, 4, decay=0.2) < weight
    assert reported_weight(0, 2.0, 4, decay=0.2) == pytest.approx(0.25)
