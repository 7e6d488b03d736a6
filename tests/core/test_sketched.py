"""Claims about AlignFed on adapters large enough to be compared by sketches."""

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.aggregation import carried_step, compared, make_rule
from alignfed.core.aggregation.compared import is_sketched
from alignfed.core.lora import FactorMean, make_lora_rule
from alignfed.core.lora.factor import FactorSum
from alignfed.core.ports import ahead_of
from alignfed.journal import Codec
from tests.contract.flushes import Given, arrived, entry, flush
from tests.core.adapters import moved

torch.set_num_threads(1)

BUCKETS = 1 << 14
"""Cosines are then known to 0.01."""


def large(seed: int) -> Adapter:
    """Return an adapter of 131,000 parameters and a dense head: eight times as many as buckets."""
    generator = torch.Generator().manual_seed(seed)
    lora = {
        f"layers.{i}": LoraFactors(
            torch.randn(8, 2048, generator=generator) / 45,
            torch.randn(2048, 8, generator=generator) / 45,
            16.0,
        )
        for i in range(4)
    }
    return Adapter.pack(lora, {"head": torch.randn(10, 64, generator=generator) / 8})


def turned(adapter: Adapter, seed: int) -> Adapter:
    """Return the adapter with its directions mixed: what alignment undoes."""
    generator = torch.Generator().manual_seed(seed)
    found = Adapter(adapter.layout, {k: b.clone() for k, b in adapter.buffers.items()})
    for name, factors in found.lora.items():
        old, mixing = adapter.lora[name], 0.1 * torch.randn(2, 8, 8, generator=generator)
        factors.a.add_(mixing[0] @ old.a)
        factors.b.add_(old.b @ mixing[1])
    return found


def many(count: int = 14, lora=None, *, scale: float = 0.01) -> Given:
    """Return uploads of three versions, arriving in turn; every other one agrees with the rest."""
    current = large(1)
    bases = {0: current, 1: turned(current, 51), 4: turned(current, 54)}
    said = moved(Adapter(current.layout, _zeros(current)), 77, scale=scale)
    arrivals = []
    for i in range(count):
        base = bases[(0, 1, 4)[i % 3]]
        update = moved(base, 100 + i, scale=scale)
        if i % 2:
            update = Adapter(
                current.layout, {k: b + said.buffers[k] for k, b in update.buffers.items()}
            )
        arrivals.append(entry(i, update, base, staleness=(0, 1, 4)[i % 3]))
    return flush(current, arrivals, lora or FactorMean())


def step_of(given: Given, **settings):
    rule = make_rule("alignfed", **settings)
    gathered, asked = arrived(rule, given, ahead=True)
    return rule.apply(rule.init(given.adapter), gathered, asked)[1]


