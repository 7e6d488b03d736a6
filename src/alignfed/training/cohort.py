"""Many clients' local fine-tuning at once, on one frozen base: the numbers of ``local.py``, sooner.

K clients take their steps together: inputs stacked client by client, K adapters in one flat buffer,
one forward and backward pass a step, each client with its own loss, norm, learning rate and AdamW
state. A client that has made its steps leaves the batch. Results agree with those of
``LocalTrainer`` to float tolerance, and are the same bit for bit when the same jobs are trained at
the same width.

Two things are trained one client at a time instead, and noted: LoRA dropout (its draws would depend
on who trains together), and models whose layers see positions in another order than the batch's.
Which models these are is found by comparison: before the first cohort, losses and gradients of two
random adapters are computed both ways.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import ModelError
from alignfed.training.batches import Batch, BatchPlan
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.local import LocalTrainer, task_metrics
from alignfed.training.local_settings import LocalSettings
from alignfed.training.models import BaseModel
from alignfed.training.optimise import RowOptimiser
from alignfed.training.stacked_layers import StackedForward
from alignfed.training.stacked_pass import StackedPass, find_obstacle
from alignfed.training.width import (
    SHARE_OF_FREE_MEMORY,
    Width,
    bytes_per_client,
    fastest,
    free_bytes,
    is_out_of_memory,
)

MAX_WIDTH = 16
"""Widest cohort that is looked for: no measured model gained from more on a CPU."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A job, its place among the jobs given, and its batches."""

    place: int
    job: TrainingJob
    plan: BatchPlan

    @property
    def order(self) -> tuple[int, int, int]:
        """Longest first: those that train together then end together, with little filler."""
        return (-len(self.plan.steps), -self.plan.tokens, self.place)


