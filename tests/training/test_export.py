"""What is exported is judged by plain transformers and PEFT, with nothing of ours."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from alignfed.errors import ModelError
from alignfed.training.loading import load_base
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.training.samples import moved, reranked

# PEFT 0.21 still asks by the name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXTS = ["1+2=", "a longer text, of two clauses."]


def ours(base):
    ids = [torch.tensor([base.tokenizer(text).input_ids]) for text in TEXTS]
    with torch.no_grad():
        return [base.peft_model(input_ids=one).logits for one in ids]


def plain(folder, loader, model_path, **options):
    model = PeftModel.from_pretrained(
        loader.from_pretrained(model_path, **options), str(folder)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in TEXTS]
    with torch.no_grad():
        return [model(input_ids=one).logits for one in ids]


def assert_equal(mine, others):
    # Not to the bit: our tensors are views at any offset, and a kernel may split a row elsewhere.
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_language_model_s_adapter_gives_the_same_logits_in_plain_peft(
    base, llama_folder, tmp_path
):
    base.export(moved(base.initial_adapter()), tmp_path, str(llama_folder))
    assert_equal(ours(base), plain(tmp_path, AutoModelForCausalLM, llama_folder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama_folder)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 8, {})
    assert config["target_modules"] == sorted(config["target_modules"])


def test_mixed_ranks_and_alphas_survive_the_export(base, llama_folder, tmp_path):
    names = list(base.initial_adapter().lora)
    ranks = {name: 1 + i % 5 for i, name in enumerate(names)}
    base.export(reranked(base.initial_adapter(), ranks), tmp_path, str(llama_folder))
    assert_equal(ours(base), plain(tmp_path, AutoModelForCausalLM, llama_folder))


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_classifier_s_head_travels_with_the_adapter(kind, tmp_path, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    base = load_base(
        ModelSettings(str(folder), task="sequence_classification", num_labels=5),
        LoraSettings(4, 8.0),
        0,
    )
    base.export(moved(base.initial_adapter()), tmp_path, str(folder))
    torch.manual_seed(99)  # a head drawn elsewhere must not matter
    others = plain(tmp_path, AutoModelForSequenceClassification, folder, num_labels=5)
    assert_equal(ours(base), others)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    adapter = base.read()
    assert set(adapter.dense) <= set(saved)
    assert len(saved) == len(adapter.dense) + 2 * len(adapter.lora)


def test_a_module_trained_whole_beside_the_head_travels_too(bert_without_pooler_folder, tmp_path):
    folder = bert_without_pooler_folder
    base = load_base(
        ModelSettings(str(folder), task="sequence_classification", num_labels=5),
        LoraSettings(4, 8.0, modules_to_save=("pooler",)),
        0,
    )
    base.export(moved(base.initial_adapter()), tmp_path, str(folder))
    torch.manual_seed(99)
    others = plain(tmp_path, AutoModelForSequenceClassification, folder, num_labels=5)
    assert_equal(ours(base), others)


def test_exporting_twice_gives_the_same_files(base, llama_folder, tmp_path):
    adapter = moved(base.initial_adapter())
    base.export(adapter, tmp_path / "a", "base")
    base.export(reranked(adapter, {}), tmp_path / "b", "base")
    base.export(adapter, tmp_path / "b", "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_that_cannot_be_written_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        base.export(base.initial_adapter(), tmp_path / "file", "base")
