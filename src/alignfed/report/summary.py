"""The numbers of ``summary.json``, from a run's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignfed.report.fairness import jain_index, worst_tenth_mean


@dataclass(frozen=True, slots=True)
class UploadFact:
    """One applied upload: whose, and how many versions late."""

    client_id: int
    staleness: int


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a finished run leaves for its summary.

    Attributes:
        strategy: name of the aggregation rule.
        seed: the recipe's seed.
        client_ids: every client of the fleet.
        applied: applied uploads in order.
        rejections: refused uploads by reason.
        scorer: what ``base_score`` and ``final_score`` measure.
        base_loss: loss of version 0 on the common evaluation set, in nats (None: there is no
            such set).
        final_loss: the same of the final version.
        base_score: score of version 0, in [0, 1].
        final_score: score of the final version, in [0, 1].
        client_losses: final loss on each client's own held-out slice, in nats.
        virtual_time_s: the driver's clock at the end: virtual, or on real devices seconds.
        synchronous_time_s: virtual time of a synchronous FedAvg doing as many uploads on the
            same device trace, by the clock alone.
        server_version: the final version.
        wall_time_s: real seconds spent, all resumed parts together.
        extra: further figures, kept as they are.
    """

    strategy: str
    seed: int
    client_ids: Sequence[int]
    applied: Sequence[UploadFact]
    rejections: Mapping[str, int]
    scorer: str
    base_loss: float | None
    final_loss: float | None
    base_score: float | None
    final_score: float | None
    client_losses: Mapping[int, float]
    virtual_time_s: float
    synchronous_time_s: float | None
    server_version: int
    wall_time_s: float
    extra: Mapping[str, Any] = field(default_factory=dict)


def summarise(facts: RunFacts) -> dict[str, Any]:
    """Return the summary as JSON-ready values; what does not apply is None."""
    counts = Counter(upload.client_id for upload in facts.applied)
    staleness = [upload.staleness for upload in facts.applied]
    losses = list(facts.client_losses.values())
    speedup = (
        facts.synchronous_time_s / facts.virtual_time_s
        if facts.synchronous_time_s and facts.virtual_time_s > 0
        else None
    )
    return {
        "strategy": facts.strategy,
        "seed": facts.seed,
        "clients": len(facts.client_ids),
        "clients_participating": len(counts),
        "base_eval_loss": facts.base_loss,
        "final_eval_loss": facts.final_loss,
        "scorer": facts.scorer,
        "base_exact_match": facts.base_score,
        "final_exact_match": facts.final_score,
        "virtual_time_s": facts.virtual_time_s,
        "synchronous_virtual_time_s": facts.synchronous_time_s,
        "speedup_over_synchronous": speedup,
        "uploads": len(facts.applied),
        "server_version": facts.server_version,
        "staleness_mean": sum(staleness) / len(staleness) if staleness else None,
        "staleness_max": max(staleness, default=None),
        "rejected": sum(facts.rejections.values()),
        "rejections": dict(facts.rejections),
        "participation_jain": jain_index([counts[cid] for cid in facts.client_ids]),
        "client_loss_mean": sum(losses) / len(losses) if losses else None,
        "client_loss_worst10": worst_tenth_mean(losses) if losses else None,
        "wall_time_s": facts.wall_time_s,
        **facts.extra,
    }
