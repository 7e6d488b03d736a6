"""Python state as a JSON text beside its adapters and tensors, and back, exactly.

Only plain containers and the classes of an explicit registry are written or made; nothing is ever
executed. One object referred to from several places is one object again after decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from alignfed.core import (
    adapter,
    admission,
    compass,
    events,
    instructions,
    local_steps,
    ports,
    state,
    update,
)
from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import compared, fedasync, held, memory, path, recall
from alignfed.core.lora import factor, hetlora, product
from alignfed.core.ports import AggregationRule
from alignfed.errors import JournalError
from alignfed.journal.decoder import Decoder
from alignfed.journal.encoder import Encoder, field_names

FORMAT = 1
"""Version of the JSON tree's grammar (see ``encoder.py``)."""

CORE_CLASSES: tuple[type, ...] = (
    adapter.LoraFactors,
    adapter.LoraShape,
    adapter.DenseShape,
    adapter.AdapterLayout,
    admission.ExpiredTasks,
    admission.NormHistory,
    events.RunStarted,
    events.ClientJoined,
    events.ClientLeft,
    events.UpdateArrived,
    events.UploadRefused,
    events.TaskFailed,
    events.TimerFired,
    events.EvaluationFinished,
    instructions.RejectReason,
    instructions.StopReason,
    instructions.Dispatch,
    instructions.Reject,
    instructions.AppliedUpload,
    instructions.ServerWork,
    instructions.Publish,
    instructions.Evaluate,
    instructions.SetTimer,
    instructions.Stop,
    ports.TaskWork,
    ports.TrainingJob,
    ports.TrainingResult,
    ports.Evaluation,
    ports.BufferedUpdate,
    compass.CompassTask,
    compass.CompassGroup,
    compass.CompassSchedule,
    local_steps.ClientSpeeds,
    fedasync.MixedModels,
    held.HeldUpdates,
    compared.ComparedUpdates,
    memory.ClientMemory,
    path.Path,
    recall.Recall,
    factor.FactorSum,
    product.ProductTerms,
    hetlora.WeightedSum,
    state.ClientRecord,
    state.Snapshot,
    state.CoordinatorState,
    update.Task,
    update.Update,
)
"""Every codec knows these; settings are not state and are not among them."""


@dataclass(frozen=True)
class Encoded:
    """State taken apart.

    Attributes:
        text: the JSON tree.
        adapters: the adapters it refers to, by checksum.
        tensors: the other tensors it refers to, by checksum.
    """

    text: str
    adapters: Mapping[str, Adapter]
    tensors: Mapping[str, Tensor]


class Codec:
    """Encodes and decodes state made of containers, numbers, text, tensors and known classes."""

    def __init__(self, *classes: type) -> None:
        """Know the core's classes and ``classes`` (dataclasses and enumerations)."""
        self._classes: dict[str, type] = {}
        self.register(*CORE_CLASSES, *classes)

    def register(self, *classes: type) -> None:
        """Add dataclasses or enumerations that may occur in state; twice is once.

        Raises:
            JournalError: another kind of class, or two classes of one name.
        """
        for cls in classes:
            name = cls.__name__
            if not (is_dataclass(cls) or issubclass(cls, Enum)) or cls is Adapter:
                raise JournalError(
                    f"{name} cannot be registered: only dataclasses and enumerations can",
                    name=name,
                )
            if self._classes.setdefault(name, cls) is not cls:
                raise JournalError(
                    f"two classes are called {name}: {self._classes[name].__module__} and"
                    f" {cls.__module__}; rename one, the saved state tells them apart by name",
                    name=name,
                )

    def encode(self, value: Any) -> Encoded:
        """Take ``value`` apart. Nothing is copied: store the result before the state changes.

        Raises:
            JournalError: an object of unknown type, or one that contains itself; the message
                gives its path inside the state.
        """
        encoder = Encoder({cls: name for name, cls in self._classes.items()})
        root = encoder.encode(value)
        tree = {"format": FORMAT, "classes": encoder.fields, "root": root}
        text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
        return Encoded(text, encoder.adapters, encoder.tensors)

    def decode(self, encoded: Encoded) -> Any:
        """Put state together again; each tensor is a copy of its own, adapters are not copied.

        Raises:
            JournalError: the text is malformed, or names a class, field, adapter or tensor that
                is not there.
        """
        try:
            tree = json.loads(encoded.text)
            found = tree["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise JournalError(
                f"saved state is malformed: {error!r}; resume from another checkpoint"
            ) from error
        if found != FORMAT:
            raise JournalError(
                f"saved state has format {found!r}, this version of AlignFed reads {FORMAT};"
                " resume with the version that began the run",
                format=found,
            )
        decoder = Decoder(self._known(tree), encoded.adapters, encoded.tensors)
        return decoder.decode_root(tree)

    def _known(self, tree: Mapping[str, Any]) -> dict[str, tuple[type, tuple[str, ...]]]:
        known: dict[str, tuple[type, tuple[str, ...]]] = {}
        saved_classes = tree.get("classes")
        if not isinstance(saved_classes, dict):
            raise JournalError("saved state is malformed: it lists no classes")
        for name, saved in saved_classes.items():
            cls = self._classes.get(name)
            if cls is None:
                raise JournalError(
                    f"saved state needs the class {name}, which is not registered; resume with"
                    " the version of AlignFed and the extensions that began the run",
                    name=name,
                )
            names = field_names(cls)
            if saved != list(names):
                raise JournalError(
                    f"saved {name} has fields {saved}, this version has {list(names)};"
                    " resume with the version that began the run",
                    name=name,
                )
            known[name] = (cls, names)
        return known


def rule_state_class(rule: AggregationRule) -> type:
    """Return the class of what a rule remembers between flushes, which a codec must know."""
    return type(rule.init(Adapter.pack({})))
