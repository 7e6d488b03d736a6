"""Run a recipe in a directory, interrupt it, resume it: the commands as functions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from alignfed.build import Simulation, build_simulation
from alignfed.config import Recipe, default_recipe, load_recipe
from alignfed.errors import AlignFedError, JournalError
from alignfed.inputs import CONTENT, fingerprint_examples, fingerprint_files, refuse_changes
from alignfed.journal import (
    RunDirectory,
    RunMeta,
    SqliteJournal,
    facts_of,
    write_text_atomically,
)
from alignfed.progress import ProgressView, SilentView
from alignfed.running import CHECKPOINT_EVERY_S, Run, RunResult
from alignfed.version import __version__


def simulate(
    recipe: Recipe | Path | str | None = None,
    directory: Path | str = Path("runs/alignfed"),
    *,
    overrides: Sequence[str] = (),
    view: ProgressView | None = None,
    keep_payloads: bool = False,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    build: Callable[[Recipe], Simulation] = build_simulation,
) -> RunResult:
    """Run a recipe on a virtual clock and keep everything in a new directory.

    Args:
        recipe: a recipe, the path of one, or None for the built-in default.
        directory: where to keep the run; made if missing, refused if it holds a run.
        overrides: ``key=value`` changes, where ``recipe`` is a path or None.
        view: watches the run.
        keep_payloads: keep every upload, so that ``replay`` can begin at the start; else those
            since the oldest checkpoint that is kept.
        checkpoint_every_s: real seconds between checkpoints.
        build: makes a recipe's objects; who runs many recipes may share what is loaded.

    Raises:
        AlignFedError: something the recipe asks for does not exist or does not fit.
        KeyboardInterrupt: interrupted; ``resume`` goes on.
    """
    if not isinstance(recipe, Recipe):
        recipe = default_recipe(overrides) if recipe is None else load_recipe(recipe, overrides)
    elif overrides:
        raise AlignFedError("overrides change a recipe that is loaded here, not one passed whole")
    place = RunDirectory(Path(directory))
    if place.holds_run() or place.summary.exists():
        raise JournalError(
            f"{place.root} already holds a run; resume it with: alignfed resume {place.root},"
            " or choose another directory",
            path=str(place.root),
        )
    began_s = time.monotonic()
    files = fingerprint_files(recipe)
    with closing(build(recipe)) as simulation:
        text = simulation.recipe.to_toml()
        _make_directory(place.root)
        write_text_atomically(place.recipe, text)
        inputs = json.dumps({**files, CONTENT: fingerprint_examples(simulation)})
        facts = facts_of(simulation.parts.coordinator, keep_payloads=keep_payloads)
        meta = RunMeta(__version__, _sha256(text), recipe.seed, inputs, facts.to_text())
        with SqliteJournal.create(place.root, meta) as journal:
            run = Run(simulation, place, journal, view or SilentView(), began_s, checkpoint_every_s)
            return run.go_on(None, resumed=False)


def resume(
    directory: Path | str,
    *,
    view: ProgressView | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    build: Callable[[Recipe], Simulation] = build_simulation,
) -> RunResult:
    """Go on with a run that was interrupted, to the result of an uninterrupted one.

    A run that has finished is shown again and nothing is computed.

    Raises:
        JournalError: there is no run, it is in use, damaged, or its recipe was changed.
        KeyboardInterrupt: interrupted again.
    """
    place, view = RunDirectory(Path(directory)), view or SilentView()
    if not place.holds_run():
        raise JournalError(
            f"{place.root} holds no run: {place.journal.name} is missing; check the path",
            path=str(place.root),
        )
    began_s = time.monotonic()
    recipe = load_recipe(place.recipe)
    recipe_sha256 = _sha256(place.recipe.read_text(encoding="utf-8"))
    warnings: tuple[str, ...] = ()
    if place.summary.exists():
        summary = _whole_summary(place, recipe_sha256)
        if summary is not None:
            view.finished(summary)
            return RunResult(place.root, summary)
        warnings = (f"{place.summary} was damaged and is written anew",)
    with SqliteJournal(place.root) as journal:
        files = fingerprint_files(recipe)
        known = journal.meta.get("inputs", "{}")
        if journal.meta["recipe_sha256"] == recipe_sha256:  # else recovery refuses by the recipe
            refuse_changes(known, files, place.root)
        with closing(build(recipe)) as simulation:
            run = Run(simulation, place, journal, view, began_s, checkpoint_every_s)
            recovered = run.checkpoints.recover(recipe_sha256=recipe_sha256)
            examples = {CONTENT: fingerprint_examples(simulation)}
            refuse_changes(known, {**files, **examples}, place.root)
            run.warnings = (*warnings, *recovered.warnings)
            run.expected_cohorts.extend(recovered.undone_cohorts)
            return run.go_on(recovered.state, resumed=True)


def _whole_summary(place: RunDirectory, recipe_sha256: str) -> dict[str, Any] | None:
    """Return the content of ``summary.json``; None where it is damaged.

    Raises:
        JournalError: it belongs to another recipe than ``recipe.toml``.
    """
    try:
        summary = json.loads(place.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or "recipe_sha256" not in summary:
        return None
    if summary["recipe_sha256"] != recipe_sha256:
        raise JournalError(
            f"{place.summary} is of another recipe (SHA-256 {str(summary['recipe_sha256'])[:12]},"
            f" {place.recipe.name} has {recipe_sha256[:12]}); put the recipe back as it was, or"
            " begin a new run in another directory",
            path=str(place.summary),
        )
    return summary


def _make_directory(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(
            f"the run's directory {root} cannot be made: {error}; choose another with --out",
            path=str(root),
        ) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
