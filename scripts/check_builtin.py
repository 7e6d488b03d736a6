"""Measure the built-in default: its base, LoRA on pooled data, LoRA averaged over skewed clients.

Exact match is teacher-forced: each response token and the end token must be the most likely one,
which is when greedy decoding gives exactly the response and stops. Learning curves are read on a
part of the evaluation set, final figures on all of it; reading is not counted in the seconds.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignfed.builtin import MODEL_PATH, corpus

IGNORED = -100
EVALUATION_RECORDS = 1_300
CURVE_RECORDS = 520
WARMUP_STEPS = 20
READINGS = 8

Example = tuple[list[int], list[int]]
"""Token ids of prompt, response and end; labels with the prompt ignored."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One measurement's choices; ``tokens`` counts prompts and padding too."""

    model: Path
    tokens: int
    learning_rate: float
    constant: bool
    rank: int
    alpha: int
    batch_size: int
    clients: int
    cohort: int
    local_steps: int
    server_step: float
    examples: int
    seed: int


@dataclass(slots=True)
class Meter:
    """Counts tokens and training seconds, and says when the next reading is due."""

    tokens_to_do: int
    tokens: int = 0
    seconds: float = 0.0
    readings: int = 0

    def due(self) -> bool:
        """Return True once every eighth of the way."""
        reached = self.tokens * READINGS // self.tokens_to_do
        if self.readings < reached < READINGS:
            self.readings = reached
            return True
        return False

    def __str__(self) -> str:
        """Tell tokens, seconds and their ratio."""
        return (
            f"{self.tokens} tokens, {self.seconds:.1f} s, {self.tokens / self.seconds:.0f} tokens/s"
        )


