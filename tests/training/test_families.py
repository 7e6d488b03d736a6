"""One claim over many architectures: training, scoring, generating and exporting work in each."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from alignfed.training.encoding import Encoder
from alignfed.training.generate import generate
from alignfed.training.loading import load_base
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.training.conftest import VOCAB_SIZE, save_tokenizer
from tests.training.samples import TEMPLATE, federated, moved, sums
from tests.training.test_evaluate import evaluator, one_by_one, transformers_says
from tests.training.test_export import assert_equal, ours, plain
from tests.training.test_local import run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
COMMON = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON),
    # A window shorter than the prompts, so that what left padding does to it would show.
    "gemma2": Gemma2Config(sliding_window=4, **GROUPED, **COMMON),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON),
    "neox": GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **COMMON,
    ),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
        pad_token_id=0,
        **COMMON,
    ),
    "qwen3": Qwen3Config(**GROUPED, **COMMON),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_scores_generates_and_exports(family, tmp_path):
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, opening=True)
    model = ModelSettings(str(tmp_path), gradient_checkpointing=True)
    base = load_base(model, LoraSettings(4, 8.0), 0)
    assert base.num_parameters == sum(
        one.numel() for one in AutoModelForCausalLM.from_pretrained(tmp_path).parameters()
    )

    start = moved(base.initial_adapter(), size=0.05)
    result = run(base, start=start)
    assert result.metrics["loss_last"] < result.metrics["loss_first"]

    scored = evaluator(base).evaluate(result.adapter, with_score=False)
    total, count = one_by_one(base, result.adapter, federated().evaluation)
    assert scored.loss == pytest.approx(total / count, rel=1e-5)

    prompts = Encoder(base, TEMPLATE, 64).encode_prompts(sums(0, 14), room=6)
    said = generate(base, prompts, 6, 4096)
    assert said == [transformers_says(base, prompts[row], 6) for row in range(14)]

    base.export(result.adapter, tmp_path / "adapter", str(tmp_path))
    assert_equal(ours(base), plain(tmp_path / "adapter", AutoModelForCausalLM, tmp_path))
