"""The path of the last versions, and the valley that it goes around.

Long steps on stale updates swing: the versions then lie on both sides of a valley, and their mean
is in it (averaging iterates: Polyak and Juditsky 1992). It shows by a calibration loss lower than
that of every version it was made of. The mean of a path that leads down lies behind its end, that
of one that leads up behind its beginning, so neither is turned back by this: where clients hold a
few classes each, a run has to go up before it goes down. A path that has left its best version some
way behind, and whose mean is clearly better than its end, has been round the valley too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignfed.core.adapter import Adapter
from alignfed.core.ports import LoraRule

LEAST_VERSIONS = 4
"""Versions that a path must hold before its mean is looked at."""


@dataclass(frozen=True, slots=True)
class Path:
    """The versions since a mean was last taken in their place.

    Attributes:
        mean: of the versions; of the last ones, exponentially, past the window.
        versions: how many it counts for.
    """

    mean: Adapter
    versions: int


def lead_on(path: Path | None, start: Adapter, end: Adapter, lora: LoraRule, window: int) -> Path:
    """Return the path with one more version.

    Args:
        path: the path so far; None begins one.
        start: the version before, where a path begins.
        end: the next version.
        lora: in whose space versions are averaged.
        window: versions at most that the mean counts for, or ``LEAST_VERSIONS``.
    """
    path = path or Path(start, 1)
    versions = min(path.versions + 1, max(LEAST_VERSIONS, window))
    mean = lora.combine(path.mean, [(1.0 / versions, end, path.mean)])
    return Path(mean, versions)


def swings(losses: Sequence[float]) -> bool:
    """Return whether a path may go around a valley: it is long enough, and its end not its best.

    Args:
        losses: calibration losses of its versions, in order.
    """
    return len(losses) >= LEAST_VERSIONS and losses[-1] > min(losses)


def in_valley(loss: float, losses: Sequence[float], margin: float) -> bool:
    """Return whether the mean of a path is to be the next version.

    So it is where it is better than each of the path's versions; or better than its end by more
    than ``margin``, if the best of them lies ``LEAST_VERSIONS`` behind.

    Args:
        loss: calibration loss of the mean.
        losses: calibration losses of the path's versions, in order.
        margin: as a share of the end's loss.
    """
    best, end = min(losses), losses[-1]
    # The last of equals: a step that was given up leaves the version where it was.
    since = losses[::-1].index(best)
    return loss < best or (since >= LEAST_VERSIONS and loss < end - margin * abs(end))