def encoded(records: Sequence[corpus.Record], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return token ids and labels of each record."""
    examples = []
    for record in records:
        asked = tokenizer(corpus.prompt(record))["input_ids"]
        answer = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
        examples.append((asked + answer, [IGNORED] * len(asked) + answer))
    return examples


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return a right-padded batch, each tensor of shape ``(examples, longest)``."""
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
def exact_match(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    records: Sequence[corpus.Record],
) -> tuple[float, dict[str, float]]:
    """Return the share of exact responses over all, and of each skill."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 130):
        batch = padded(examples[start : start + 130])
        labels = batch.pop("labels")[:, 1:]
        best = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        hits = ((best == labels) | (labels == IGNORED)).all(1).tolist()
        for record, hit in zip(records[start : start + 130], hits, strict=True):
            right.setdefault(record["skill"], []).append(hit)
    model.train()
    rates = {skill: sum(hits) / len(hits) for skill, hits in right.items()}
    return sum(map(sum, right.values())) / len(examples), rates


def shown(name: str, overall: float, rates: dict[str, float]) -> None:
    """Print one result, overall and by skill."""
    skills = " ".join(f"{skill}={rate:.0%}" for skill, rate in rates.items())
    print(f"{name}: {overall:.1%} | {skills}", flush=True)


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Yield full batches, epoch after epoch, each in a new order."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield [examples[i] for i in order[start : start + size]]


def with_lora(settings: Settings) -> tuple[PeftModel, list[torch.nn.Parameter]]:
    """Return the base with a fresh adapter on every linear layer, and the adapter's factors."""
    torch.manual_seed(settings.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(settings.model),
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    return model, [p for p in model.parameters() if p.requires_grad]


def trained_step(
    model: PeftModel,
    factors: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
) -> int:
    """Take one clipped step; return how many tokens it computed, padding included."""
    batch = padded(examples)
    loss = model(**batch, use_cache=False).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    optimizer.step()
    return batch["input_ids"].numel()


def pooled(
    settings: Settings,
    training: Sequence[Example],
    evaluation: Sequence[Example],
    records: Sequence[corpus.Record],
) -> None:
    """Fine-tune on all skills together and print the curve and the result."""
    model, factors = with_lora(settings)
    optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate, weight_decay=0.0)
    draws = batches(training, settings.batch_size, random.Random(settings.seed))
    meter, steps = Meter(settings.tokens), 0
    while meter.tokens < settings.tokens:
        started = time.monotonic()
        cosine = 0.5 * (1 + math.cos(math.pi * meter.tokens / settings.tokens))
        decay = 1.0 if settings.constant else cosine
        steps += 1
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(steps / WARMUP_STEPS, decay)
        meter.tokens += trained_step(model, factors, optimizer, next(draws))
        meter.seconds += time.monotonic() - started
        if meter.due():
            rate, _ = exact_match(model, evaluation[:CURVE_RECORDS], records[:CURVE_RECORDS])
            print(f"  {meter}: {rate:.1%}", flush=True)
    shown(f"pooled, {steps} steps, {meter}", *exact_match(model, evaluation, records))


def skewed_clients(
    settings: Settings, records: Sequence[corpus.Record], training: Sequence[Example]
) -> list[Iterator[list[Example]]]:
    """Return each client's batches; a client knows one to three skills, each skill is known."""
    rng = random.Random(settings.seed)
    clients = []
    for i in range(settings.clients):
        skills = {corpus.SKILLS[i % len(corpus.SKILLS)]}
        skills |= set(rng.sample(corpus.SKILLS, rng.choice((0, 1, 2))))
        mine = [e for e, r in zip(training, records, strict=True) if r["skill"] in skills]
        mine = rng.sample(mine, min(len(mine), 300))
        clients.append(batches(mine, settings.batch_size, random.Random(f"{settings.seed}/{i}")))
    return clients


def federated(
    settings: Settings,
    clients: Sequence[Iterator[list[Example]]],
    evaluation: Sequence[Example],
    records: Sequence[corpus.Record],
) -> None:
    """Average the factors of a random cohort, round after round; print the curve and the result."""
    model, factors = with_lora(settings)
    rng = random.Random(settings.seed)
    server = [p.detach().clone() for p in factors]
    meter, rounds = Meter(settings.tokens), 0
    while meter.tokens < settings.tokens:
        started = time.monotonic()
        moved = [torch.zeros_like(p) for p in server]
        for client in rng.sample(clients, settings.cohort):
            _load(factors, server)
            optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate, weight_decay=0.0)
            for _ in range(settings.local_steps):
                meter.tokens += trained_step(model, factors, optimizer, next(client))
            for total, p, s in zip(moved, factors, server, strict=True):
                total += p.detach() - s
        share = settings.server_step / settings.cohort
        server = [s + share * total for s, total in zip(server, moved, strict=True)]
        _load(factors, server)
        meter.seconds += time.monotonic() - started
        rounds += 1
        if meter.due():
            rate, _ = exact_match(model, evaluation[:CURVE_RECORDS], records[:CURVE_RECORDS])
            print(f"  round {rounds}, {meter}: {rate:.1%}", flush=True)
    shown(f"federated, {rounds} rounds, {meter}", *exact_match(model, evaluation, records))


@torch.no_grad()
def _load(factors: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


def base(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Sequence[Example],
    records: Sequence[corpus.Record],
) -> None:
    """Print the base's exact match and what it says to one prompt of each skill."""
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    shown("base", *exact_match(model, evaluation, records))
    for record in records[: len(corpus.SKILLS)]:
        asked = tokenizer(corpus.prompt(record), return_tensors="pt")
        said = model.generate(**asked, max_new_tokens=8, do_sample=False)
        words = tokenizer.decode(said[0, asked["input_ids"].shape[1] :])
        print(f"  {corpus.prompt(record)} [{record['response']}] {words}")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("base", "pooled", "federated"), nargs="+")
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--constant", action="store_true", help="no cosine decay (pooled)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--cohort", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--server-step", type=float, default=1.0)
    parser.add_argument("--examples", type=int, default=9_600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    what, threads = options.pop("what"), options.pop("threads")
    settings = Settings(**options)
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    records = corpus.evaluation_records(EVALUATION_RECORDS, settings.seed)
    evaluation = encoded(records, tokenizer)
    training_records = corpus.training_records(settings.examples, settings.seed)
    training = encoded(training_records, tokenizer)
    lengths = [len(ids) for ids, _ in training]
    print(f"{sum(lengths) / len(lengths):.1f} tokens an example, at most {max(lengths)}")
    if "base" in what:
        base(settings, tokenizer, evaluation, records)
    if "pooled" in what:
        pooled(settings, training, evaluation, records)
    if "federated" in what:
        federated(
            settings, skewed_clients(settings, training_records, training), evaluation, records
        )


if __name__ == "__main__":
    main()
