"""What is done to a server step before it is published."""

from __future__ import annotations

import math

from alignfed.core.adapter import Adapter
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import Step


def with_layout(adapter: Adapter, like: Adapter) -> Adapter:
    """Return an adapter of equal layout with the very same one, so that nobody compares again."""
    return adapter if adapter.layout is like.layout else Adapter(like.layout, adapter.buffers)


def refused(step: Step, adapter: Adapter) -> Step:
    """A step with NaN or infinite elements leaves the model as it is, and the record says so."""
    return Step(
        adapter=adapter,
        weights=tuple(0.0 for _ in step.weights),
        notes={
            **{name: value for name, value in step.notes.items() if math.isfinite(value)},
            "step_refused": 1.0,
        },
        work=ServerWork(step.work.bytes_moved, step.work.calibration_tokens),
    )
