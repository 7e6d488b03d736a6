"""What every aggregation rule owes, with every LoRA rule: one table, one set of claims."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from statistics import median

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors, difference, norm, zeros_like
from alignfed.core.aggregation import RULES, make_rule
from alignfed.core.algebra import innovation, product_norm, refactor, stack
from alignfed.core.lora import LORA_RULES, ProductSum, incompatibility, make_lora_rule
from alignfed.core.lora.compatibility import KEEPS_MOMENTS
from alignfed.core.lora.exchange import trained_part
from alignfed.core.ports import AggregationRule, LoraRule
from alignfed.errors import RuleError
from alignfed.journal import Codec
from tests.contract.flushes import (
    VERSION,
    DistanceCalibrator,
    Given,
    aggregate,
    entry,
    flush,
    stale_flush,
)
from tests.core.adapters import make_adapter, moved
from tests.core.test_algebra import assert_same_products, products, ranked, turned

torch.set_num_threads(1)

CASES: dict[str, Callable[[], AggregationRule]] = {
    "fedavg": lambda: make_rule("fedavg"),
    "fedavg uniform": lambda: make_rule("fedavg", weighting="uniform"),
    "fedasync constant": lambda: make_rule("fedasync", discount="constant"),
    "fedasync polynomial": lambda: make_rule("fedasync"),
    "fedasync hinge": lambda: make_rule("fedasync", discount="hinge", hinge_start=2),
    "fedbuff": lambda: make_rule("fedbuff"),
    "fedprox": lambda: make_rule("fedprox"),
    "fedcompass": lambda: make_rule("fedcompass"),
    "ca2fl": lambda: make_rule("ca2fl"),
    "ace": lambda: make_rule("ace"),
    "port": lambda: make_rule("port"),
    "port uniform": lambda: make_rule("port", weighting="uniform", agreement_weight=0.5),
    "fedadam": lambda: make_rule("fedadam"),
    "fedyogi": lambda: make_rule("fedyogi"),
    "fadas": lambda: make_rule("fadas"),
    "fadas minimum": lambda: make_rule("fadas", delay_step="minimum"),
    "delayed_nesterov": lambda: make_rule("delayed_nesterov"),
    "delayed_nesterov short": lambda: make_rule("delayed_nesterov", period=2),
    "alignfed": lambda: make_rule("alignfed"),
    "alignfed weighed": lambda: make_rule(
        "alignfed", freshness_decay=0.125, participation_exponent=0.25, deviation_keep=0.5
    ),
    "alignfed both maps": lambda: make_rule("alignfed", alignment_map="both"),
    "alignfed activation": lambda: make_rule("alignfed", alignment_map="activation"),
    "alignfed bare": lambda: make_rule(
        "alignfed", grouping=False, alignment=False, fairness=False, guard=False
    ),
    "alignfed paper": lambda: make_rule("alignfed", variant="paper"),
    "alignfed paper bare": lambda: make_rule(
        "alignfed", variant="paper", grouping=False, alignment=False, fairness=False
    ),
}


def fits(case: str, lora: str) -> bool:
    return incompatibility(CASES[case](), lora) is None


every_rule = pytest.mark.parametrize("case", CASES)
every_product_rule = pytest.mark.parametrize("case", [c for c in CASES if fits(c, "product")])
every_lora = pytest.mark.parametrize("lora", LORA_RULES)
PAIRS = [(case, lora) for case in CASES for lora in LORA_RULES if fits(case, lora)]
every_pair = pytest.mark.parametrize(("case", "lora"), PAIRS)


def apply(rule: AggregationRule, given: Given):
    return aggregate(rule, rule.init(given.adapter), given)[1]


def without_grouping(case: str) -> AggregationRule:
    """Return the rule; the paper's centring makes coefficients of weights, so it is left out."""
    rule = CASES[case]()
    return dataclasses.replace(rule, grouping=False) if "paper" in case else rule


def encoded(state: object) -> str:
    """What a checkpoint keeps of a state: its text names every tensor and adapter by content."""
    return Codec(type(state)).encode(state).text


