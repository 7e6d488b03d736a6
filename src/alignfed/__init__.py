"""Asynchronous federated LoRA fine-tuning of language models across unequal devices.

>>> import alignfed
>>> recipe = alignfed.load_recipe("recipes/dolly.toml", ["data.path=my/folder"])
>>> result = alignfed.simulate(recipe, "runs/dolly")  # doctest: +SKIP
>>> result.summary["final_eval_loss"]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignfed.api import resume, simulate
    from alignfed.config import Recipe, default_recipe, load_recipe
    from alignfed.errors import AlignFedError
    from alignfed.replaying import ReplayResult, replay
    from alignfed.running import RunResult
    from alignfed.sanitizing import Sanitized, sanitize
    from alignfed.study.ablation import ablate
    from alignfed.study.comparison import StudyResult, compare

_WHERE = {
    "AlignFedError": "alignfed.errors",
    "Recipe": "alignfed.config",
    "ReplayResult": "alignfed.replaying",
    "RunResult": "alignfed.running",
    "Sanitized": "alignfed.sanitizing",
    "StudyResult": "alignfed.study.comparison",
    "ablate": "alignfed.study.ablation",
    "compare": "alignfed.study.comparison",
    "default_recipe": "alignfed.config",
    "load_recipe": "alignfed.config",
    "replay": "alignfed.replaying",
    "resume": "alignfed.api",
    "sanitize": "alignfed.sanitizing",
    "simulate": "alignfed.api",
}

__all__ = [
    "AlignFedError",
    "Recipe",
    "ReplayResult",
    "RunResult",
    "Sanitized",
    "StudyResult",
    "ablate",
    "compare",
    "default_recipe",
    "load_recipe",
    "replay",
    "resume",
    "sanitize",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package must not import torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
