from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig

from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.errors import RecipeError
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.evaluate import EvaluationSettings, HeldOutEvaluator
from alignfed.training.generate import generate
from alignfed.training.loading import load_base
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.templates import Example, TemplateSettings
from tests.training.samples import TEMPLATE, federated, moved, sums, texts


def evaluator(base, data=None, **changes):
    settings = EvaluationSettings(**({"max_new_tokens": 8} | changes))
    if base.is_classifier:
        encoder = Encoder(base, TemplateSettings("{text}"), 64)
        return HeldOutEvaluator(base, encoder, data or federated(texts), settings)
    return HeldOutEvaluator(base, Encoder(base, TEMPLATE, 64), data or federated(), settings)


def one_by_one(base, adapter, examples):
    """Summed loss and scored tokens, an example at a time through PEFT's own forward."""
    base.install(adapter)
    sequences = Encoder(base, TEMPLATE, 64).encode(examples)
    total, count = 0.0, 0
    for row in range(len(sequences)):
        ids = torch.from_numpy(sequences[row].astype("int64"))[None]
        first = int(sequences.prompt_lengths[row])
        with torch.no_grad():
            logits = base.peft_model(input_ids=ids).logits[0, first - 1 : -1]
        total += float(functional.cross_entropy(logits, ids[0, first:], reduction="sum"))
        count += ids.shape[1] - first
    return total, count


def transformers_says(base, prompt, max_new_tokens):
    """One prompt continued greedily by transformers' own generation."""
    ids = torch.from_numpy(prompt.astype("int64"))[None]
    wanted = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=base.eos_id,
        pad_token_id=base.pad_id,
    )
    said = base.peft_model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=wanted
    )[0, ids.shape[1] :].tolist()
    return said[: said.index(base.eos_id)] if base.eos_id in said else said


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 4096])
def test_the_loss_weighs_every_scored_token_alike_whatever_the_batches(base, tokens_per_batch):
    data = federated()
    adapter = moved(base.initial_adapter())
    result = evaluator(base, tokens_per_batch=tokens_per_batch).evaluate(adapter, with_score=False)
    total, count = one_by_one(base, adapter, data.evaluation)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.num_examples == 12
    assert result.score is None


def test_each_client_is_scored_on_its_own_slice(base):
    data = federated(clients=4)
    empty = replace(data.clients[2], held_out=())
    data = replace(data, clients={**data.clients, 2: empty})
    adapter = moved(base.initial_adapter())
    results = evaluator(base, data).evaluate_clients(adapter)
    assert set(results) == {0, 1, 3}
    for client_id, result in results.items():
        total, count = one_by_one(base, adapter, data.clients[client_id].held_out)
        assert result.loss == pytest.approx(total / count, rel=1e-5)
        assert result.num_examples == 4


def test_clients_without_slices_give_no_results(base):
    data = replace(federated(), clients={0: ClientData("a", sums(0, 3), ())})
    assert evaluator(base, data).evaluate_clients(base.initial_adapter()) == {}


@pytest.mark.parametrize("kind", ["bert_folder", "roberta_folder", "llama_folder"])
def test_a_classifier_is_scored_by_text_and_by_accuracy(kind, request):
    base = load_base(
        ModelSettings(
            str(request.getfixturevalue(kind)), task="sequence_classification", num_labels=5
        ),
        LoraSettings(4, 8.0),
        3,
    )
    data = federated(texts)
    adapter = moved(base.initial_adapter())
    result = evaluator(base, data, scorer="accuracy", tokens_per_batch=50).evaluate(
        adapter, with_score=True
    )
    base.install(adapter)
    losses, right = [], []
    for example in data.evaluation:
        ids = torch.tensor([base.tokenizer(example.prompt).input_ids])
        with torch.no_grad():
            logits = base.peft_model(input_ids=ids).logits
        losses.append(float(functional.cross_entropy(logits, torch.tensor([example.label]))))
        right.append(int(logits.argmax()) == example.label)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.score == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_batched_generation_says_what_transformers_says_one_by_one(base, tokens_per_batch):
    adapter = moved(base.initial_adapter(), size=0.3)
    base.install(adapter)
    prompts = Encoder(base, TEMPLATE, 64).encode_prompts(sums(0, 14), room=8)
    got = generate(base, prompts, 8, tokens_per_batch)
    assert got == [transformers_says(base, prompts[row], 8) for row in range(14)]
    assert len({tuple(tokens) for tokens in got}) > 1


def test_generation_ends_at_the_end_token(base):
    # A head that always prefers the end token: nothing is said at all.
    head = base.peft_model.get_base_model().lm_head.weight
    prompts = Encoder(base, TEMPLATE, 64).encode_prompts(sums(0, 3), room=8)
    calls = []
    handle = base.peft_model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        head.zero_()
        base.stop_ids = frozenset({0})  # equal logits: the first token wins
        assert generate(base, prompts, 8, 4096) == [[], [], []]
    handle.remove()
    assert len(calls) == 1


@pytest.fixture
def learned(base):
    """A base and an adapter that has learned a few answers by heart."""
    examples = tuple(Example(f"{letter}=", letter.upper() * 2) for letter in "abcdef")
    clients = {0: ClientData("one", examples, ())}
    data = replace(federated(), clients=clients, evaluation=examples)
    trainer = LocalTrainer(
        base,
        Encoder(base, TEMPLATE, 64),
        clients,
        LocalSettings(steps=150, batch_size=6, learning_rate=2e-2),
        0,
    )
    (result,) = trainer.train([TrainingJob(Task(0, 0, 0, 0), base.initial_adapter())])
    return base, data, result.adapter


def test_what_was_learned_by_heart_matches_exactly(learned):
    base, data, adapter = learned
    subject = evaluator(base, data, scorer="exact_match")
    assert subject.evaluate(base.initial_adapter(), with_score=True).score == 0.0
    assert subject.evaluate(adapter, with_score=True).score == 1.0
    assert subject.evaluate(adapter, with_score=False).score is None


def test_only_the_examples_asked_for_are_generated_for(learned):
    base, data, adapter = learned
    mixed = replace(data, evaluation=(*data.evaluation[:3], *sums(0, 3)))
    first_three = evaluator(base, mixed, scorer="exact_match", score_examples=3)
    assert first_three.evaluate(adapter, with_score=True).score == 1.0
    every = evaluator(base, mixed, scorer="exact_match")
    assert every.evaluate(adapter, with_score=True).score == pytest.approx(0.5)


def test_scorers_that_do_not_fit_the_task_are_refused(base, classifier):
    for subject, scorer in ((base, "accuracy"), (classifier, "exact_match"), (classifier, "gsm8k")):
        with pytest.raises(RecipeError, match="does not fit"):
            evaluator(subject, scorer=scorer)


@pytest.mark.parametrize(
    "changes",
    [{"scorer": "bleu"}, {"max_new_tokens": 0}, {"score_examples": 0}, {"tokens_per_batch": 0}],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(RecipeError):
        EvaluationSettings(**changes)
