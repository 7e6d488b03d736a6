"""Sixteen clients trained together, against one after another with PEFT alone.

    python benchmarks/cohort.py [--repeats 5]

Every client makes the same local steps on batches of 4 x 128 tokens, all scored, on the built-in
model and on a Llama of 10M random parameters. Four sides take turns:

- cohort: ``CohortTrainer.train``, batching and result included, at the width it chose itself, two
  torch threads;
- workers: ``PoolTrainer``, a process a core with one torch thread each, cohorts of
  ``WORKER_WIDTH``: what a run gets on a CPU;
- sequential: a plain PEFT loop, the model loaded once and the batches made beforehand;
- big: that loop with one adapter and the tokens of all clients as one batch a step.

``ratio_vs_sequential`` is sequential over cohort. The bound is what anyone could hope for without
other kernels: the faster of sequential and big in a turn; ``ratio_vs_bound`` is bound over cohort.
``ratio_workers_vs_sequential`` is sequential over workers. All are medians over the turns. Final
losses of cohort and workers are compared with those of sequential.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measure import interleaved, publish, spread
from peft import LoraConfig, get_peft_model
from plain_loop import labels_of, train_plainly
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from alignfed import builtin
from alignfed.core.adapter import Adapter
from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.prestart import usable_cores
from alignfed.training.cohort import CohortTrainer
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.loading import load_base
from alignfed.training.local import LocalSettings
from alignfed.training.ray_worker import TrainerSetup
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.templates import Example, TemplateSettings
from alignfed.training.worker_pool import PoolTrainer

CLIENTS, BATCH_SIZE, LENGTH = 16, 4, 128
RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-3
STEPS = {"small": 4, "large": 2}
WORKER_WIDTH = 2
"""The default recipe's ``training.cohort_size``."""


def save_large(folder: Path) -> None:
    """Write a Llama of 10M random parameters with the built-in tokenizer."""
    config = LlamaConfig.from_pretrained(
        str(builtin.MODEL_PATH),
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(builtin.MODEL_PATH) / name, folder)


def full_examples(client: int, count: int) -> tuple[Example, ...]:
    """Examples whose response alone fills every position."""
    return tuple(
        Example("a", " ".join(str((client * 31 + n * 7 + i) % 97) for i in range(2 * LENGTH)))
        for n in range(count)
    )


class PlainLoop:
    """A model that one client after another trains from a common start with a plain loop."""

    def __init__(self, folder: str, start: Adapter, settings: LocalSettings) -> None:
        self.settings = settings
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.use_cache = False
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(model, config)
        self.model.eval()  # no module here has dropout; as the federated clients do
        self.parameters = [one for one in self.model.parameters() if one.requires_grad]
        modules = dict(self.model.named_modules())
        self.start: list[tuple[Tensor, Tensor]] = []
        for name, factors in start.lora.items():
            self.start.append((modules[name].lora_A["default"].weight, factors.a))
            self.start.append((modules[name].lora_B["default"].weight, factors.b))

    def client(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Train one client from the common start; return the loss of each step."""
        with torch.no_grad():
            for parameter, values in self.start:
                parameter.copy_(values)
        masked = ((ids, torch.ones_like(ids), labels) for ids, labels in batches)
        return train_plainly(self.model, self.parameters, masked, self.settings)


def compare(size: str, folder: str, repeats: int) -> dict[str, Any]:
    """Return the figures of one model."""
    steps = STEPS[size]
    base = load_base(ModelSettings(folder), LoraSettings(RANK, ALPHA), seed=0)
    encoder = Encoder(base, TemplateSettings("{prompt}", "{response}"), LENGTH)
    data = {
        client: ClientData(str(client), full_examples(client, steps * BATCH_SIZE), ())
        for client in range(CLIENTS)
    }
    settings = LocalSettings(steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    trainer = CohortTrainer(base, encoder, data, settings, seed=0)
    start = base.initial_adapter()
    jobs = [TrainingJob(Task(client, client, 0, 0), start) for client in range(CLIENTS)]
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for client in range(CLIENTS):
        plan = trainer.alone.data.plan(client, 0)
        made = []
        for batch in trainer.alone.data.batches(client, plan):
            assert batch.input_ids.shape == (BATCH_SIZE, LENGTH)
            made.append((batch.input_ids, labels_of(batch)))
        batches.append(made)
    whole = [
        tuple(torch.cat([one[step][part] for one in batches]) for part in range(2))
        for step in range(steps)
    ]
    setup = TrainerSetup(
        ModelSettings(folder),
        LoraSettings(RANK, ALPHA),
        TemplateSettings("{prompt}", "{response}"),
        LENGTH,
        data,
        settings,
        seed=0,
        trainer=partial(CohortTrainer, width=WORKER_WIDTH),
    )
    pool = PoolTrainer(setup, trainer.work, usable_cores())
    plain = PlainLoop(folder, start, settings)
    width = trainer.choose_width(jobs)
    last: dict[str, list[float]] = {}

    def cohort() -> None:
        last["cohort"] = [one.metrics["loss_last"] for one in trainer.train(jobs)]

    def workers() -> None:
        shares = [
            pool.submit(jobs[first : first + WORKER_WIDTH])
            for first in range(0, CLIENTS, WORKER_WIDTH)
        ]
        last["workers"] = [one.metrics["loss_last"] for share in shares for one in share.results()]

    def sequential() -> None:
        last["sequential"] = [plain.client(own)[-1] for own in batches]

    def big() -> None:
        plain.client(whole)  # type: ignore[arg-type]

    sides = {"cohort": cohort, "workers": workers, "sequential": sequential, "big": big}
    taken = interleaved(sides, repeats)
    pool.close()
    turns = list(zip(taken["cohort"], taken["sequential"], taken["big"], strict=True))
    tokens = CLIENTS * steps * BATCH_SIZE * LENGTH
    gaps = [
        abs(found - expected)
        for side in ("cohort", "workers")
        for found, expected in zip(last[side], last["sequential"], strict=True)
    ]
    beside = [a / b for a, b in zip(taken["sequential"], taken["workers"], strict=True)]
    versus_sequential = [sequential_s / cohort_s for cohort_s, sequential_s, _ in turns]
    versus_bound = [min(rest) / cohort_s for cohort_s, *rest in turns]
    return {
        f"ratio_vs_sequential_{size}": round(median(versus_sequential), 3),
        f"ratio_vs_bound_{size}": round(median(versus_bound), 3),
        f"ratio_workers_vs_sequential_{size}": round(median(beside), 3),
        size: {
            "parameters": base.num_parameters,
            "steps": steps,
            "width": width.width,
            "tokens_per_s_by_width": {k: round(v) for k, v in width.tokens_per_s.items()},
            "notes": [*width.notes, *trainer.take_notes()],
            "tokens_per_s": {name: round(tokens / median(s)) for name, s in taken.items()},
            "seconds": {name: spread(seconds) for name, seconds in taken.items()},
            "ratio_vs_sequential": spread(versus_sequential),
            "ratio_vs_bound": spread(versus_bound),
            "ratio_workers_vs_sequential": spread(beside),
            "workers": usable_cores(),
            "worker_width": WORKER_WIDTH,
            "largest_loss_difference": max(gaps),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="turns, 5 at least")
    repeats = max(5, parser.parse_args().repeats)
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures = compare("small", str(builtin.MODEL_PATH), repeats)
    with tempfile.TemporaryDirectory() as folder:
        save_large(Path(folder))
        figures |= compare("large", folder, repeats)
    publish("cohort", figures)


if __name__ == "__main__":
    main()
