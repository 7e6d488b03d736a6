"""Figures of one row of a study, over seeds, as its JSON has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignfed.study.bench import EnvironmentFacts
from alignfed.study.measures import Target, measure, spread, time_spread
from alignfed.study.record import RunRecord


def figures_of(
    records: Sequence[RunRecord],
    facts: Sequence[EnvironmentFacts],
    seeds: Sequence[int],
    target: Target,
    finals: int,
) -> dict[str, Any]:
    """Return means and deviations over seeds, and the curve of each seed.

    Args:
        records: one run a seed.
        facts: the environment of each.
        seeds: in the same order.
        target: fixed beforehand.
        finals: final values are means over so many last evaluations.
    """
    found = [
        measure(record, target, finals=finals, slow_clients=one.slow_clients)
        for record, one in zip(records, facts, strict=True)
    ]

    def over_seeds(name: str) -> dict[str, float | None]:
        return spread([_number(getattr(one, name)) for one in found])

    return {
        "final_eval_loss": over_seeds("final_loss"),
        "final_score": over_seeds("final_score"),
        "time_to_target_s": time_spread([one.time_to_target_s for one in found]),
        "worst10": over_seeds("worst10"),
        "worst10_loss": over_seeds("worst10_loss"),
        "client_variance": over_seeds("client_variance"),
        "client_jain": over_seeds("client_jain"),
        "participation_jain": over_seeds("participation_jain"),
        "slow_influence": over_seeds("slow_influence"),
        "staleness": {
            **over_seeds("staleness_mean"),
            "max": max((one.staleness_max or 0 for one in found), default=0),
            "histogram": _histogram(records),
        },
        **{
            name: spread([getattr(record, name) for record in records])
            for name in (
                "virtual_time_s",
                "trained_tokens",
                "uploaded_bytes",
                "downloaded_bytes",
                "rejected",
            )
        },
        "curves": [_curve(seed, record) for seed, record in zip(seeds, records, strict=True)],
    }


def target_json(target: Target) -> dict[str, Any]:
    """Return the target as JSON."""
    return {"measure": target.measure, "value": target.value}


def _number(value: float | int | None) -> float | None:
    return None if value is None else float(value)


def _histogram(records: Sequence[RunRecord]) -> dict[str, int]:
    counts: dict[int, int] = {}
    for record in records:
        for age, count in record.staleness.items():
            counts[age] = counts.get(age, 0) + count
    return {str(age): counts[age] for age in sorted(counts)}


def _curve(seed: int, record: RunRecord) -> dict[str, Any]:
    rows = record.evaluations
    return {
        "seed": seed,
        "time_s": [one.time_s for one in rows],
        "uploads": [one.uploads for one in rows],
        "tokens": [one.tokens for one in rows],
        "bytes": [one.transferred_bytes for one in rows],
        "loss": [one.loss for one in rows],
        "score": [one.score for one in rows],
    }
