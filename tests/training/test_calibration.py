import pytest
import torch

from alignfed.errors import DataError
from alignfed.training.calibration import CalibrationBatch
from alignfed.training.encoding import Encoder
from alignfed.training.evaluate import EvaluationSettings, HeldOutEvaluator
from alignfed.training.templates import TemplateSettings
from tests.training.samples import TEMPLATE, federated, moved, sums, texts

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def calibration(base, **options):
    if base.is_classifier:
        encoder = Encoder(base, TemplateSettings("{text}"), 64)
        return CalibrationBatch(base, encoder, texts(0, 7), **options)
    return CalibrationBatch(base, Encoder(base, TEMPLATE, 64), sums(0, 7), **options)


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_the_loss_is_the_evaluator_s(kind, request):
    base = request.getfixturevalue(kind)
    adapter = moved(base.initial_adapter())
    make = texts if base.is_classifier else sums
    template = TemplateSettings("{text}") if base.is_classifier else TEMPLATE
    data = federated(make)
    encoder = Encoder(base, template, 64)
    expected = HeldOutEvaluator(base, encoder, data, EvaluationSettings()).evaluate(
        adapter, with_score=False
    )
    subject = CalibrationBatch(base, encoder, data.evaluation, tokens_per_batch=40)
    assert subject.loss(adapter) == pytest.approx(expected.loss, rel=1e-5)


def test_inputs_are_named_as_the_adapter_names_and_leave_filler_out(base):
    adapter = moved(base.initial_adapter())
    subject = calibration(base)
    inputs = subject.inputs(adapter)
    lengths = Encoder(base, TEMPLATE, 64).encode(sums(0, 7)).lengths
    assert set(inputs) == set(adapter.lora)
    for name, factors in adapter.lora.items():
        assert inputs[name].shape == (lengths.sum(), factors.a.shape[1])
    assert subject.tokens > lengths.sum()


def test_inputs_are_what_the_layer_sees(base):
    adapter = moved(base.initial_adapter())
    (example,) = sums(3, 1)
    subject = CalibrationBatch(base, Encoder(base, TEMPLATE, 64), [example])
    got = subject.inputs(adapter)
    ids = torch.tensor([Encoder(base, TEMPLATE, 64).encode([example])[0].tolist()])
    with torch.no_grad():
        states = base.peft_model.get_base_model().model(input_ids=ids, output_hidden_states=True)
        layer = base.peft_model.get_base_model().model.layers[1]
        expected = layer.input_layernorm(states.hidden_states[1])[0]
    torch.testing.assert_close(got[Q_PROJ], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        subject.features(adapter), states.last_hidden_state[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("tokens_per_batch", [20, 4096])
def test_positions_are_limited_and_the_same_for_every_adapter(base, tokens_per_batch):
    options = {"tokens_per_batch": tokens_per_batch}
    every = calibration(base, **options)
    some = calibration(base, max_positions=10, **options)
    first = base.initial_adapter()
    assert some.features(first).shape == (10, 32)
    whole, part = every.inputs(first)[Q_PROJ], some.inputs(first)[Q_PROJ]
    at = torch.linspace(0, len(whole) - 1, 10).round().long()
    assert torch.equal(part, whole[at])
    moved_whole = every.inputs(moved(first))[Q_PROJ]
    torch.testing.assert_close(some.inputs(moved(first))[Q_PROJ], moved_whole[at])


def test_a_classifier_gives_features_a_text_and_inputs_a_position(classifier):
    adapter = classifier.initial_adapter()
    subject = calibration(classifier)
    lengths = Encoder(classifier, TemplateSettings("{text}"), 64).encode(texts(0, 7)).lengths
    assert subject.features(adapter).shape == (7, 32)
    inputs = subject.inputs(adapter)
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert inputs[query].shape == (lengths.sum(), 32)
    assert inputs["base_model.model.bert.pooler.dense"].shape == (7, 32)


def test_looking_twice_gives_the_same_numbers(base):
    adapter = moved(base.initial_adapter())
    subject = calibration(base)
    first = subject.loss(adapter), subject.features(adapter)
    subject.inputs(moved(adapter))
    assert subject.loss(adapter) == first[0]
    assert torch.equal(subject.features(adapter), first[1])


def test_an_empty_calibration_set_is_refused(base):
    encoder = Encoder(base, TEMPLATE, 64)
    with pytest.raises(DataError, match="empty"):
        CalibrationBatch(base, encoder, [])
    with pytest.raises(DataError, match="max_positions"):
        CalibrationBatch(base, encoder, sums(0, 2), max_positions=0)
