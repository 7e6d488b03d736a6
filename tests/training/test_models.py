from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.errors import ModelError
from alignfed.training.loading import load_base
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.training.conftest import VOCAB_SIZE
from tests.training.samples import moved, reranked

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(base, text="1+2="):
    ids = torch.tensor([base.tokenizer(text).input_ids])
    with torch.no_grad():
        return base.peft_model(input_ids=ids).logits


def test_names_are_peft_s_own_without_the_adapter_s(base):
    adapter = base.initial_adapter()
    assert Q_PROJ in adapter.lora
    assert len(adapter.lora) == 2 * 7
    assert adapter.dense == {}
    assert adapter.lora[Q_PROJ].a.shape == (4, 32)
    assert adapter.lora[Q_PROJ].alpha == 8.0


def test_the_initial_adapter_changes_nothing_and_can_learn(base):
    for factors in base.initial_adapter().lora.values():
        assert factors.b.abs().max() == 0
        assert factors.a.abs().min(dim=1).values.max() > 0
    with base.peft_model.disable_adapter():
        untouched = logits(base)
    assert torch.equal(logits(base), untouched)


def test_installing_and_reading_gives_the_same_bits(base):
    adapter = moved(base.initial_adapter())
    base.install(adapter)
    assert base.read().checksum == adapter.checksum


def test_what_is_read_does_not_change_with_the_next_install(base):
    first = moved(base.initial_adapter(), seed=1)
    base.install(first)
    kept = base.read()
    base.install(moved(base.initial_adapter(), seed=2))
    assert kept.checksum == first.checksum
    assert base.initial_adapter().checksum != kept.checksum


def test_the_base_is_frozen_and_only_the_adapter_trains(base):
    trained = {name for name, one in base.peft_model.named_parameters() if one.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert base.adapter_parameters == sum(
        one.numel() for one in base.peft_model.parameters() if one.requires_grad
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(1, 9), min_size=14, max_size=14), st.integers(0, 99))
def test_any_mix_of_ranks_is_computed_as_its_products_say(base, ranks, seed):
    names = list(base.initial_adapter().lora)
    mixed = reranked(base.initial_adapter(), dict(zip(names, ranks, strict=True)), seed)
    base.install(mixed)
    assert base.read().checksum == mixed.checksum
    got = logits(base)
    # The same products at one rank: zero rows and columns at the end, alpha in the same ratio.
    padded = Adapter.pack(
        {
            name: LoraFactors(
                torch.cat([one.a, torch.zeros(9 - one.rank, one.a.shape[1])]),
                torch.cat([one.b, torch.zeros(one.b.shape[0], 9 - one.rank)], dim=1),
                one.scale * 9,
            )
            for name, one in mixed.lora.items()
        }
    )
    base.install(padded)
    torch.testing.assert_close(logits(base), got, rtol=1e-4, atol=1e-5)


def test_a_bf16_adapter_is_computed_in_fp32_and_read_back_as_it_came(base):
    short = moved(base.initial_adapter()).to(torch.bfloat16)
    base.install(short)
    assert base.values.dtype == torch.float32
    assert base.read(like=short.layout).checksum == short.checksum


def test_an_adapter_of_other_modules_is_refused(base, classifier):
    with pytest.raises(ModelError, match="is missing"):
        base.install(classifier.initial_adapter())
    adapter = base.initial_adapter()
    wide = {
        name: LoraFactors(torch.ones(4, 33), one.b, 8.0) if name == Q_PROJ else one
        for name, one in adapter.lora.items()
    }
    with pytest.raises(ModelError, match="in_dim=33"):
        base.install(Adapter.pack(wide))
    base.install(adapter)  # a refusal leaves the base usable


def test_the_seed_alone_decides_the_initial_adapter(llama_folder):
    def first(seed):
        torch.manual_seed(torch.seed())
        base = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), seed)
        return base.initial_adapter().checksum

    assert first(5) == first(5)
    assert first(5) != first(6)


def test_loading_leaves_the_global_generator_alone(llama_folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 0)
    assert torch.equal(torch.rand(3), expected)


def test_architecture_says_what_the_model_is(base):
    sizes = base.architecture
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads) == (32, 2, 4)
    assert (sizes.num_key_value_heads, sizes.intermediate_size) == (2, 48)
    assert (sizes.vocab_size, sizes.max_positions) == (VOCAB_SIZE, 128)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    matrices = 2 * (attention + 3 * 32 * 48) + 32 * VOCAB_SIZE
    assert sizes.matrix_parameters == matrices
    assert base.num_parameters == matrices + 32 * VOCAB_SIZE + 5 * 32
    assert sizes.weight_bytes == 4 * base.num_parameters


def test_tied_embeddings_are_stored_once_and_multiplied_once(tmp_path, llama_folder):
    from transformers import AutoTokenizer, LlamaForCausalLM

    from tests.training.conftest import tiny_llama_config

    LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    tied = load_base(ModelSettings(str(tmp_path)), LoraSettings(4, 8.0), 0).architecture
    untied = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 0).architecture
    assert tied.matrix_parameters == untied.matrix_parameters
    assert tied.num_parameters == untied.num_parameters - 32 * VOCAB_SIZE


