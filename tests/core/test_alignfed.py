"""Claims about AlignFed alone; what it owes like every rule is in tests/contract."""

import dataclasses
import math

import pytest
import torch

from alignfed.core.adapter import Adapter, difference, norm
from alignfed.core.aggregation.alignfed import AlignFed
from alignfed.core.aggregation.trust import LEAST_TRUST, falls, growth
from alignfed.core.lora import FactorMean, ProductSum
from alignfed.errors import RuleError
from tests.contract.flushes import DistanceCalibrator, Given, aggregate, entry, flush, stale_flush
from tests.core.adapters import along, make_adapter, moved

torch.set_num_threads(1)


def apply(rule: AlignFed, given: Given):
    return aggregate(rule, rule.init(given.adapter), given)[1]


def test_updates_in_new_directions_are_summed_and_repeated_ones_averaged():
    current = make_adapter(1)
    rule = AlignFed()
    new = [entry(i, along(current, i, 1.0), current) for i in range(4)]
    same = [entry(i, along(current, 0, 1.0), current) for i in range(4)]
    assert sum(apply(rule, flush(current, new, FactorMean())).weights) == pytest.approx(4.0)
    # (1 + lambda) K / (K + lambda)
    assert sum(apply(rule, flush(current, same, FactorMean())).weights) == pytest.approx(1.6)


def test_a_step_is_never_longer_than_its_bound():
    current = make_adapter(1)
    entries = [entry(i, along(current, i, 1.0), current) for i in range(16)]
    step = apply(AlignFed(max_step_ratio=2.0), flush(current, entries, FactorMean()))
    assert norm(difference(step.adapter, current)) == pytest.approx(2.0, rel=1e-4)
    assert step.notes["step_norm"] == pytest.approx(2.0)
    assert step.notes["step_bound"] == pytest.approx(0.5)


def test_a_scaled_up_client_is_cut_to_size_and_the_notes_say_so():
    current = make_adapter(1)
    honest = [entry(i, along(current, i, 1.0), current) for i in range(3)]
    loud = entry(3, along(current, 3, 100.0), current)
    step = apply(AlignFed(), flush(current, [*honest, loud], FactorMean()))
    assert step.weights[3] * 100 <= 2.0 + 1e-6
    assert step.weights[:3] == pytest.approx((1.0,) * 3, rel=0.3)
    assert step.notes["clipped"] == 1.0


def test_damping_does_not_undo_clipping():
    current = make_adapter(1)
    base = moved(current, 7)
    crowd = [entry(i, along(base, i, 1.0), base, staleness=2) for i in range(3)]
    loud = entry(3, along(base, 3, 1000.0), base, staleness=2)
    step = apply(AlignFed(), flush(current, [*crowd, loud], FactorMean()))
    assert step.weights[3] * 1000 <= 2.0 + 1e-6


def test_a_lone_loud_client_is_measured_against_those_before_it():
    current = make_adapter(1)
    rule = AlignFed()
    state = rule.init(current)
    for position in range(4):
        given = flush(current, [entry(0, along(current, position, 1.0), current)], FactorMean())
        state, _ = aggregate(rule, state, given)
    loud = flush(current, [entry(0, along(current, 5, 50.0), current)], FactorMean())
    state, step = aggregate(rule, state, loud)
    assert norm(difference(step.adapter, current)) <= 2.0 + 1e-4
    assert max(state.norms) <= 2.0 + 1e-6


def test_a_harmful_flush_is_shortened_and_recorded():
    current = make_adapter(1)
    goal = along(current, 0, 1.0)
    entries = [entry(0, along(current, 0, 7.0), current)]
    given = flush(current, entries, FactorMean(), calibrator=DistanceCalibrator(goal))
    rule = AlignFed()
    state, step = aggregate(rule, rule.init(current), given)
    assert step.notes["step_scale"] == 0.125
    assert step.notes["backtracks"] == 3.0
    assert step.weights == (0.125,)
    before, after = (
        DistanceCalibrator(goal).loss(current),
        DistanceCalibrator(goal).loss(step.adapter),
    )
    assert step.notes["calibration_loss_before"] == pytest.approx(before)
    assert step.notes["calibration_loss_after"] == pytest.approx(after)
    assert after < before
    assert state.trust == 0.125


