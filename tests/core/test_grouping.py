import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core.grouping import damp_deviations, drop_means, group_by_version

buffers = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=8)


def test_groups_hold_positions_by_version_oldest_first():
    assert dict(group_by_version([7, 2, 7, 5])) == {2: (1,), 5: (3,), 7: (0, 2)}
    assert list(group_by_version([7, 2, 7, 5])) == [2, 5, 7]


@given(buffers, st.floats(0, 1))
def test_damped_coefficients_are_those_of_mean_plus_kept_deviation(drawn, keep):
    coefficients, versions = [c for c, _ in drawn], [v for _, v in drawn]
    # One-dimensional updates stand for all: a coefficient acts on each element alike.
    deltas = [float(position**2 + 1) for position in range(len(drawn))]
    groups = group_by_version(versions)
    expected = 0.0
    for positions in groups.values():
        mean = sum(deltas[p] for p in positions) / len(positions)
        expected += sum(coefficients[p] * (mean + keep * (deltas[p] - mean)) for p in positions)
    damped = damp_deviations(coefficients, versions, keep)
    assert sum(c * d for c, d in zip(damped, deltas, strict=True)) == pytest.approx(
        expected, abs=1e-6
    )


@given(buffers, st.floats(0, 1))
def test_damping_keeps_every_groups_total(drawn, keep):
    coefficients, versions = [c for c, _ in drawn], [v for _, v in drawn]
    damped = damp_deviations(coefficients, versions, keep)
    for positions in group_by_version(versions).values():
        before = sum(coefficients[p] for p in positions)
        assert sum(damped[p] for p in positions) == pytest.approx(before, abs=1e-9)


def test_a_group_of_one_is_left_alone_by_damping_and_annulled_by_the_papers_centring():
    assert damp_deviations([0.3, 0.7], [1, 2], keep=0.0) == (0.3, 0.7)
    assert drop_means([0.3, 0.7], [1, 2]) == (0.0, 0.0)


def test_the_papers_centring_annuls_equal_members():
    assert drop_means([0.4, 0.4, 0.2], [1, 1, 2]) == (0.0, 0.0, 0.0)
