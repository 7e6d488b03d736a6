import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from alignfed.errors import ModelError
from alignfed.training.loading import load_base
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.training.conftest import tiny_llama_config
from tests.training.samples import moved, reranked

# PEFT 0.21 still asks by the name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def warm(model_folder, folder, **changes):
    lora = replace(LoraSettings(4, 8.0, warm_start=str(folder)), **changes)
    return load_base(ModelSettings(str(model_folder)), lora, 0)


def saved_with(config, model_folder, folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    model.save_pretrained(folder)


def test_an_exported_adapter_is_continued_exactly(base, llama_folder, tmp_path):
    adapter = moved(base.initial_adapter())
    base.export(adapter, tmp_path, str(llama_folder))
    again = warm(llama_folder, tmp_path)
    assert again.initial_adapter().checksum == adapter.checksum
    assert again.adapter_parameters == base.adapter_parameters


def test_ranks_and_alphas_are_the_folder_s(base, llama_folder, tmp_path):
    names = list(base.initial_adapter().lora)
    mixed = reranked(base.initial_adapter(), {name: 1 + i % 3 for i, name in enumerate(names)})
    base.export(mixed, tmp_path, str(llama_folder))
    again = warm(llama_folder, tmp_path, rank=64, alpha=1.0)
    assert again.initial_adapter().checksum == mixed.checksum


def test_a_classifier_is_continued_with_its_head(classifier, bert_folder, tmp_path):
    adapter = moved(classifier.initial_adapter())
    classifier.export(adapter, tmp_path, str(bert_folder))
    again = load_base(classifier.settings, LoraSettings(4, 8.0, warm_start=str(tmp_path)), 9)
    assert again.initial_adapter().checksum == adapter.checksum


def test_plain_peft_s_own_adapter_is_continued(llama_folder, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved_with(config, llama_folder, tmp_path)
    adapter = warm(llama_folder, tmp_path).initial_adapter()
    assert {(one.rank, one.alpha) for one in adapter.lora.values()} == {(3, 5.0)}
    assert len(adapter.lora) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["embed_tokens"]}, "Embedding is no linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_is_not_plain_lora_is_refused_by_name(llama_folder, tmp_path, changes, message):
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes
    saved_with(LoraConfig(**settings), llama_folder, tmp_path)
    with pytest.raises(ModelError, match=message):
        warm(llama_folder, tmp_path)


def test_another_method_than_lora_is_refused(llama_folder, tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    saved_with(config, llama_folder, tmp_path)
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        warm(llama_folder, tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_refused(base, llama_folder, tmp_path, changes):
    base.export(base.initial_adapter(), tmp_path / "adapter", str(llama_folder))
    LlamaForCausalLM(tiny_llama_config(**changes)).save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit this base model"):
        warm(tmp_path / "other", tmp_path / "adapter")


def test_an_adapter_that_lacks_layers_is_refused(llama_folder, tmp_path):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(targets=("q_proj",)), 0)
    base.export(base.initial_adapter(), tmp_path / "adapter", str(llama_folder))
    LlamaForCausalLM(tiny_llama_config(num_hidden_layers=3)).save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="2 are missing"):
        warm(tmp_path / "other", tmp_path / "adapter")


def test_damaged_folders_are_refused(base, llama_folder, tmp_path):
    def refused(message):
        with pytest.raises(ModelError, match=message):
            warm(llama_folder, tmp_path / "a")

    refused("does not exist")
    (tmp_path / "a").mkdir()
    refused("no adapter_config.json")
    base.export(base.initial_adapter(), tmp_path / "a", str(llama_folder))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("damaged")
    weights.unlink()
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    refused("never opened")
    weights.write_bytes(whole)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    refused("cannot be read")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "WHAT"}))
    refused("cannot be read")
