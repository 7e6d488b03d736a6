"""Curves of a comparison as PNG: loss and score against virtual time, uploads and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignfed.errors import JournalError

AXES = (
    ("time_s", "virtual time (s)", 1.0),
    ("uploads", "uploads", 1.0),
    ("bytes", "bytes moved (MB)", 1e-6),
)

POINTS = 200
"""Places on an axis at which the seeds' curves are averaged."""

Floats = npt.NDArray[np.float64]


def draw_curves(root: Path, figures: Mapping[str, Any]) -> tuple[Path, ...]:
    """Draw ``loss.png``, and ``score.png`` where there are scores; return what was written.

    Each rule has a line, its mean over seeds, and a band, one standard deviation to either side.

    Raises:
        JournalError: a picture cannot be written.
    """
    files = []
    for measure, label in (("loss", "loss (nats)"), ("score", figures["scorer"].replace("_", " "))):
        strategies = {
            name: curves
            for name, one in figures["strategies"].items()
            if (curves := [curve for curve in one["curves"] if _has(curve, measure)])
        }
        if strategies:
            files.append(_draw(root / f"{measure}.png", measure, label, strategies, figures))
    return tuple(files)


def mean_curve(
    curves: Sequence[Mapping[str, Sequence[float | None]]], axis: str, measure: str
) -> tuple[Floats, Floats, Floats]:
    """Return places on an axis, and the mean and deviation of the seeds' curves there.

    Between evaluations the last one counts: nothing is known to have happened since. The places
    end where the first seed ends, so that each is a mean of all.
    """
    known = [
        [(x, y) for x, y in zip(curve[axis], curve[measure], strict=True) if y is not None]
        for curve in curves
    ]
    ends = [float(pairs[-1][0] or 0.0) for pairs in known]
    places = np.linspace(max(float(pairs[0][0] or 0.0) for pairs in known), min(ends), POINTS)
    values = []
    for pairs in known:
        at = np.array([x for x, _ in pairs], dtype=np.float64)
        heights = np.array([y for _, y in pairs], dtype=np.float64)
        values.append(heights[np.searchsorted(at, places, side="right") - 1])
    stacked = np.stack(values)
    deviation = stacked.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(POINTS)
    return places, stacked.mean(axis=0), deviation


def _has(curve: Mapping[str, Sequence[float | None]], measure: str) -> bool:
    return any(value is not None for value in curve[measure])


def _draw(
    path: Path,
    measure: str,
    label: str,
    strategies: Mapping[str, Sequence[Any]],
    figures: Mapping[str, Any],
) -> Path:
    # Loaded here: it takes a second, and only a study that has ended needs it. Drawing on the
    # figure itself leaves pyplot, and whatever windows somebody has open, alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, words, scale) in zip(panels, AXES, strict=True):
        for name, curves in strategies.items():
            places, mean, deviation = mean_curve(curves, axis, measure)
            (line,) = panel.step(places * scale, mean, where="post", label=name)
            panel.fill_between(
                places * scale,
                np.maximum(mean - deviation, 0.0),
                mean + deviation if measure == "loss" else np.minimum(mean + deviation, 1.0),
                step="post",
                alpha=0.2,
                color=line.get_color(),
                linewidth=0,
            )
        if figures["target"]["measure"] == measure:
            panel.axhline(figures["target"]["value"], color="grey", linestyle=":", linewidth=1)
        panel.set_xlabel(words)
        panel.grid(alpha=0.3)
    if measure == "loss" and _spans_decades(strategies):
        panels[0].set_yscale("log")
    panels[0].set_ylabel(label)
    panels[-1].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None})
    except OSError as error:
        raise JournalError(f"{path} could not be written: {error}", path=str(path)) from error
    return path


def _spans_decades(strategies: Mapping[str, Sequence[Any]]) -> bool:
    losses = [
        loss
        for curves in strategies.values()
        for curve in curves
        for loss in curve["loss"]
        if loss is not None and loss > 0
    ]
    return bool(losses) and math.log10(max(losses) / min(losses)) > 1.5