def test_a_flush_that_can_only_harm_leaves_the_model_as_it_is():
    current = make_adapter(1)
    given = flush(
        current,
        [entry(0, along(current, 0, -1.0), current)],
        FactorMean(),
        calibrator=DistanceCalibrator(along(current, 0, 1.0)),
    )
    rule = AlignFed(harm_tolerance=0.0)
    state = rule.init(current)
    for _ in range(4):
        state, step = aggregate(rule, state, given)
        assert step.adapter.checksum == current.checksum
        assert step.weights == (0.0,)
        assert step.notes["step_scale"] == 0.0
    assert state.trust == LEAST_TRUST


def test_a_guard_without_halvings_still_learns_to_take_shorter_steps():
    current = make_adapter(1)
    given = flush(
        current,
        [entry(0, along(current, 0, 7.0), current)],
        FactorMean(),
        calibrator=DistanceCalibrator(along(current, 0, 1.0)),
    )
    rule = AlignFed(max_backtracks=0)
    state = rule.init(current)
    scales = []
    for _ in range(3):
        state, step = aggregate(rule, state, given)
        scales.append(step.notes["step_scale"])
    assert scales == [0.0, 0.0, 0.25]


def test_a_loss_that_is_not_finite_is_neither_noted_nor_remembered():
    current = make_adapter(1)
    entries = [entry(0, moved(current, 2), current)]
    lost = DistanceCalibrator(along(current, 0, math.nan))
    rule = AlignFed()
    state, step = aggregate(
        rule, rule.init(current), flush(current, entries, FactorMean(), calibrator=lost)
    )
    assert step.adapter.checksum == current.checksum
    assert "calibration_loss_after" not in step.notes
    assert state.calibrated_version == -1
    assert state.calibration_loss == 0.0


def test_the_loss_of_the_current_version_is_measured_once_and_then_remembered():
    given = stale_flush(FactorMean())
    rule = AlignFed(harm_tolerance=1000.0, overshoot_margin=1000.0, max_backtracks=0)
    state, first = aggregate(rule, rule.init(given.adapter), given)
    assert first.work.calibration_tokens == 2 * 40
    following = dataclasses.replace(given, version=given.version + 1, adapter=first.adapter)
    _, second = aggregate(rule, state, following)
    assert second.work.calibration_tokens == 1 * 40
    assert second.notes["calibration_loss_before"] == first.notes["calibration_loss_after"]
    # Were the version another one, the remembered loss would not be believed.
    _, third = aggregate(rule, state, dataclasses.replace(following, version=given.version + 5))
    assert third.work.calibration_tokens == 2 * 40


def test_trust_grows_back_while_steps_do_no_harm():
    current = make_adapter(1)
    rule = AlignFed()
    state = dataclasses.replace(rule.init(current), trust=0.1)
    helpful = flush(
        current,
        [entry(0, along(current, 0, 0.1), current)],
        FactorMean(),
        calibrator=DistanceCalibrator(along(current, 0, 9.0)),
    )
    seen = []
    for version in range(14):
        state, step = aggregate(rule, state, dataclasses.replace(helpful, version=version))
        seen.append(step.notes["step_scale"])
    assert seen == sorted(seen)
    assert seen[0] == 0.1
    assert seen[-1] == 1.0


def test_without_a_calibration_set_staleness_holds_the_step():
    current = make_adapter(1)
    rule = AlignFed()
    for staleness in (0, 1, 4, 16, 64):
        entries = [entry(i, along(current, i, 1.0), current, staleness=staleness) for i in range(4)]
        total = sum(apply(rule, flush(current, entries, FactorMean())).weights)
        assert total == pytest.approx(4 * 2 / (2 + 4 * staleness))


@pytest.mark.parametrize("kind", ["rank", "activation", "both"])
def test_alignment_reports_what_it_gained(kind):
    step = apply(AlignFed(alignment_map=kind), stale_flush(FactorMean()))
    gains = [name for name in ("alignment_gain", "activation_gain") if name in step.notes]
    expected = {"rank": 1, "activation": 1, "both": 2}[kind]
    assert len(gains) == expected
    assert all(0.0 < step.notes[name] < 1.0 for name in gains)


