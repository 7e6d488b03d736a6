"""The same code on real text and a real pretrained model; skipped where they are not at hand."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.errors import DataError
from alignfed.training.data import DataSettings
from alignfed.training.encoding import Encoder
from alignfed.training.evaluate import EvaluationSettings, HeldOutEvaluator
from alignfed.training.federate import load_data
from alignfed.training.loading import load_base
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.partition import PartitionSettings
from alignfed.training.scorers import final_answer, gsm8k
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.templates import TemplateSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ALPACA = TemplateSettings("{instruction}[[\nContext: {context}]]\nAnswer:", " {response}")


def dolly(shared_folder, **changes):
    settings = {
        "path": str(shared_folder / "data" / "dolly15k_10clients"),
        "clients": "local_training_*.json",
        "evaluation": "global_test.json",
        "calibration_examples": 16,
    } | changes
    return load_data(DataSettings(**settings), ALPACA, PartitionSettings("files"))


def test_ten_dolly_clients_come_with_their_files_and_a_common_test(shared_folder):
    data = dolly(shared_folder)
    assert [client.name for client in data.clients.values()] == [
        f"local_training_{i}" for i in range(10)
    ]
    sizes = [len(client.train) + len(client.held_out) for client in data.clients.values()]
    assert sum(sizes) + data.removed == 14931
    assert (len(data.evaluation), len(data.calibration)) == (64, 16)
    prompts = [one.prompt for one in data.clients[0].train]
    assert any("\nContext: " in prompt for prompt in prompts)
    assert not any("\n\nAnswer:" in prompt for prompt in prompts if "Context" not in prompt)


def test_a_misspelt_dolly_column_names_the_right_one(shared_folder):
    template = TemplateSettings("{instructions}", "{response}")
    settings = DataSettings(
        str(shared_folder / "data" / "dolly15k_10clients"),
        clients="local_training_0.json",
        evaluation="global_test.json",
    )
    with pytest.raises(DataError, match="did you mean 'instruction'"):
        load_data(settings, template, PartitionSettings("files"))


def test_a_pretrained_llama_learns_from_a_dolly_client_and_exports_the_same_loss(
    shared_folder, tmp_path
):
    path = shared_folder / "models" / "stories260K"
    data = dolly(shared_folder, max_examples_per_client=60, evaluation_examples=12)
    base = load_base(ModelSettings(str(path)), LoraSettings(4, 8.0), 0)
    encoder = Encoder(base, ALPACA, 96)
    local = LocalSettings(steps=25, batch_size=8, learning_rate=3e-3)
    trainer = LocalTrainer(base, encoder, data.clients, local, 0)
    evaluator = HeldOutEvaluator(base, encoder, data, EvaluationSettings())
    before = evaluator.evaluate(base.initial_adapter(), with_score=False).loss
    (result,) = trainer.train([TrainingJob(Task(0, 1, 0, 0), base.initial_adapter())])
    after = evaluator.evaluate(result.adapter, with_score=False).loss
    assert 3.5 < before < 6.3  # knows English letters: better than uniform, log 512 = 6.24
    assert after < 0.9 * before

    base.export(result.adapter, tmp_path, str(path))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    total = count = 0.0
    for example in data.evaluation:
        prompt = tokenizer(example.prompt, add_special_tokens=False).input_ids
        response = tokenizer(example.response, add_special_tokens=False).input_ids
        scored = [*response, tokenizer.eos_token_id][:95]
        room = 96 - len(scored) - 1
        kept = prompt[len(prompt) - room :] if len(prompt) > room else prompt
        ids = torch.tensor([[tokenizer.bos_token_id, *kept, *scored]])
        labels = ids.clone()
        labels[:, : 1 + len(kept)] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(scored)
        count += len(scored)
    assert total / count == pytest.approx(after, rel=1e-5)


def test_banking77_is_dealt_by_label_and_classified(shared_folder):
    settings = DataSettings(
        str(shared_folder / "data" / "banking77"),
        train="train.csv",
        evaluation="test.csv",
        label_column="category",
        calibration_examples=77,
        evaluation_examples=200,
        max_examples_per_client=60,
    )
    template = TemplateSettings("{text}")
    deal = PartitionSettings("dirichlet", 20, alpha=0.1, column="category", min_size=5)
    data = load_data(settings, template, deal)
    assert len(data.label_names) == 77
    labels = [len({one.label for one in client.train}) for client in data.clients.values()]
    assert sum(labels) / len(labels) < 40
    base = load_base(
        ModelSettings(
            str(shared_folder / "models" / "stories260K"),
            task="sequence_classification",
            num_labels=77,
            label_names=data.label_names,
        ),
        LoraSettings(4, 8.0),
        0,
    )
    encoder = Encoder(base, template, 64)
    evaluator = HeldOutEvaluator(base, encoder, data, EvaluationSettings("accuracy"))
    result = evaluator.evaluate(base.initial_adapter(), with_score=True)
    assert result.num_examples == 200
    assert 0 <= result.score < 0.1  # nothing learned yet: chance is 1.3 %
    local = LocalSettings(steps=20, batch_size=8, learning_rate=5e-3)
    trainer = LocalTrainer(base, encoder, data.clients, local, 0)
    (trained,) = trainer.train([TrainingJob(Task(0, 3, 0, 0), base.initial_adapter())])
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"]


def test_gsm8k_references_all_have_a_final_answer_that_matches_itself(shared_folder):
    settings = DataSettings(
        str(shared_folder / "data" / "gsm8k"), train="train.jsonl", evaluation="test.jsonl"
    )
    template = TemplateSettings("Question: {question}\nAnswer:", " {answer}")
    data = load_data(settings, template, PartitionSettings("iid", 10))
    assert len(data.evaluation) == 1319
    for example in data.evaluation:
        assert final_answer(example.response) is not None
        assert gsm8k(example.response, example.response)
        assert not gsm8k(example.response.replace("#### ", "#### 1"), example.response)


def test_every_shakespeare_speaker_is_a_client(shared_folder):
    settings = DataSettings(
        str(shared_folder / "data" / "tinyshakespeare" / "by_speaker.jsonl"),
        explode="speeches",
        calibration_examples=32,
        evaluation_examples=100,
    )
    template = TemplateSettings("{speaker}:", " {speeches}")
    deal = PartitionSettings("natural", 50, column="speaker", min_size=20)
    data = load_data(settings, template, deal)
    assert len(data.clients) == 50
    for client in data.clients.values():
        assert {one.prompt for one in client.train} == {f"{client.name}:"}