def assert_close(found: Adapter, expected: Adapter, tolerance: float = 1e-4) -> None:
    assert_same_products(
        stack([(1.0, found), (-1.0, expected)]),
        {name: torch.zeros_like(product) for name, product in products(expected).items()},
    )
    scale = max(1.0, product_norm(expected))
    assert product_norm(innovation(found, expected)) <= tolerance * scale


def assert_same_modules(found: Adapter, given: Adapter, lora: str) -> None:
    """A rule that folds trains the same directions, beside those that belong to the base."""
    assert trained_part(found).layout == given.layout
    assert LORA_RULES[lora].folds or found.layout == given.layout


@every_lora
def test_every_lora_rule_works_with_every_timing_rule_in_some_setting(lora):
    # What cannot be: vectors kept between flushes, where factors do not simply add up.
    refused = set() if lora in ("factor", "ffa", "fedsa") else set(KEEPS_MOMENTS)
    if lora not in ("factor", "ffa", "fedsa", "product"):
        refused |= {"ca2fl", "ace"}
    assert {case.split()[0] for case, name in PAIRS if name == lora} == set(RULES) - refused


def test_every_rule_in_the_table_is_under_contract():
    assert {case.split()[0] for case in CASES} == set(RULES)
    for name, row in RULES.items():
        rule = make_rule(name)
        assert rule.name == name
        assert rule.synchronous == row.synchronous


@every_rule
def test_every_rule_has_one_number_to_tune_and_values_worth_trying(case):
    name = case.split()[0]
    row = RULES[name]
    assert row.step_setting in {setting.name for setting in row.settings}
    assert list(row.step_grid) == sorted(set(row.step_grid))
    assert len(row.step_grid) >= 3
    given = stale_flush(make_lora_rule("factor"))
    lengths = []
    for value in row.step_grid:
        # Without guards and with one flush, a longer step goes further.
        rule = make_rule(name, **{row.step_setting: value})
        if name == "alignfed":
            rule = dataclasses.replace(rule, guard=False, max_step_ratio=1e6)
        lengths.append(norm(difference(apply(rule, given).adapter, given.adapter)))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


# --- law 1 ------------------------------------------------------------------------------------


@every_lora
def test_fedbuff_on_a_fresh_cohort_is_uniform_fedavg(lora):
    current = make_adapter(1)
    entries = [entry(i, moved(current, i + 2), current, num_examples=i + 1) for i in range(4)]
    given = flush(current, entries, make_lora_rule(lora))
    fedbuff = apply(make_rule("fedbuff"), given)
    fedavg = apply(make_rule("fedavg", weighting="uniform"), given)
    assert fedbuff.weights == pytest.approx(fedavg.weights)
    assert_close(fedbuff.adapter, fedavg.adapter)


@every_lora
def test_fedavg_weighs_by_examples(lora):
    current = make_adapter(1)
    entries = [
        entry(i, moved(current, i + 2), current, num_examples=n) for i, n in ((0, 1), (1, 3))
    ]
    step = apply(make_rule("fedavg"), flush(current, entries, make_lora_rule(lora)))
    assert step.weights == pytest.approx((0.25, 0.75))


# --- law 2 ------------------------------------------------------------------------------------


@every_product_rule
def test_product_aggregates_do_not_depend_on_how_factors_are_written(case):
    # Maps fitted in the factors of one version are themselves bound to a gauge.
    rule = CASES[case]()
    if case in ("alignfed paper", "alignfed both maps", "alignfed activation"):
        rule = dataclasses.replace(rule, alignment=False)
    given = stale_flush(ProductSum())
    again = dataclasses.replace(
        given,
        adapter=turned(given.adapter, 1),
        updates=tuple(
            dataclasses.replace(
                e,
                update=dataclasses.replace(e.update, adapter=turned(e.update.adapter, 2 + i)),
                base=turned(e.base, 20 + i),
            )
            for i, e in enumerate(given.updates)
        ),
    )
    first, second = apply(rule, given), apply(rule, again)
    assert second.weights == pytest.approx(first.weights, rel=1e-2, abs=1e-4)
    assert_close(second.adapter, first.adapter, tolerance=1e-2)