class CohortTrainer:
    """Trains clients together (``core.ports.ClientTrainer``).

    Attributes:
        width: clients trained together at most; None until chosen.
    """

    def __init__(
        self,
        base: BaseModel,
        encoder: Encoder,
        clients: Mapping[int, ClientData],
        settings: LocalSettings,
        seed: int,
        *,
        width: int | None = None,
    ) -> None:
        """Keep the clients' examples; each is tokenised when first asked for.

        Args:
            base: the frozen base.
            encoder: makes tokens of examples.
            clients: their examples.
            settings: what every client does.
            seed: of batches.
            width: clients to train together at most; by default measured with the first jobs.

        Raises:
            ModelError: ``width`` is below 1.
        """
        if width is not None and width < 1:
            raise ModelError(f"cohort width is {width}, must be at least 1", width=width)
        self.base = base
        self.settings = settings
        self.width = width
        self.alone = LocalTrainer(base, encoder, clients, settings, seed)
        self._data = self.alone.data
        self._notes: list[str] = []
        self._pass = StackedPass(base, settings.representation_penalty)
        self._checked = False
        self._why_alone: str | None = None

    def work(self, task: Task) -> TaskWork:
        """Return the tokens, filler included, of exactly the batches the task will see."""
        return self.alone.work(task)

    def take_notes(self) -> tuple[str, ...]:
        """Return what has happened since last asked that a run's record should say."""
        notes, self._notes = tuple(self._notes), []
        return notes

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return one result a job, in order.

        Raises:
            ModelError: an adapter does not fit the base, or memory does not suffice for one client.
        """
        if not jobs:
            return []
        if not self._can_stack(jobs):
            return self.alone.train(jobs)
        if self.width is None:
            self.choose_width(jobs)
        planned = sorted(
            (_Planned(place, job, self._plan(job)) for place, job in enumerate(jobs)),
            key=lambda one: one.order,
        )
        results: dict[int, TrainingResult] = {}
        while planned:
            assert self.width is not None
            # As equal as can be: a cohort of one left over would run alone.
            size = math.ceil(len(planned) / math.ceil(len(planned) / self.width))
            trained = self._train_or_halve(planned[:size])
            if trained is not None:
                results |= trained
                planned = planned[size:]
        return [results[place] for place in range(len(jobs))]

    def choose_width(self, jobs: Sequence[TrainingJob], *, max_width: int = MAX_WIDTH) -> Width:
        """Choose, and keep, how many clients to train together.

        Args:
            jobs: what is typical, one at least; repeated for cohorts that are wider. Their first
                steps are computed and thrown away.
            max_width: widest to consider.

        Returns:
            The width, what was measured, and notes.
        """
        if not self._can_stack(jobs):
            self.width = 1
            return Width(1, 1, {}, (f"clients are trained one at a time: {self._why_alone}",))
        limit, notes = self._memory_limit(jobs, max_width)

        def measure(width: int) -> float | None:
            try:
                return self._tokens_per_s([jobs[i % len(jobs)] for i in range(width)])
            except (RuntimeError, MemoryError) as error:
                if width == 1 or not is_out_of_memory(error):
                    raise
            self._free_memory()
            notes.append(f"a cohort of {width} ran out of memory; narrower ones are used")
            return None

        width, found = fastest(measure, limit)
        self.width = width
        return Width(width, limit, found, tuple(notes))

    # --- one cohort -----------------------------------------------------------------------

    def _train_or_halve(self, cohort: Sequence[_Planned]) -> dict[int, TrainingResult] | None:
        """Return results by place, or None where the width had to be halved."""
        try:
            return self._train_cohort(cohort)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(cohort) == 1:
                raise ModelError(
                    "there is not enough memory to train a single client; lower"
                    " training.batch_size or data.max_length, or set"
                    f" model.gradient_checkpointing ({str(error)[:200]})"
                ) from error
        # Outside the handler: the traceback held what filled the memory.
        self._free_memory()
        self.width = max(1, len(cohort) // 2)
        self._notes.append(
            f"a cohort of {len(cohort)} ran out of memory; the width is {self.width} from now on"
        )
        return None

    def _train_cohort(self, cohort: Sequence[_Planned]) -> dict[int, TrainingResult]:
        adapters = [one.job.adapter for one in cohort]
        stack = self._pass.stack(adapters)
        steps = [len(one.plan.steps) for one in cohort]
        masks = self.settings.frozen_mask(adapters)
        frozen = None if masks is None else self._pass.stack(masks).values.bool()
        optimiser = RowOptimiser(stack.values, stack.gradients, steps, self.settings, frozen)
        streams = [self._data.batches(one.job.task.client_id, one.plan) for one in cohort]
        leaves = stack.leaves(optimiser.active)
        losses: list[list[Tensor]] = [[] for _ in cohort]
        with self.base.training(), StackedForward(self.base) as stacked:
            while active := optimiser.active:
                if active < leaves.count:
                    leaves = stack.leaves(active)
                stacked.use(leaves)
                batch = self._pass.collate([next(stream) for stream in streams[:active]])
                for own, loss in zip(
                    losses, self._pass.backward(batch, leaves).unbind(), strict=False
                ):
                    own.append(loss)
                optimiser.step()
        return {
            one.place: TrainingResult(
                adapter,
                one.plan.num_examples,
                task_metrics(torch.stack(own).tolist(), one.plan),
            )
            for one, own, adapter in zip(cohort, losses, stack.read(), strict=True)
        }

    def _can_stack(self, jobs: Sequence[TrainingJob]) -> bool:
        if not self._checked:
            self._checked = True
            self._why_alone = find_obstacle(
                self._pass, jobs[0].adapter, [next(self._batches(jobs[0]))] * 2
            )
            if self._why_alone is not None:
                self._notes.append(f"clients are trained one at a time: {self._why_alone}")
        return self._why_alone is None

    def _plan(self, job: TrainingJob) -> BatchPlan:
        return self._data.plan(job.task.client_id, job.task.dispatch, job.task.steps)

    def _batches(self, job: TrainingJob) -> Iterator[Batch]:
        return self._data.batches(job.task.client_id, self._plan(job))

    # --- width ----------------------------------------------------------------------------

    def _memory_limit(self, jobs: Sequence[TrainingJob], most: int) -> tuple[int, list[str]]:
        base = self.base
        free = free_bytes(base.device)
        if free is None:
            return most, ["free memory could not be told; the width is not limited by it"]
        plans = [self._data.plan(job.task.client_id, job.task.dispatch) for job in jobs]
        tokens = max(
            len(rows) * length
            for plan in plans
            for rows, length in zip(plan.steps, plan.padded_lengths, strict=True)
        )
        sizes = base.architecture
        each = bytes_per_client(
            sizes,
            tokens=tokens,
            targets=self.settings.batch_size if base.is_classifier else tokens,
            outputs=base.settings.num_labels or sizes.vocab_size,
            adapter_parameters=max(sum(job.adapter.layout.sizes.values()) for job in jobs),
            activation_bytes=4 if base.settings.dtype == "float32" else 2,
            gradient_checkpointing=base.settings.gradient_checkpointing,
        )
        fits = int(SHARE_OF_FREE_MEMORY * free / each)
        if fits >= most:
            return most, []
        limit = max(1, fits)
        return limit, [
            f"memory limits the width to {limit}: {free >> 20} MiB are free, a client needs about"
            f" {each >> 20} MiB"
        ]

    def _tokens_per_s(self, jobs: Sequence[TrainingJob]) -> float:
        """Measure a step of a cohort: the better of two, after one that does not count."""
        stack = self._pass.stack([job.adapter for job in jobs])
        optimiser = RowOptimiser(stack.values, stack.gradients, [3] * len(jobs), self.settings)
        leaves = stack.leaves(len(jobs))
        batch = self._pass.collate([next(self._batches(job)) for job in jobs])
        taken_s = []
        with self.base.training(), StackedForward(self.base) as stacked:
            stacked.use(leaves)
            for _ in range(3):
                begun_s = time.perf_counter()
                # Reading the losses waits for the device.
                self._pass.backward(batch, leaves).tolist()
                optimiser.step()
                taken_s.append(time.perf_counter() - begun_s)
        return batch.num_tokens / min(taken_s[1:])

    def _free_memory(self) -> None:
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