def test_activation_maps_cost_one_forward_for_each_version():
    step = apply(AlignFed(alignment_map="activation", guard=False), stale_flush(FactorMean()))
    assert step.work.calibration_tokens == 3 * 40  # the current version and two stale ones


def test_exact_innovations_need_no_rank_maps():
    aligned = apply(AlignFed(), stale_flush(ProductSum()))
    plain = apply(AlignFed(alignment=False), stale_flush(ProductSum()))
    assert aligned.adapter.checksum == plain.adapter.checksum
    assert "alignment_gain" not in aligned.notes


@pytest.mark.parametrize("off", ["grouping", "alignment", "fairness"])
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_each_module_makes_a_difference_and_can_be_switched_off(off, variant):
    given = stale_flush(FactorMean())
    # By default deviations are kept whole (docs/adr/0034).
    rule = AlignFed(variant=variant, deviation_keep=0.5)
    assert (
        apply(rule, given).adapter.checksum
        != apply(dataclasses.replace(rule, **{off: False}), given).adapter.checksum
    )


@pytest.mark.parametrize(
    "rule", [AlignFed(variant="paper"), AlignFed(alignment_map="both")], ids=["paper", "both"]
)
def test_alignment_by_calibration_without_a_calibration_set_is_refused(rule):
    assert rule.needs_calibrator
    with pytest.raises(RuleError, match="needs a calibration set"):
        apply(rule, stale_flush(FactorMean(), calibrated=False))
    switched_off = dataclasses.replace(rule, alignment=False)
    assert not switched_off.needs_calibrator
    apply(switched_off, stale_flush(FactorMean(), calibrated=False))
    assert not AlignFed().needs_calibrator


def test_the_papers_group_of_one_does_not_move_the_server():
    current = make_adapter(1)
    base = moved(current, 2)
    entries = [
        entry(0, moved(current, 3), current),
        entry(1, moved(base, 4), base, staleness=2),
    ]
    given = flush(current, entries, FactorMean(), calibrator=DistanceCalibrator(moved(current, 5)))
    paper = apply(AlignFed(variant="paper"), given)
    assert paper.adapter.checksum == current.checksum
    assert apply(AlignFed(), given).adapter.checksum != current.checksum


def test_the_papers_weights_follow_equation_seven():
    current = make_adapter(1)
    entries = [
        entry(0, along(current, 0, 1.0), current, staleness=0, uploads=1),
        entry(1, along(current, 1, 2.0), current, staleness=3, uploads=4),
    ]
    rule = AlignFed(variant="paper", grouping=False, alignment=False)
    weights = apply(rule, flush(current, entries, FactorMean())).weights
    assert sum(weights) == pytest.approx(1.0)
    assert weights[1] / weights[0] == pytest.approx(math.exp(-0.6) / 2 / 2, rel=1e-5)


def lenient(**settings: object) -> AlignFed:
    """Return a rule with a guard that accepts everything."""
    return AlignFed(harm_tolerance=1e6, overshoot_margin=1e6, **settings)


def heard(current: Adapter, client_id: int, update: Adapter) -> Given:
    """Return a calibrated flush of one client's update."""
    calibrator = DistanceCalibrator(along(current, 0, 9.0))
    entries = [entry(client_id, update, current)]
    return flush(current, entries, FactorMean(), calibrator=calibrator)


def test_absent_clients_are_heard_again_until_they_report():
    current = make_adapter(1)
    rule = lenient(memory_dtype="float32")
    state = rule.init(current)
    first = heard(current, 0, along(current, 0, 1.0))
    state, alone = aggregate(rule, state, first)
    partly = along(along(current, 0, 0.6), 1, 0.8)
    second = heard(current, 1, partly)
    after, step = aggregate(rule, state, second)
    moved_by = difference(step.adapter, current).dense["score.weight"].view(-1)
    # The absent client's share of a mean over all comes on top, times its cosine with what is new.
    assert moved_by[:2].tolist() == pytest.approx([0.6 + 0.6 / second.clients, 0.8], abs=1e-5)
    assert step.notes["remembered_clients"] == 2.0
    _, again = aggregate(rule, state, first)
    assert again.adapter.checksum == alone.adapter.checksum
    forgetful, _ = aggregate(dataclasses.replace(rule, memory_clients=1), state, second)
    assert list(forgetful.recall.latest) == [1]
    assert list(after.recall.latest) == [0, 1]


