"""From records of runs to the figures that are compared. Pure: records in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev, variance
from typing import Any

from alignfed.report import jain_index, worst_tenth_mean
from alignfed.study.record import RunRecord


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached: at least a score, or at most a loss."""

    measure: str
    value: float

    def reached(self, loss: float | None, score: float | None) -> bool:
        """Return whether an evaluation reached it; what is not finite or not measured did not."""
        if self.measure == "score":
            return score is not None and score >= self.value
        return loss is not None and loss <= self.value


@dataclass(frozen=True, slots=True)
class RunMeasures:
    """The figures of one run; None: not measured.

    Attributes:
        final_loss: mean over the last evaluations, in nats (infinity: one was not finite).
        final_score: likewise, in [0, 1].
        time_to_target_s: virtual time of the first evaluation at the target (infinity: never).
        worst10: mean of the worst tenth of clients on their own held-out slices, over the last
            evaluations: of scores where there are scores, else of losses.
        worst10_loss: likewise, of losses always.
        client_variance: variance between clients of the same score or loss.
        client_jain: Jain's index of the same.
        participation_jain: Jain's index of applied uploads over clients.
        slow_influence: see ``slow_influence``.
        staleness_mean: over applied uploads.
        staleness_max: over applied uploads.
    """

    final_loss: float
    final_score: float | None
    time_to_target_s: float
    worst10: float | None
    worst10_loss: float | None
    client_variance: float | None
    client_jain: float | None
    participation_jain: float
    slow_influence: float | None
    staleness_mean: float | None
    staleness_max: int | None


def measure(
    record: RunRecord, target: Target, *, finals: int, slow_clients: Sequence[int]
) -> RunMeasures:
    """Return the figures of a run.

    Args:
        record: the run.
        target: fixed before anything was run.
        finals: final values are means over so many last evaluations.
        slow_clients: the slowest tenth.
    """
    last = record.evaluations[-finals:]
    losses, scores = [one.loss for one in last], [one.score for one in last]
    own_losses = [_known(one.losses) for one in record.clients[-finals:]]
    own_scores = [_known(one.scores) for one in record.clients[-finals:]]
    scored = any(own_scores)
    own = own_scores if scored else own_losses
    stale = sum(record.staleness.values())
    return RunMeasures(
        final_loss=_mean_or_infinity(losses),
        final_score=_mean_if_known(scores),
        time_to_target_s=time_to_target_s(record, target),
        worst10=_over(own, worst_tenth_of_scores if scored else worst_tenth_mean),
        worst10_loss=_over(own_losses, worst_tenth_mean),
        client_variance=_over(own, lambda values: variance(values) if len(values) > 1 else 0.0),
        client_jain=_over(own, jain_index),
        participation_jain=jain_index(list(record.uploads.values())),
        slow_influence=slow_influence(record.influence, slow_clients),
        staleness_mean=(
            sum(age * count for age, count in record.staleness.items()) / stale if stale else None
        ),
        staleness_max=max(record.staleness, default=None),
    )


def time_to_target_s(record: RunRecord, target: Target) -> float:
    """Return the virtual time of the first evaluation at the target; infinity: there is none."""
    return next(
        (one.time_s for one in record.evaluations if target.reached(one.loss, one.score)), math.inf
    )


def worst_tenth_of_scores(scores: Sequence[float]) -> float:
    """Return the mean of the lowest tenth (at least one) of the scores."""
    return -worst_tenth_mean([-score for score in scores])


def slow_influence(influence: Mapping[int, float], slow_clients: Sequence[int]) -> float | None:
    """Return the slow clients' share of all influence, over their share of the clients.

    A client's influence is the sum of ``|coefficient| x update norm`` over its applied uploads. 1
    means that slow clients move the model as much as others do; None, that nobody moved it.
    """
    total = math.fsum(influence.values())
    if not total or not slow_clients:
        return None
    share = math.fsum(influence.get(client_id, 0.0) for client_id in slow_clients) / total
    return share / (len(slow_clients) / len(influence))


def slowest_tenth(task_times_s: Mapping[int, float]) -> list[int]:
    """Return the ids of the tenth of clients (at least one) whose tasks take longest."""
    count = max(1, math.ceil(len(task_times_s) / 10))
    slowest = sorted(task_times_s, key=lambda client_id: (-task_times_s[client_id], client_id))
    return sorted(slowest[:count])


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and sample standard deviation; None where a value is missing or infinite.

    The deviation of a single value is None: one seed says nothing about spread.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values) or not known:
        return {"mean": None, "std": None}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None}


def time_spread(times_s: Sequence[float]) -> dict[str, Any]:
    """Return ``spread`` with the median and how many seeds reached the target.

    A seed that never does counts as infinite, so that the mean is None (infinite) with it.
    """
    middle = median(times_s)
    return {
        **spread(times_s),
        "median": middle if math.isfinite(middle) else None,
        "reached": sum(math.isfinite(time_s) for time_s in times_s),
        "seeds": [time_s if math.isfinite(time_s) else None for time_s in times_s],
    }


def _mean_if_known(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return fmean(known) if known and len(known) == len(scores) else None


def _known(values: Mapping[int, float | None]) -> list[float]:
    return [value for value in values.values() if value is not None]


def _over(evaluations: Sequence[Sequence[float]], figure: Any) -> float | None:
    """Return the mean of a figure of clients over evaluations."""
    found = [figure(values) for values in evaluations if values]
    return fmean(found) if found else None


def _mean_or_infinity(losses: Sequence[float | None]) -> float:
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else math.inf
