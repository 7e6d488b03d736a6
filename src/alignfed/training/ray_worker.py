"""What runs in a worker's process, and what travels to it and back: plain data.

A worker builds base, data and trainer once, from settings, and keeps them. Adapters travel as flat
bytes with their sizes as plain tuples. Nothing here knows who carries them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from alignfed.core.adapter import DTYPES, Adapter, AdapterLayout, DenseShape, LoraShape, dtype_name
from alignfed.core.ports import ClientTrainer, TakesNotes, TrainingJob
from alignfed.core.update import Task
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.loading import load_base
from alignfed.training.local import LocalTrainer
from alignfed.training.local_settings import LocalSettings
from alignfed.training.models import BaseModel
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.templates import TemplateSettings

PackedAdapter: TypeAlias = tuple[
    tuple[tuple[str, tuple[int, int, int, float, str, int]], ...],
    tuple[tuple[str, tuple[tuple[int, ...], str]], ...],
    dict[str, npt.NDArray[np.uint8]],
]
"""LoRA sizes, dense shapes, and each dtype's flat buffer as bytes: nothing but plain data."""

PackedResult: TypeAlias = tuple[PackedAdapter, int, dict[str, float]]
"""A trained adapter, the examples it saw, and its metrics."""


def pack(adapter: Adapter) -> PackedAdapter:
    """Return an adapter as plain data; its buffers are views as bytes, not copies, on a CPU."""
    layout = adapter.layout
    return (
        tuple(
            (name, (one.in_dim, one.out_dim, one.rank, one.alpha, one.dtype, one.frozen))
            for name, one in layout.lora
        ),
        tuple((name, (one.shape, one.dtype)) for name, one in layout.dense),
        {
            dtype_name(dtype): buffer.detach().cpu().contiguous().view(torch.uint8).numpy()
            for dtype, buffer in adapter.buffers.items()
        },
    )


def unpack(packed: PackedAdapter) -> Adapter:
    """Return a packed adapter with buffers of its own, bit for bit the same."""
    lora, dense, buffers = packed
    layout = AdapterLayout(
        tuple((name, LoraShape(*sizes)) for name, sizes in lora),
        tuple((name, DenseShape(tuple(shape), dtype)) for name, (shape, dtype) in dense),
    )
    # What arrives is read-only shared memory, held for as long as anybody looks at it.
    return Adapter(
        layout,
        {
            DTYPES[name]: torch.from_numpy(buffer.copy()).view(DTYPES[name])
            for name, buffer in buffers.items()
        },
    )


class MakesTrainer(Protocol):
    """Builds the trainer a worker keeps. It travels to the worker, so it holds plain data."""

    def __call__(self) -> ClientTrainer:
        """Build the trainer, in the worker."""
        ...


class TrainerClass(Protocol):
    """A trainer that is made as ``LocalTrainer`` is."""

    def __call__(
        self,
        base: BaseModel,
        encoder: Encoder,
        clients: Mapping[int, ClientData],
        settings: LocalSettings,
        seed: int,
    ) -> ClientTrainer:
        """Make the trainer."""
        ...


@dataclass(frozen=True, slots=True)
class TrainerSetup:
    """What a worker builds its trainer from, the same as in the driving process.

    Attributes:
        model: which base; a folder must exist on every worker's machine.
        lora: which adapter.
        template: how examples become text.
        max_length: tokens a sequence may have.
        clients: every client's examples; they travel once to each worker.
        settings: what a task does.
        seed: the run's.
        trainer: the class that trains, importable on the worker.
    """

    model: ModelSettings
    lora: LoraSettings
    template: TemplateSettings
    max_length: int
    clients: Mapping[int, ClientData]
    settings: LocalSettings
    seed: int
    trainer: TrainerClass = LocalTrainer

    def __call__(self) -> ClientTrainer:
        """Load the base and build the trainer.

        Raises:
            AlignFedError: what the settings name does not exist here, or does not fit.
        """
        base = load_base(self.model, self.lora, self.seed)
        encoder = Encoder(base, self.template, self.max_length)
        return self.trainer(base, encoder, self.clients, self.settings, self.seed)


class CohortWorker:
    """Trains cohorts in a process of its own; Ray makes an actor of it."""

    def __init__(self, make_trainer: MakesTrainer, threads: int) -> None:
        """Keep what the trainer is built from."""
        torch.set_num_threads(threads)
        self._make_trainer = make_trainer
        self._trainer: ClientTrainer | None = None

    def take_notes(self) -> tuple[str, ...]:
        """Return what the trainer has met since last asked."""
        trainer = self._trainer
        return tuple(trainer.take_notes()) if isinstance(trainer, TakesNotes) else ()

    def prepare(self) -> int:
        """Build the trainer, once, and return the process id."""
        if self._trainer is None:
            self._trainer = self._make_trainer()
        return os.getpid()

    def train(
        self, tasks: Sequence[Task], which: Sequence[int], *adapters: PackedAdapter
    ) -> list[PackedResult]:
        """Return one result a task; ``which`` names each task's adapter."""
        self.prepare()
        assert self._trainer is not None
        starts = [unpack(packed) for packed in adapters]
        jobs = [TrainingJob(task, starts[index]) for task, index in zip(tasks, which, strict=True)]
        return [
            (pack(result.adapter), result.num_examples, dict(result.metrics))
            for result in self._trainer.train(jobs)
        ]
