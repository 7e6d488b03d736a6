"""Whole runs on real text with a real pretrained model: what the recipes promise."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignfed
from alignfed.build import build_data
from tests.shared import shared

pytestmark = pytest.mark.slow


def test_ten_dolly_clients_all_take_part_and_the_adapter_gives_its_loss_in_plain_peft(tmp_path):
    model_path = shared("models", "stories260K")
    overrides = [
        f"model.path={model_path}",
        f"data.path={shared('data', 'dolly15k_10clients')}",
        "stop.uploads=50",
        "data.held_out_examples=8",
        "evaluation.every_versions=100",
    ]
    result = alignfed.simulate("recipes/dolly.toml", tmp_path / "dolly", overrides=overrides)
    summary = result.summary
    assert summary["clients_participating"] == 10
    assert summary["final_eval_loss"] <= 0.9 * summary["base_eval_loss"]

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data, _ = build_data(alignfed.load_recipe(result.directory / "recipe.toml"))
    total, count = 0.0, 0
    with torch.no_grad():
        for example in data.evaluation:
            prompt = tokenizer(example.prompt).input_ids
            response = tokenizer(example.response, add_special_tokens=False).input_ids
            # As training/encoding.py states it: the response and its end keep their place, the
            # prompt loses its left side.
            response = [*response, tokenizer.eos_token_id][:255]
            over = max(0, len(prompt) + len(response) - 256)
            prompt = prompt[:1] + prompt[1 + over :]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(response), reduction="sum"
            )
            total, count = total + float(losses), count + len(response)
    assert total / count == pytest.approx(summary["final_eval_loss"], rel=1e-3)


def test_a_banking77_classifier_with_its_head_beats_chance_tenfold(tmp_path):
    overrides = [
        f"model.path={shared('models', 'stories260K')}",
        f"data.path={shared('data', 'banking77')}",
        "evaluation.every_versions=100",
    ]
    result = alignfed.simulate("recipes/banking77.toml", tmp_path / "banking", overrides=overrides)
    assert result.summary["scorer"] == "accuracy"
    assert result.summary["final_exact_match"] >= 0.13