# --- law 3 ------------------------------------------------------------------------------------


def _orthogonal_flush(versions_behind: list[int], lora: LoraRule) -> Given:
    """Updates of equal length, each along an element of its own, all bases equal in content."""
    current = make_adapter(1)
    entries = []
    for position, staleness in enumerate(versions_behind):
        head = current.dense["score.weight"].clone()
        head.view(-1)[position] += 0.5
        update = Adapter.pack(current.lora, {"score.weight": head})
        entries.append(entry(position, update, current, staleness=staleness))
    target = Adapter.pack(current.lora, {"score.weight": current.dense["score.weight"] + 1.0})
    return flush(current, entries, lora, calibrator=DistanceCalibrator(target))


@every_pair
def test_a_lone_update_weighs_what_a_member_of_a_crowded_version_weighs(case, lora):
    rule = without_grouping(case)
    names = {field.name for field in dataclasses.fields(rule)}
    timeless = {
        name: value
        for name, value in (
            ("discount", "constant"), ("freshness_decay", 0.0), ("reported_decay", 0.0),
            ("exponent", 0.0), ("staleness_bound", 1e12), ("guard", True),
        )
        if name in names
    }  # fmt: skip
    rule = dataclasses.replace(rule, **timeless)
    crowded = apply(rule, _orthogonal_flush([3, 3, 3, 1], make_lora_rule(lora))).weights
    spread = apply(rule, _orthogonal_flush([4, 3, 2, 1], make_lora_rule(lora))).weights
    assert crowded == pytest.approx(spread)
    assert crowded[3] == pytest.approx(crowded[0])


# --- law 4 ------------------------------------------------------------------------------------


@every_pair
def test_the_same_flush_twice_gives_the_same_bytes(case, lora):
    rule = CASES[case]()
    given = stale_flush(make_lora_rule(lora))
    before = [given.adapter.checksum, *(e.update.adapter.checksum for e in given.updates)]
    state = rule.init(given.adapter)
    first_state, first = aggregate(rule, state, given)
    second_state, second = aggregate(rule, state, stale_flush(make_lora_rule(lora)))
    assert first.adapter.checksum == second.adapter.checksum
    assert (first.weights, first.notes, first.work) == (second.weights, second.notes, second.work)
    assert encoded(first_state) == encoded(second_state)
    fresh = stale_flush(make_lora_rule(lora))
    assert before == [fresh.adapter.checksum, *(e.update.adapter.checksum for e in fresh.updates)]


@every_pair
def test_the_order_of_replies_inside_a_flush_does_not_matter(case, lora):
    rule = CASES[case]()
    given = stale_flush(make_lora_rule(lora))
    order = [3, 0, 4, 2, 1]
    shuffled = dataclasses.replace(given, updates=tuple(given.updates[i] for i in order))
    first, second = apply(rule, given), apply(rule, shuffled)
    assert second.weights == pytest.approx([first.weights[i] for i in order], rel=1e-4, abs=1e-7)
    assert_close(second.adapter, first.adapter)


# --- law 5 ------------------------------------------------------------------------------------


@every_pair
def test_weight_never_grows_with_staleness(case, lora):
    rule = without_grouping(case)
    weights = [
        apply(rule, _orthogonal_flush([1, 2, age], make_lora_rule(lora))).weights[2]
        for age in (0, 1, 2, 3, 6, 7, 20)
    ]
    assert weights == sorted(weights, reverse=True)


@every_pair
def test_weight_never_grows_with_participation(case, lora):
    rule = without_grouping(case)
    given = dataclasses.replace(
        _orthogonal_flush([1, 2, 3], make_lora_rule(lora)), mean_uploads=6.0
    )
    weights = []
    for uploads in (1, 2, 5, 6, 7, 40):
        last = dataclasses.replace(given.updates[2], uploads=uploads)
        weights.append(
            apply(rule, dataclasses.replace(given, updates=(*given.updates[:2], last))).weights[2]
        )
    assert weights == sorted(weights, reverse=True)


