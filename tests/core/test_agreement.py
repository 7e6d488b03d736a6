import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import difference, inner_product, norm
from alignfed.core.agreement import (
    agreement_coefficients,
    clip_scales,
    contradiction_factors,
    factor_gram,
    lengths,
    step_length,
)
from tests.core.adapters import make_adapter, moved

torch.set_num_threads(1)


def gram(*rows: list[float]) -> torch.Tensor:
    stacked = torch.tensor(rows, dtype=torch.float64)
    return stacked @ stacked.T


def test_orthogonal_updates_are_summed():
    found = agreement_coefficients(gram([3, 0, 0], [0, 0.1, 0], [0, 0, 7]), [1, 0.5, 0.2], 1.0)
    assert found == pytest.approx((1.0, 0.5, 0.2))


@given(st.integers(1, 50), st.floats(0.05, 20))
def test_identical_updates_get_a_bounded_sum(count, regularisation):
    found = agreement_coefficients(gram(*[[1.0, 2.0]] * count), [1.0] * count, regularisation)
    expected = (1 + regularisation) * count / (regularisation + count)
    assert sum(found) == pytest.approx(expected, rel=1e-6)


def test_a_negative_cosine_amplifies_nobody():
    found = agreement_coefficients(gram([1, 0], [-0.9, math.sqrt(0.19)]), [1.0, 1.0], 1.0)
    assert found == pytest.approx((1.0, 1.0))


def test_whoever_contradicts_does_not_change_what_those_who_agree_get():
    agreeing = [[1.0, 0.0], [0.8, 0.6]]
    alone = agreement_coefficients(gram(*agreeing), [1.0, 1.0], 1.0)
    joined = agreement_coefficients(gram(*agreeing, [-1.0, -0.3]), [1.0, 1.0, 1.0], 1.0)
    assert joined == pytest.approx((*alone, 1.0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 1e-20, 1e-4, 1.0, 1e6]), st.integers(0, 4)),
        min_size=1,
        max_size=10,
    ),
    st.floats(1e-3, 100),
)
def test_zero_identical_and_opposite_updates_never_make_a_coefficient_leave_its_bounds(
    drawn, regularisation
):
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    rows = torch.stack([size * directions[index] for size, index in drawn])
    wanted = [0.1 + 0.3 * index for _, index in drawn]
    for found, weight in zip(
        agreement_coefficients(rows @ rows.T, wanted, regularisation), wanted, strict=True
    ):
        assert 0.0 <= found <= weight


def test_who_contradicts_everybody_else_is_damped_and_nobody_else_is():
    honest = [[1.0, 0.3, 0], [1.0, -0.3, 0], [1.0, 0, 0.4], [1.0, 0, -0.4]]
    found = contradiction_factors(gram(*honest, [-1.0, 0, 0]), 5, 0.5)
    assert found == pytest.approx((1, 1, 1, 1, 0))
    # At a cosine of -0.25 against the others' sum, half is left.
    slight = [-0.25, math.sqrt(1 - 0.25**2), 0]
    assert contradiction_factors(gram([1.0, 0, 0], [1.0, 0, 0], slight), 3, 0.5) == pytest.approx(
        (1, 1, 0.5)
    )


def test_new_directions_contradict_nobody():
    found = contradiction_factors(gram([1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]), 3, 0.5)
    assert found == (1.0, 1.0, 1.0)


def test_between_two_nobody_can_tell_who_is_right_but_what_absent_clients_said_decides():
    pair = [[1.0, 0.0], [-1.0, 0.0]]
    assert contradiction_factors(gram(*pair), 2, 0.5) == (1.0, 1.0)
    assert contradiction_factors(gram(*pair, [0.5, 0.5]), 2, 0.5)[1] == 0.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 1e-20, 1.0, 1e6]), st.integers(0, 4)),
        min_size=1,
        max_size=8,
    )
)
def test_damping_stays_between_zero_and_one(drawn):
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    rows = torch.stack([size * directions[index] for size, index in drawn])
    found = contradiction_factors(rows @ rows.T, len(drawn), 0.5)
    assert all(0.0 <= factor <= 1.0 for factor in found)


def test_order_does_not_matter():
    rows = [[1.0, 0.2, 0], [0.8, 0.5, 0.1], [0, 1, -1], [0.3, 0, 2]]
    weights = [1.0, 0.7, 0.5, 1.2]
    found = agreement_coefficients(gram(*rows), weights, 1.0)
    back = agreement_coefficients(gram(*rows[::-1]), weights[::-1], 1.0)
    assert back[::-1] == pytest.approx(found)


def test_long_updates_are_cut_to_a_multiple_of_the_median():
    assert clip_scales([1.0, 1.0, 1.0, 100.0], [], 2.0) == pytest.approx((1, 1, 1, 0.02))
    assert clip_scales([100.0], [1.0, 1.0, 1.0], 2.0) == pytest.approx((0.02,))
    assert clip_scales([5.0], [], 2.0) == (1.0,)
    assert clip_scales([0.0, 0.0], [], 2.0) == (1.0, 1.0)
    assert clip_scales([0.0, 3.0, 0.0], [], 2.0) == (1.0, 1.0, 1.0)


def test_an_update_too_long_to_measure_is_cut_to_nothing():
    norms = lengths(torch.diag(torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)))
    assert norms == (1.0, math.inf, math.inf)
    assert clip_scales(norms, [], 2.0) == (1.0, 0.0, 0.0)
    assert clip_scales([math.inf], [], 2.0) == (0.0,)


def test_the_gram_matrix_holds_inner_products_over_factors():
    base = make_adapter(1)
    deltas = [difference(moved(base, seed), base) for seed in (2, 3, 4)]
    found = factor_gram(deltas)
    assert float(found[0, 2]) == pytest.approx(inner_product(deltas[0], deltas[2]), rel=1e-4)
    assert lengths(found)[1] == pytest.approx(norm(deltas[1]), rel=1e-5)


def test_the_length_of_a_step_comes_from_the_gram_matrix():
    assert step_length(gram([3, 0], [0, 4]), [1.0, 1.0]) == pytest.approx(5.0)
    assert step_length(gram([3, 0], [3, 0]), [1.0, -1.0]) == 0.0


def test_where_everybody_contradicts_the_rest_somebody_is_still_heard():
    angles = torch.tensor([0.0, 2.094, 4.189], dtype=torch.float64)  # a star of three
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert max(contradiction_factors(directions @ directions.T, 3, 0.5)) == 1.0
    lopsided = directions * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    assert max(contradiction_factors(lopsided @ lopsided.T, 3, 0.5)) == 1.0
