"""Claims about updates that are compared as they arrive."""

import pytest
import torch

from alignfed.core.adapter import Adapter, inner_product
from alignfed.core.aggregation import carried_step, carrying, compared, make_rule
from alignfed.core.aggregation.transport import carry
from alignfed.core.lora import FactorMean, make_lora_rule
from alignfed.core.lora.factor import FactorSum
from alignfed.core.ports import ahead_of
from alignfed.journal import Codec
from tests.contract.flushes import Given, aggregate, arrived, entry, flush, stale_flush
from tests.core.adapters import make_adapter, moved

torch.set_num_threads(1)


def many(count: int = 23, *, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> Given:
    """Return uploads of four versions, arriving in turn."""
    current = make_adapter(1, dtype=dtype)
    bases = {age: moved(current, 50 + age, scale=0.3) if age else current for age in (0, 1, 3, 6)}
    ages = [(0, 1, 3, 6)[i % 4] for i in range(count)]
    return flush(
        current,
        [
            entry(i, moved(bases[age], 100 + i, scale=scale), bases[age], staleness=age)
            for i, age in enumerate(ages)
        ],
        FactorMean(),
    )


@pytest.mark.parametrize("lora", ["factor", "ffa", "fedsa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparing_ahead_changes_a_step_by_rounding_at_most(lora, dtype):
    rule, given = make_rule("alignfed"), many(dtype=dtype)
    given = flush(given.adapter, given.updates, make_lora_rule(lora))
    steps = []
    for ahead in (False, True):
        gathered, asked = arrived(rule, given, ahead=ahead)
        assert gathered.compared == (16 if ahead else 0)
        steps.append(rule.apply(rule.init(given.adapter), gathered, asked)[1])
    late, early = steps
    assert early.weights == pytest.approx(late.weights, rel=1e-5)
    assert early.notes == pytest.approx(late.notes, rel=1e-3, abs=1e-6)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for kind, buffer in late.adapter.buffers.items():
        torch.testing.assert_close(
            early.adapter.buffers[kind], buffer, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("ridge", [0.05, None])
@pytest.mark.parametrize("block", [1, 7, 1 << 15])
def test_inner_products_are_those_of_updates_carried_one_by_one(monkeypatch, ridge, block):
    monkeypatch.setattr(carrying, "BLOCK", block)
    monkeypatch.setattr(carrying, "SCRATCH", 3 * block)
    rule, given = make_rule("alignfed"), many(9, scale=0.5)
    gathered, asked = arrived(rule, given, ahead=False)
    compared.compare(gathered, given.adapter, ridge)
    found = compared.carried(gathered)
    kind = "none" if ridge is None else "rank"
    whole = carry(asked, list(gathered.pairs), kind=kind, ridge=0.05, max_positions=8)
    deltas = [_delta(*pair) for pair in whole.pairs]
    expected = torch.tensor([[inner_product(a, b) for b in deltas] for a in deltas])
    torch.testing.assert_close(found.gram.float(), expected, rtol=1e-4, atol=1e-4)
    if ridge is not None:
        assert min(found.shortened) < 1.0


def test_a_carried_update_is_never_longer_than_it_was():
    rule, given = make_rule("alignfed"), many(12, scale=0.5)
    gathered, _ = arrived(rule, given, ahead=False)
    compared.compare(gathered, given.adapter, 1e-3)
    lengths = compared.carried(gathered).gram.diagonal().sqrt()
    for length, known in zip(lengths.tolist(), gathered.entries, strict=True):
        assert length <= known.norm * (1 + 1e-5)


def test_the_step_is_the_weighted_sum_of_carried_updates():
    rule, given = make_rule("alignfed"), many(9, scale=0.5)
    gathered, asked = arrived(rule, given, ahead=True)
    compared.compare(gathered, given.adapter, 0.05)
    coefficients = [0.1 * (i + 1) for i in range(9)]
    shortened = compared.carried(gathered).shortened
    sums, notes = carried_step.step_of(gathered, coefficients, shortened, given.adapter)
    found = given.lora.move(given.adapter, FactorSum(sums), 1.0)
    whole = carry(asked, list(gathered.pairs), kind="rank", ridge=0.05, max_positions=8)
    terms = [(c, *pair) for c, pair in zip(coefficients, whole.pairs, strict=True)]
    expected = given.lora.combine(given.adapter, terms)
    for kind, buffer in expected.buffers.items():
        torch.testing.assert_close(found.buffers[kind], buffer, rtol=1e-4, atol=1e-4)
    assert 0.0 < notes["alignment_gain"] < 1.0


def test_buffers_are_compared_when_they_have_doubled():
    rule, given = make_rule("alignfed"), many(23)
    gathered, seen = None, []
    for one in given.updates:
        update, known = one.update.adapter, one.entry()
        gathered = rule.receive(gathered, known, update, one.base, given.lora)
        ahead_of(rule)(gathered, given.adapter, given.lora, given.calibrator)
        seen.append(gathered.compared)
    assert sorted(set(seen)) == [0, 4, 8, 16]
    assert all(2 * done > i for i, done in enumerate(seen) if i >= 3)


def test_what_was_compared_survives_a_checkpoint_to_the_bit():
    rule, given = make_rule("alignfed"), many(11)
    gathered, asked = arrived(rule, given, ahead=True)
    codec = Codec()
    again = codec.decode(codec.encode(gathered))
    steps = [rule.apply(rule.init(given.adapter), one, asked)[1] for one in (gathered, again)]
    assert steps[0].adapter.checksum == steps[1].adapter.checksum
    assert steps[0].weights == steps[1].weights


def test_rules_that_do_not_simply_add_factors_are_compared_at_the_flush():
    for lora in ("product", "fedrot"):
        rule, given = make_rule("alignfed"), stale_flush(make_lora_rule(lora), calibrated=False)
        gathered, _ = arrived(rule, given, ahead=True)
        assert gathered.compared == 0
        assert aggregate(rule, rule.init(given.adapter), given)[1].adapter.is_finite()


def _delta(update: Adapter, base: Adapter) -> Adapter:
    buffers = {kind: buffer - base.buffers[kind] for kind, buffer in update.buffers.items()}
    return Adapter(update.layout, buffers)