# --- law 6 ------------------------------------------------------------------------------------


@every_product_rule
def test_mixed_ranks_at_constant_alpha_over_rank_add_up_exactly(case):
    rule = CASES[case]()
    if "paper" in case or "maps" in case or "activation" in case:
        rule = dataclasses.replace(rule, alignment=False)
    # Six directions are all that these layers have, so nothing is lost on the way back.
    current = refactor(ranked(1, 1), ranked(0, 6))
    base = ranked(2, 1)
    entries = [
        entry(0, ranked(3, 1), base, staleness=1),
        entry(1, ranked(4, 2), base, staleness=1),
        entry(2, ranked(5, 4), current),
    ]
    step = apply(rule, flush(current, entries, ProductSum()))
    assert step.adapter.layout == current.layout
    expected = dict(products(current))
    for weight, buffered in zip(step.weights, entries, strict=True):
        origin = current if case.startswith("fedasync") else buffered.base
        for name, product in products(innovation(buffered.update.adapter, origin)).items():
            expected[name] = expected[name] + weight * product
    assert_same_products(step.adapter, expected)


# --- law 7 ------------------------------------------------------------------------------------


@every_pair
def test_zero_updates_from_everybody_leave_the_model_as_it_is(case, lora):
    rule = CASES[case]()
    current = make_adapter(1)
    given = flush(
        current,
        [entry(i, current, current, staleness=s) for i, s in enumerate((0, 3, 3))],
        make_lora_rule(lora),
        calibrator=DistanceCalibrator(moved(current, 2)),
    )
    assert apply(rule, given).adapter.checksum == current.checksum
    if not case.startswith("fedasync"):  # which mixes models and has no use for bases
        base = moved(current, 5)
        entries = [entry(i, base, base, staleness=3) for i in range(3)]
        step = apply(rule, dataclasses.replace(given, updates=tuple(entries)))
        assert_close(step.adapter, current, tolerance=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "lora"),
    [
        (name, settings, lora)
        for name, settings in (
            ("fedavg", {}),
            ("fedprox", {}),
            ("fedbuff", {}),
            ("fedasync", {"mixing": 1.0}),
            ("port", {}),
            ("ca2fl", {}),
            ("ace", {"server_step": 1.0}),
            ("fedcompass", {}),
            ("alignfed", {}),
        )
        for lora in LORA_RULES
        if name == "alignfed" or incompatibility(make_rule(name), lora) is None
    ],
)
def test_one_fresh_client_of_full_weight_gives_its_model(name, settings, lora):
    current = make_adapter(1)
    update = moved(current, 2)
    given = flush(current, [entry(0, update, current)], make_lora_rule(lora))
    step = apply(make_rule(name, **settings), dataclasses.replace(given, clients=1))
    assert step.weights == pytest.approx((1.0,))
    # Written in other factors, equal products differ by the rounding of what cancels.
    tolerance = 1e-3 if LORA_RULES[lora].folds else 1e-5
    assert_close(step.adapter, given.updates[0].update.adapter, tolerance=tolerance)


@every_pair
@pytest.mark.parametrize("kinds", ["00", "++", "+-", "+++-", "0+-", "+" * 12, "+L", "L0"])
def test_zero_identical_opposite_and_huge_updates_keep_coefficients_bounded(case, lora, kinds):
    rule = CASES[case]()
    current = make_adapter(1)
    step = {dtype: 0.1 * torch.ones_like(buffer) for dtype, buffer in current.buffers.items()}
    factor = {"0": 0.0, "+": 1.0, "-": -1.0, "L": 1e4}
    entries = [
        entry(
            i,
            Adapter(
                current.layout, {t: b + factor[kind] * step[t] for t, b in current.buffers.items()}
            ),
            current,
            staleness=i % 3,
        )
        for i, kind in enumerate(kinds)
    ]
    goal = {dtype: buffer + 2 * step[dtype] for dtype, buffer in current.buffers.items()}
    calibrator = DistanceCalibrator(Adapter(current.layout, goal))
    found = apply(rule, flush(current, entries, make_lora_rule(lora), calibrator=calibrator))
    assert found.adapter.is_finite()
    assert all(math.isfinite(weight) for weight in found.weights)
    assert sum(found.weights) <= len(kinds)
    # Nobody's update moves the server further than itself, or than the middle one of the buffer.
    lengths = [one.norm for one in entries]
    for weight, length in zip(found.weights, lengths, strict=True):
        assert abs(weight) * length <= max(length, median(lengths)) * (1 + 1e-6)


