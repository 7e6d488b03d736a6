"""Claims about the built-in base model: it knows the language, not the skills, and learns them."""

import json
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alignfed.builtin import MODEL_PATH, corpus, text

IGNORED = -100
LARGEST_BASE_EXACT_MATCH = 0.15
SMALLEST_POOLED_EXACT_MATCH = 0.80
POOLED_STEPS = 400

Example = tuple[list[int], list[int]]
"""Token ids, and labels that leave the prompt out."""


def encoded(records: list[corpus.Record]) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    examples = []
    for record in records:
        asked = tokenizer(corpus.prompt(record))["input_ids"]
        answer = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
        examples.append((asked + answer, [IGNORED] * len(asked) + answer))
    return examples


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in examples)
    gaps = [length - len(ids) for ids, _ in examples]
    return {
        "input_ids": torch.tensor([i + [0] * g for (i, _), g in zip(examples, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - g) + [0] * g for g in gaps]),
        "labels": torch.tensor(
            [j + [IGNORED] * g for (_, j), g in zip(examples, gaps, strict=True)]
        ),
    }


@torch.no_grad()
def exact_match(model: LlamaForCausalLM | PeftModel, examples: list[Example]) -> float:
    """Greedy decoding gives the response and stops if every step prefers the right token."""
    right = 0
    for start in range(0, len(examples), 120):
        batch = padded(examples[start : start + 120])
        labels = batch.pop("labels")[:, 1:]
        best = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((best == labels) | (labels == IGNORED)).all(1).sum())
    return right / len(examples)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH)


def test_base_does_not_know_the_skills(base: LlamaForCausalLM) -> None:
    examples = encoded(corpus.evaluation_records(720, seed=21))
    assert exact_match(base, examples) < LARGEST_BASE_EXACT_MATCH


def test_base_fails_even_if_whatever_follows_the_answer_is_forgiven(
    base: LlamaForCausalLM,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    records = corpus.evaluation_records(120, seed=22)
    begun = 0
    for record in records:
        asked = tokenizer(corpus.prompt(record), return_tensors="pt")
        words = asked["input_ids"].shape[1]
        out = base.generate(**asked, max_new_tokens=10, do_sample=False)
        begun += tokenizer.decode(out[0, words:]).startswith(record["response"])
    assert begun / len(records) < LARGEST_BASE_EXACT_MATCH


def test_base_knows_the_language(base: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    documents = text.documents(random.Random("unseen by training"))
    rows = [tokenizer(next(documents))["input_ids"] for _ in range(60)]
    with torch.no_grad():
        losses = [
            base(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows
        ]
    # A guess among all tokens costs 6.6 nats, a guess by frequency 5.3.
    assert torch.stack(losses).mean() < 2.5


def test_base_is_stored_small_and_loaded_in_full_precision(base: LlamaForCausalLM) -> None:
    assert base.dtype == torch.float32
    assert 900_000 <= base.num_parameters() <= 1_500_000
    record = json.loads((MODEL_PATH / "TRAINING.json").read_text())
    assert record["parameters"] == base.num_parameters()
    assert record["base_exact_match"] < LARGEST_BASE_EXACT_MATCH


@pytest.mark.slow
def test_pooled_lora_learns_the_skills() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(MODEL_PATH),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    examples = encoded(corpus.training_records(9600, seed=0))
    rng = random.Random(0)
    for step in range(POOLED_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 20, 1 - step / POOLED_STEPS)
        loss = model(**padded(rng.sample(examples, 16)), use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    held_out = encoded(corpus.evaluation_records(720, seed=23))
    assert exact_match(model.eval(), held_out) > SMALLEST_POOLED_EXACT_MATCH