def test_what_is_contradicted_now_is_not_heard_again():
    current = make_adapter(1)
    rule = lenient()
    state = rule.init(current)
    for position in (0, 1):
        state, _ = aggregate(rule, state, heard(current, position, along(current, 0, 1.0)))
    against = heard(current, 2, along(current, 0, -1.0))
    _, fresh = aggregate(rule, rule.init(current), against)
    _, remembering = aggregate(rule, dataclasses.replace(state, path=None), against)
    assert remembering.adapter.checksum == fresh.adapter.checksum


def test_nobody_is_remembered_where_that_is_off_or_nobody_measures_the_step():
    current = make_adapter(1)
    for rule, given in (
        (lenient(memory=False), heard(current, 0, moved(current, 2))),
        (AlignFed(), flush(current, [entry(0, moved(current, 2), current)], FactorMean())),
    ):
        state, step = aggregate(rule, rule.init(current), given)
        assert not state.recall.latest
        assert "remembered_clients" not in step.notes


@pytest.mark.parametrize("lora", [FactorMean(), ProductSum()], ids=["factor", "product"])
def test_a_sign_flipped_and_a_scaled_up_client_are_cut_on_record_and_not_remembered(lora):
    current = make_adapter(1)

    def towards(length: float, position: int) -> Adapter:
        return along(along(current, 0, length), position, 0.3 * abs(length))

    honest = [entry(i, towards(1.0, i + 1), current) for i in range(6)]
    flipped, loud = entry(6, towards(-1.0, 8), current), entry(7, towards(100.0, 9), current)
    rule = lenient()
    given = flush(
        current, [*honest, flipped, loud], lora, calibrator=DistanceCalibrator(moved(current, 2))
    )
    state, step = aggregate(rule, rule.init(current), given)
    assert step.cuts[:6] == (1.0,) * 6
    assert step.weights[6] == step.cuts[6] == 0.0
    assert step.cuts[7] == pytest.approx(0.02, rel=0.1)
    assert sorted(state.recall.latest) == list(range(6))
    assert (step.notes["damped"], step.notes["clipped"]) == (1.0, 1.0)


def test_early_harm_is_measured_against_the_last_flushes():
    current = make_adapter(1)
    away = flush(
        current,
        [entry(0, along(current, 0, -0.2), current)],
        FactorMean(),
        calibrator=DistanceCalibrator(along(current, 0, 1.0)),
    )
    rule = AlignFed()
    before = DistanceCalibrator(along(current, 0, 1.0)).loss(current)
    for losses, taken in (((), False), ((2 * before,), True)):
        state = dataclasses.replace(rule.init(current), losses=losses)
        _, step = aggregate(rule, state, away)
        assert (step.adapter.checksum != current.checksum) == taken


def test_a_loss_falls_where_its_mean_does_by_more_than_it_scatters():
    assert falls([3.0, 3.1, 2.0, 2.1], 2) is True
    assert falls([3.0, 3.4, 3.1, 3.2], 2) is False
    assert falls([2.0, 2.1, 3.0, 3.1], 2) is False
    assert falls([2.0, 2.0, 2.0, 2.0], 2) is False
    assert falls([3.0, 2.0, 2.1], 2) is False
    assert falls([float("inf"), 3.0, 2.0, 2.1], 2) is False
    assert falls([3.0, 2.0], 1) is False


def test_trust_grows_the_more_slowly_the_later_a_step_is_felt():
    factors = [growth(staleness) for staleness in (0.0, 1.0, 5.0, 7.0, 20.0, 1e6)]
    assert factors[:3] == [2.0, 2.0, 2.0]
    assert factors == sorted(factors, reverse=True)
    assert factors[-2] == pytest.approx(1.25) and factors[-1] > 1.0