def test_small_adapters_are_compared_exactly():
    given = many(6)
    count = sum(given.adapter.layout.sizes.values())
    assert is_sketched(given.adapter, BUCKETS)
    assert not is_sketched(given.adapter, count // 8 + 1)
    assert not is_sketched(given.adapter, 0)
    rule = make_rule("alignfed")
    gathered, asked = arrived(rule, given, ahead=True)
    assert not gathered.sketches
    assert gathered.compared == 4
    default = rule.apply(rule.init(given.adapter), gathered, asked)[1]
    exact = step_of(given, sketch_buckets=0)
    assert default.adapter.checksum == exact.adapter.checksum
    assert default.weights == exact.weights


@pytest.mark.parametrize("lora", ["factor", "ffa", "fedsa"])
def test_a_step_by_sketches_is_close_to_the_exact_one(lora):
    given = many(lora=make_lora_rule(lora))
    exact, sketched = (step_of(given, sketch_buckets=count) for count in (0, BUCKETS))
    assert min(exact.weights) < 0.5 * max(exact.weights)
    assert sketched.weights == pytest.approx(exact.weights, abs=0.03)
    assert sketched.notes["step_norm"] == pytest.approx(exact.notes["step_norm"], rel=0.03)
    # Nothing was to be gained under FFA-LoRA: A is the same in every version.
    gains = [step.notes.get("alignment_gain", 0.0) for step in (sketched, exact)]
    assert gains[0] == pytest.approx(gains[1], rel=0.02)
    (moves, expected) = (
        step.adapter.buffers[torch.float32] - given.adapter.buffers[torch.float32]
        for step in (sketched, exact)
    )
    assert float((moves - expected).norm()) < 0.03 * float(expected.norm())


def test_every_upload_is_sketched_when_it_arrives_and_never_again():
    rule, given = make_rule("alignfed", sketch_buckets=BUCKETS), many(5)
    gathered, before = None, []
    for one in given.updates:
        gathered = rule.receive(gathered, one.entry(), one.update.adapter, one.base, given.lora)
        ahead_of(rule)(gathered, given.adapter, given.lora, given.calibrator)
        assert all(a is b for a, b in zip(before, gathered.sketches, strict=False))
        before = list(gathered.sketches)
        assert len(before) == len(gathered.entries)
    assert gathered.grams is None


def test_sketching_at_the_flush_gives_the_same_bits():
    rule, given = make_rule("alignfed", sketch_buckets=BUCKETS), many()
    steps = []
    for ahead in (False, True):
        gathered, asked = arrived(rule, given, ahead=ahead)
        steps.append(rule.apply(rule.init(given.adapter), gathered, asked)[1])
    assert steps[0].weights == steps[1].weights
    assert steps[0].adapter.checksum == steps[1].adapter.checksum


def test_sketches_survive_a_checkpoint_to_the_bit():
    rule, given = make_rule("alignfed", sketch_buckets=BUCKETS), many()
    whole, asked = arrived(rule, given, ahead=True)
    cut = Given(**{**vars(given), "updates": given.updates[:8]})
    codec = Codec()
    resumed = codec.decode(codec.encode(arrived(rule, cut, ahead=True)[0]))
    for one in given.updates[8:]:
        resumed = rule.receive(resumed, one.entry(), one.update.adapter, one.base, given.lora)
        ahead_of(rule)(resumed, given.adapter, given.lora, given.calibrator)
    steps = [rule.apply(rule.init(given.adapter), one, asked)[1] for one in (whole, resumed)]
    assert steps[0].weights == steps[1].weights
    assert steps[0].adapter.checksum == steps[1].adapter.checksum


def test_a_sketched_update_keeps_its_exact_length_or_less():
    rule, given = make_rule("alignfed", sketch_buckets=BUCKETS), many(12)
    gathered, _ = arrived(rule, given, ahead=True)
    compared.compare_sketches(gathered)
    lengths = compared.carried(gathered).gram.diagonal().sqrt()
    for length, known in zip(lengths.tolist(), gathered.entries, strict=True):
        assert length <= known.norm * (1 + 1e-6)
        if known.staleness == 0:
            assert length == pytest.approx(known.norm, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 3e-5, 1e-6])
def test_updates_far_smaller_than_their_base_have_their_angles(scale):
    """As long as fp32 can hold the update itself."""
    given = many(6, scale=scale)
    grams = []
    for settings in ({"sketch_buckets": 0}, {"sketch_buckets": BUCKETS}):
        rule = make_rule("alignfed", alignment=False, **settings)
        gathered, _ = arrived(rule, given, ahead=True)
        if gathered.sketches:
            compared.compare_sketches(gathered)
        else:
            compared.compare(gathered, given.adapter, None)
        gram = compared.carried(gathered).gram
        lengths = gram.diagonal().sqrt()
        grams.append(gram / lengths[:, None] / lengths)
    assert float((grams[0] - grams[1]).abs().max()) < 4 * (2 / BUCKETS) ** 0.5
    assert float((grams[0] - torch.eye(6)).abs().max()) > 0.4  # some do agree


def test_the_step_of_sketched_updates_is_the_weighted_sum_of_carried_ones():
    rule, given = make_rule("alignfed", sketch_buckets=BUCKETS), many(14)
    gathered, _ = arrived(rule, given, ahead=True)
    compared.compare_sketches(gathered)
    shortened = compared.carried(gathered).shortened
    coefficients = [0.1 * (i % 5) for i in range(14)]
    moves = []
    for sketches in (gathered.sketches, []):  # without them every difference is taken by itself
        gathered.sketches = sketches
        sums, _ = carried_step.step_of(gathered, coefficients, shortened, given.adapter)
        moves.append(given.lora.move(given.adapter, FactorSum(sums), 1.0).buffers[torch.float32])
    torch.testing.assert_close(*moves, rtol=1e-5, atol=1e-7)


def test_what_no_client_moved_stays_to_the_bit():
    given = many(9)
    for one in given.updates:
        for name, factors in one.update.adapter.lora.items():
            factors.a.copy_(one.base.lora[name].a)
    step = step_of(given, sketch_buckets=BUCKETS)
    for name, factors in given.adapter.lora.items():
        assert torch.equal(step.adapter.lora[name].a, factors.a)
        assert not torch.equal(step.adapter.lora[name].b, factors.b)


def _zeros(adapter: Adapter) -> dict[torch.dtype, torch.Tensor]:
    return {k: torch.zeros_like(b) for k, b in adapter.buffers.items()}
