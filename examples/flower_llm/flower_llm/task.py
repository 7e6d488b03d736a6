"""Model, data and training of the app: Hugging Face and PEFT, on the model that travels along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfed import builtin

NUM_EXAMPLES = 240
LENGTH = 64


@lru_cache(maxsize=1)
def load_model() -> PeftModel:
    """Return the base model with a fresh LoRA adapter, the same everywhere."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(builtin.MODEL_PATH), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


@lru_cache(maxsize=1)
def load_tokenizer() -> Any:
    """Return the tokenizer."""
    return AutoTokenizer.from_pretrained(str(builtin.MODEL_PATH))


def weights(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's weights."""
    return dict(get_peft_model_state_dict(model))


def set_weights(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Put weights into the adapter."""
    set_peft_model_state_dict(model, state)


def examples(partition: int | None, partitions: int = 1) -> list[dict[str, Tensor]]:
    """Return a node's examples, or those that are evaluated on (None), ready for the model."""
    if partition is None:
        records = builtin.evaluation_records(60, 0)
    else:
        records = builtin.training_records(NUM_EXAMPLES, 0)[partition::partitions]
    return [_encode(record) for record in records]


def train(model: PeftModel, data: Sequence[dict[str, Tensor]], steps: int) -> float:
    """Train the adapter and return the mean loss."""
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    total = 0.0
    for step in range(steps):
        rows = [data[(step * 8 + row) % len(data)] for row in range(8)]
        loss = model(**_batch(rows)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += float(loss.detach())
    return total / steps


def evaluate(model: PeftModel, data: Sequence[dict[str, Tensor]]) -> float:
    """Return the mean loss."""
    model.eval()
    with torch.no_grad():
        return float(model(**_batch(data)).loss)


def _encode(record: Any) -> dict[str, Tensor]:
    tokenizer = load_tokenizer()
    prompt = tokenizer(builtin.prompt(record), add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + record["response"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id][:LENGTH]
    labels = [*([-100] * len(prompt)), *answer, tokenizer.eos_token_id][:LENGTH]
    filler = LENGTH - len(ids)
    return {
        "input_ids": torch.tensor([*ids, *([tokenizer.eos_token_id] * filler)]),
        "attention_mask": torch.tensor([*([1] * len(ids)), *([0] * filler)]),
        "labels": torch.tensor([*labels, *([-100] * filler)]),
    }


def _batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