# --- traps ------------------------------------------------------------------------------------


@every_lora
def test_fedbuff_divides_by_the_number_of_updates_not_by_the_sum_of_discounts(lora):
    step = apply(make_rule("fedbuff"), stale_flush(make_lora_rule(lora)))
    expected = [(1 + s) ** -0.5 / 5 for s in (0, 2, 2, 2, 5)]
    assert step.weights == pytest.approx(expected)
    assert sum(step.weights) < 1.0


@every_lora
def test_fedasync_computes_its_mixing_rate_afresh_every_time(lora):
    rule = make_rule("fedasync")
    current = make_adapter(1)
    given = flush(
        current, [entry(0, moved(current, 2), current, staleness=3)], make_lora_rule(lora)
    )
    state = rule.init(current)
    seen = []
    for _ in range(5):
        state, step = aggregate(rule, state, given)
        seen.append(step.weights[0])
    assert seen == pytest.approx([0.6 * 4**-0.5] * 5)


def test_fedasync_lets_go_of_a_model_as_fast_at_once_as_one_after_the_other():
    # Two equal models: who came first cannot matter, so both ways must give the same.
    rule = make_rule("fedasync", discount="constant", mixing=0.5)
    current = make_adapter(1)
    model, base = moved(current, 2), moved(current, 9)
    entries = [entry(i, model, base, staleness=4) for i in range(2)]
    lora = make_lora_rule("factor")
    at_once = apply(rule, flush(current, entries, lora)).adapter
    in_turn = current
    for buffered in entries:
        in_turn = apply(rule, flush(in_turn, [buffered], lora)).adapter
    for dtype, buffer in at_once.buffers.items():
        torch.testing.assert_close(buffer, in_turn.buffers[dtype])


@every_lora
def test_fedasync_mixes_models_and_has_no_use_for_bases(lora):
    rule = make_rule("fedasync", mixing=0.5)
    current = make_adapter(1)
    models = [moved(current, seed) for seed in (2, 3)]

    def mixed(base_seed: int) -> Adapter:
        base = moved(current, base_seed, scale=0.5)
        entries = [entry(i, model, base, staleness=4) for i, model in enumerate(models)]
        return apply(rule, flush(current, entries, make_lora_rule(lora))).adapter

    assert_close(mixed(9), mixed(10))


def test_fedasync_keeps_no_update_until_its_flush():
    rule, lora = make_rule("fedasync"), make_lora_rule("factor")
    current = make_adapter(1)
    gathered = None
    for i in range(200):
        arrival = entry(i, moved(current, i), current)
        known = arrival.entry()
        gathered = rule.receive(gathered, known, arrival.update.adapter, arrival.base, lora)
    assert list(gathered.bases.values()) == [current]
    # What waits to be added in one pass is bounded by bytes, not by the buffer.
    assert gathered.total.waiting_bytes <= 1 << 20


@pytest.mark.parametrize(("case", "lora"), [p for p in PAIRS if not p[0].startswith("fedasync")])
def test_an_update_counts_from_the_base_of_its_own_not_from_the_current_model(case, lora):
    # Far from its base the server has moved on; an update that did nothing must do nothing.
    rule = CASES[case]()
    base = make_adapter(1)
    current = moved(base, 2, scale=1.0)
    given = flush(
        current,
        [entry(i, base, base, staleness=4) for i in range(2)],
        make_lora_rule(lora),
        calibrator=DistanceCalibrator(base),
    )
    assert_close(apply(rule, given).adapter, current, tolerance=1e-5)