def test_a_frozen_parameter_costs_four_flops_a_token_and_a_trained_one_six(base):
    adapter = base.initial_adapter()
    matrices, trained = base.architecture.matrix_parameters, base.adapter_parameters
    assert base.training_flops_per_token(adapter) == 4 * matrices + 6 * trained
    assert base.forward_flops_per_token(adapter) == 2 * matrices + 2 * trained
    assert base.forward_flops_per_token(None) == 2 * matrices


def test_checkpointing_costs_one_more_forward_pass(llama_folder):
    def cost(on):
        model = ModelSettings(str(llama_folder), gradient_checkpointing=on)
        base = load_base(model, LoraSettings(4, 8.0), 0)
        adapter = base.initial_adapter()
        return base.training_flops_per_token(adapter), base.forward_flops_per_token(adapter)

    (without, forward), (with_it, _) = cost(False), cost(True)
    assert with_it == without + forward


def test_the_head_of_a_classifier_is_trained_whole(classifier):
    adapter = classifier.initial_adapter()
    assert set(adapter.dense) == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    assert adapter.dense["base_model.model.classifier.weight"].shape == (5, 32)
    changed = moved(adapter)
    classifier.install(changed)
    assert classifier.read().checksum == changed.checksum


def test_targets_may_be_named(llama_folder):
    lora = LoraSettings(2, 4.0, targets=("q_proj", "v_proj"))
    base = load_base(ModelSettings(str(llama_folder)), lora, 0)
    assert {name.rpartition(".")[2] for name in base.initial_adapter().lora} == {"q_proj", "v_proj"}


def test_a_bf16_base_keeps_an_fp32_adapter(llama_folder):
    base = load_base(ModelSettings(str(llama_folder), dtype="bfloat16"), LoraSettings(4, 8.0), 3)
    plain = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 3)
    assert set(base.initial_adapter().buffers) == {torch.float32}
    assert base.initial_adapter().layout == plain.initial_adapter().layout
    assert base.architecture.weight_bytes * 2 == plain.architecture.weight_bytes
    assert base.peft_model.get_base_model().lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "translation"},
        {"dtype": "int8"},
        {"device": "tpu"},
        {"quantization": "8bit"},
        {"quantization": "4bit", "device": "cpu"},
        {"task": "sequence_classification"},
        {"task": "sequence_classification", "num_labels": 3, "label_names": ("a", "b")},
    ],
)
def test_impossible_model_settings_are_refused(changes):
    with pytest.raises(ModelError):
        ModelSettings("some/model", **changes)


@pytest.mark.parametrize(
    "changes",
    [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": "q_proj"}, {"targets": ()}],
)
def test_impossible_lora_settings_are_refused(changes):
    with pytest.raises(ModelError):
        replace(LoraSettings(4, 8.0), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    "changes", [{"device": "cuda"}, {"device": "auto", "quantization": "4bit"}]
)
def test_what_needs_cuda_is_refused_without_it(llama_folder, changes):
    with pytest.raises(ModelError, match="CUDA"):
        load_base(ModelSettings(str(llama_folder), **changes), LoraSettings(4, 8.0), 0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSettings(4, 8.0, targets=("query",)), r"'query'.*q_proj"),
        (LoraSettings(4, 8.0, targets=("embed_tokens",)), "Embedding is no linear layer"),
        (LoraSettings(4, 8.0, targets=("input_layernorm",)), "input_layernorm|not supported"),
    ],
)
def test_targets_that_are_no_linear_layers_are_refused(llama_folder, lora, message):
    with pytest.raises(ModelError, match=message):
        load_base(ModelSettings(str(llama_folder)), lora, 0)


def test_missing_or_damaged_model_folders_are_refused(tmp_path, llama_folder):
    def refused(path, message):
        with pytest.raises(ModelError, match=message):
            load_base(ModelSettings(str(path)), LoraSettings(4, 8.0), 0)

    refused(tmp_path / "nowhere", "not a folder")
    refused(tmp_path, "no config.json")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in Path(llama_folder).iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "tokenizer.json").unlink()
    refused(copied, "tokenizer")
    (copied / "tokenizer.json").write_bytes((llama_folder / "tokenizer.json").read_bytes())
    (copied / "model.safetensors").write_bytes(b"damaged")
    refused(copied, "cannot be loaded")
    (copied / "model.safetensors").unlink()
    refused(copied, "cannot be loaded")


def test_an_unknown_hub_name_is_refused_with_its_name():
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        load_base(ModelSettings("nobody/no-such-model"), LoraSettings(4, 8.0), 0)


def test_a_head_of_another_number_of_classes_is_refused(bert_folder):
    model = ModelSettings(str(bert_folder), task="sequence_classification", num_labels=3)
    with pytest.raises(ModelError, match="5 classes, but num_labels is 3"):
        load_base(model, LoraSettings(4, 8.0), 0)


def test_weights_the_checkpoint_lacks_must_be_trained(bert_without_pooler_folder):
    model = ModelSettings(
        str(bert_without_pooler_folder), task="sequence_classification", num_labels=5
    )
    with pytest.raises(ModelError, match=r"modules_to_save = \['pooler'\]"):
        load_base(model, LoraSettings(4, 8.0), 0)
    base = load_base(model, LoraSettings(4, 8.0, modules_to_save=("pooler",)), 0)
    assert "base_model.model.bert.pooler.dense.weight" in base.initial_adapter().dense
    assert not any("pooler" in name for name in base.initial_adapter().lora)
