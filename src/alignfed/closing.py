"""What a finished run leaves: the adapter's folder and ``summary.json``.

Simulated and deployed runs end alike; what only one of them has comes with ``Closing.extra``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignfed.config import Recipe
from alignfed.core.adapter import Adapter
from alignfed.core.ports import Evaluation
from alignfed.core.state import CoordinatorState
from alignfed.journal import RunDirectory, RunReader, write_summary
from alignfed.report import RunFacts, UploadFact, summarise
from alignfed.training.export import Exported, as_exported
from alignfed.training.models import BaseModel


@dataclass(frozen=True)
class Scores:
    """What the versions at both ends of a run are worth; None: the server holds no such data.

    Attributes:
        before: of version 0.
        after: of the final adapter.
        clients: of the final adapter on each client's own held-out slice.
    """

    before: Evaluation | None
    after: Evaluation | None
    clients: Mapping[int, Evaluation] = field(default_factory=dict)


@dataclass(frozen=True)
class Closing:
    """A run at its end.

    Attributes:
        recipe: what it was built from.
        base: the base model.
        place: its directory; the journal must be on disk.
        state: the coordinator's.
        client_ids: every client.
        time_s: the driver's clock.
        wall_time_s: real seconds spent, all parts together.
        recipe_sha256: of the recipe it was begun with.
        synchronous_time_s: time of a synchronous FedAvg on the same devices, where it is known.
        extra: further figures for the summary.
    """

    recipe: Recipe
    base: BaseModel
    place: RunDirectory
    state: CoordinatorState
    client_ids: Sequence[int]
    time_s: float
    wall_time_s: float
    recipe_sha256: str
    synchronous_time_s: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def final_adapter(closing: Closing) -> Exported:
    """Return the final adapter as it is handed out."""
    return as_exported(closing.state.adapter, closing.recipe.lora.export_rank)


def export_adapter(closing: Closing, adapter: Adapter) -> None:
    """Write the adapter's folder."""
    closing.base.export(adapter, closing.place.adapter, closing.base.settings.path)


def close_run(closing: Closing, exported: Exported, scores: Scores) -> dict[str, Any]:
    """Write ``summary.json`` and return its content.

    Raises:
        JournalError: the record cannot be read, or the disk is full.
    """
    recipe, state, base = closing.recipe, closing.state, closing.base
    with RunReader(closing.place.root) as reader:
        applied = [
            UploadFact(upload.client_id or 0, upload.staleness or 0)
            for upload in reader.uploads("applied")
        ]
        rejections = reader.rejections()
    facts = RunFacts(
        strategy=recipe.strategy.rule,
        seed=recipe.seed,
        client_ids=tuple(closing.client_ids),
        applied=applied,
        rejections=rejections,
        scorer=recipe.evaluation.scorer,
        base_loss=None if scores.before is None else scores.before.loss,
        final_loss=None if scores.after is None else scores.after.loss,
        base_score=None if scores.before is None else scores.before.score,
        final_score=None if scores.after is None else scores.after.score,
        client_losses={client_id: found.loss for client_id, found in scores.clients.items()},
        virtual_time_s=closing.time_s,
        synchronous_time_s=closing.synchronous_time_s,
        server_version=state.version,
        wall_time_s=closing.wall_time_s,
        extra={
            "recipe_sha256": closing.recipe_sha256,
            "stop_reason": str(state.stopped),
            "adapter_checksum": state.adapter.checksum,
            "adapter_rank": exported.rank,
            "export_truncation": exported.truncation,
            "adapter_parameters": base.adapter_parameters,
            "base_parameters": base.num_parameters,
            **closing.extra,
        },
    )
    summary = summarise(facts)
    write_summary(closing.place.summary, summary)
    return summary


__all__ = ["Closing", "Scores", "close_run", "export_adapter", "final_adapter"]