@every_pair
def test_bf16_goes_in_and_comes_out(case, lora):
    given = stale_flush(make_lora_rule(lora), dtype=torch.bfloat16)
    step = apply(CASES[case](), given)
    assert_same_modules(step.adapter, given.adapter, lora)
    assert step.adapter.is_finite()
    exact = apply(CASES[case](), _in_fp32(given))
    assert step.weights == pytest.approx(exact.weights, rel=0.05, abs=0.01)
    # bf16 keeps 8 bits: each element is right to 2^-8 of itself, however many updates there are.
    assert product_norm(innovation(step.adapter, exact.adapter)) < 0.02 * product_norm(
        exact.adapter
    )


@every_pair
def test_a_flush_states_finite_notes_and_the_size_of_its_work(case, lora):
    given = stale_flush(make_lora_rule(lora))
    step = apply(CASES[case](), given)
    assert step.adapter.checksum != given.adapter.checksum
    assert len(step.weights) == len(given.updates)
    assert all(math.isfinite(value) for value in step.notes.values())
    assert step.work.bytes_moved >= given.adapter.size_bytes * len(given.updates)
    assert step.work.calibration_tokens % 40 == 0


@every_rule
def test_an_empty_flush_is_refused(case):
    rule = CASES[case]()
    with pytest.raises(RuleError, match=f"flush of version {VERSION} holds no updates"):
        apply(rule, flush(make_adapter(1), [], ProductSum()))


@every_pair
def test_a_rule_goes_on_from_a_checkpoint_as_if_nothing_had_happened(case, lora):
    rule = CASES[case]()
    given = stale_flush(make_lora_rule(lora))
    state = rule.init(given.adapter)
    for _ in range(2):
        state, step = aggregate(rule, state, given)
        given = dataclasses.replace(given, adapter=step.adapter)
    assert dataclasses.is_dataclass(state)
    codec = Codec(type(state))
    restored = codec.decode(codec.encode(state))
    expected_state, expected = aggregate(rule, state, given)
    found_state, found = aggregate(rule, restored, given)
    assert found.adapter.checksum == expected.adapter.checksum
    assert encoded(found_state) == encoded(expected_state)


@every_pair
def test_a_flush_leaves_the_state_before_it_as_it_was(case, lora):
    # The coordinator goes back to it when a step is not finite.
    rule = CASES[case]()
    given = stale_flush(make_lora_rule(lora))
    state, _ = aggregate(rule, rule.init(given.adapter), given)
    before = encoded(state)
    aggregate(rule, state, given)
    assert encoded(state) == before


def test_an_adapter_without_dense_tensors_or_without_lora_is_aggregated_too():
    only_dense = Adapter.pack({}, {"w": torch.zeros(4)})
    only_lora = Adapter.pack({"q": LoraFactors(torch.ones(2, 5), torch.zeros(4, 2), 2.0)})
    for current in (only_dense, only_lora):
        for case, lora in PAIRS:
            entries = [entry(i, moved(current, i + 1), current) for i in range(3)]
            step = apply(CASES[case](), flush(current, entries, make_lora_rule(lora)))
            assert_same_modules(step.adapter, current, lora)
            assert case == "alignfed paper" or step.adapter.checksum != current.checksum
    assert zeros_like(only_dense).checksum == only_dense.checksum


def _in_fp32(given: Given) -> Given:
    fp32 = torch.float32
    calibrator = given.calibrator
    assert isinstance(calibrator, DistanceCalibrator)
    return dataclasses.replace(
        given,
        adapter=given.adapter.to(fp32),
        calibrator=dataclasses.replace(calibrator, target=calibrator.target.to(fp32)),
        updates=tuple(
            dataclasses.replace(
                e,
                update=dataclasses.replace(e.update, adapter=e.update.adapter.to(fp32)),
                base=e.base.to(fp32),
            )
            for e in given.updates
        ),
    )
