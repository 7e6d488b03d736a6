"""Worker processes' common ancestor, started early. Nothing heavy is imported here.

Loading torch, transformers and PEFT takes seconds. The process that workers are forked from can do
it on another core while the run's own process does the same.
"""

from __future__ import annotations

import multiprocessing
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

BRIEF_UPLOADS = 32
"""So few of the built-in recipe's tasks are trained before workers would be up."""

_PRELOAD = "alignfed.training.worker_pool"


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_method() -> str:
    """Return how worker processes are started: forked from a server process where there is one."""
    known = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in known else "spawn"


def start_server() -> None:
    """Have the server process start to import what workers need; more than once is harmless."""
    if start_method() == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
        forkserver.ensure_running()


def start_server_if_likely(recipe: Path | None, overrides: Sequence[str]) -> None:
    """Start it where a recipe will probably use workers. A wrong guess costs no result.

    Args:
        recipe: the recipe's path, None for the built-in one. Not validated: that takes imports.
        overrides: ``key=value`` changes.
    """
    try:
        if recipe is None:
            text = (resources.files("alignfed.recipes") / "default.toml").read_text("utf-8")
        else:
            text = recipe.read_text("utf-8")
        tables = tomllib.loads(text)
    except (OSError, ValueError):
        return  # whoever reads it in earnest will say so
    changed = dict(one.split("=", 1) for one in overrides if "=" in one)

    def value(section: str, name: str, default: object) -> str:
        table: Any = tables.get(section)
        found = table.get(name, default) if isinstance(table, Mapping) else default
        return changed.get(f"{section}.{name}", str(found))

    workers, uploads = value("training", "workers", "auto"), value("stop", "uploads", "unset")
    if value("training", "workers_on", "processes") != "processes" or workers == "1":
        return
    if workers == "auto":
        brief = uploads.isdecimal() and int(uploads) < BRIEF_UPLOADS
        if brief or usable_cores() == 1 or value("model", "path", "builtin") != "builtin":
            return
    start_server()
