"""Plans count what loading and training would really take."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alignfed.config import ArchitectureSection, default_recipe, load_recipe
from alignfed.errors import ModelError, RecipeError
from alignfed.planning import make_plan
from alignfed.planning.blueprint import blueprint_of_folder, blueprint_of_sizes
from alignfed.training.loading import load_base
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.config.test_recipes import RECIPES
from tests.shared import shared

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path_factory):
    """Return a folder with a small Llama, the model, and its sizes."""
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=request.param,
        )
    )
    model.save_pretrained(folder)
    return folder, model, ArchitectureSection(**SIZES, tied_embeddings=request.param)


def test_stated_sizes_give_the_parameters_of_the_real_model(llama):
    _, model, sizes = llama
    found = blueprint_of_sizes(sizes)
    assert found.num_parameters == sum(one.numel() for one in model.parameters())


def test_file_headers_and_stated_sizes_agree(llama):
    folder, _, sizes = llama
    stated, read = blueprint_of_sizes(sizes), blueprint_of_folder(folder)
    assert read.num_parameters == stated.num_parameters
    assert read.matrix_parameters == stated.matrix_parameters
    assert read.linear_layers() == stated.linear_layers()
    assert read.tied_head == stated.tied_head


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_a_plan_counts_what_loading_finds(targets):
    folder = shared("models", "stories260K")
    base = load_base(
        ModelSettings(str(folder)), LoraSettings(rank=4, alpha=8.0, targets=targets), seed=0
    )
    written = targets if isinstance(targets, str) else list(targets)
    plan = make_plan(
        default_recipe(
            [f"model.path={folder}", "lora.rank=4", f"lora.targets={json.dumps(written)}"]
        )
    )
    assert plan.base_parameters == base.num_parameters
    assert plan.adapter_parameters == base.adapter_parameters
    assert plan.adapter_bytes == base.initial_adapter().size_bytes
    assert plan.memory.weights_bytes == base.architecture.weight_bytes
    assert plan.flops_per_token == base.training_flops_per_token(base.initial_adapter())


def test_a_plan_of_llama_3_1_8b_has_its_published_size():
    (path,) = [path for path in RECIPES if path.stem == "llama3-8b"]
    plan = make_plan(load_recipe(path))
    assert plan.base_parameters == 8_030_261_248
    assert plan.adapter_parameters == 41_943_040
    packed = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = plan.base_parameters - packed
    assert plan.memory.weights_bytes == pytest.approx(2 * rest + packed * 4.127 / 8)
    assert all(tier.fits for tier in plan.tiers if tier.share)


def test_quantisation_and_bf16_shrink_the_weights(llama):
    folder, _, _ = llama
    weights = [
        make_plan(default_recipe([f"model.path={folder}", *more])).memory.weights_bytes
        for more in (
            [],
            ["model.dtype=bfloat16"],
            ["model.dtype=bfloat16", "model.device=cuda", "model.quantization=4bit"],
        )
    ]
    assert weights[0] == 2 * weights[1]
    assert weights[2] < weights[1]


def test_a_model_that_is_not_here_needs_stated_sizes():
    with pytest.raises(RecipeError, match=r"\[model\.architecture\]"):
        make_plan(default_recipe(["model.path=org/name"]))


def test_a_target_that_names_no_layer_is_refused(llama):
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        make_plan(default_recipe([f"model.path={llama[0]}", 'lora.targets=["q_porj"]']))


def test_a_warm_start_brings_its_own_size(llama, tmp_path):
    save_file(
        {
            "base.q_proj.lora_A.weight": torch.zeros(3, 16),
            "base.q_proj.lora_B.weight": torch.zeros(16, 3),
        },
        tmp_path / "adapter_model.safetensors",
    )
    plan = make_plan(default_recipe([f"model.path={llama[0]}", f"lora.warm_start={tmp_path}"]))
    assert plan.adapter_parameters == 2 * 3 * 16


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b"{"), ("config.json", b"[]"), ("model.safetensors", b"\x00" * 20)],
)
def test_damaged_files_are_refused(llama, tmp_path, name, content):
    for file in llama[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        blueprint_of_folder(tmp_path)


def test_a_folder_without_safetensors_is_refused(llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        blueprint_of_folder(tmp_path)


def test_a_fleet_of_one_reference_kind_is_planned_for_that_kind(llama):
    plan = make_plan(
        default_recipe(
            [f"model.path={llama[0]}", "fleet.preset=unset", "fleet.distribution=lognormal"]
        )
    )
    assert [tier.tier for tier in plan.tiers if tier.share] == ["phone-mid"]
