"""What a device's trainer says about itself in a file. No torch here: its client reads it too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    """What a trainer says about itself, over all its restarts.

    Attributes:
        model_loads: how often a base model was loaded for this device.
        tasks: tasks trained.
        pid: the process that wrote this.
        state: "loading", "ready" or "training".
        last_error: the latest error in words.
        step_s: seconds a local step took when the trainer came up; None before that.
    """

    model_loads: int = 0
    tasks: int = 0
    pid: int = 0
    state: str = "loading"
    last_error: str = ""
    step_s: float | None = None


def read_status(path: Path) -> TrainerStatus:
    """Return what a device's trainer last said; the beginning where it has said nothing."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return TrainerStatus(**found)
    except (OSError, ValueError, TypeError):
        return TrainerStatus()
