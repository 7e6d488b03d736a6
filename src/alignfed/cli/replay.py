"""``alignfed replay``: a recorded run handled again, and the first thing that is different."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignfed.cli.refusal import refusing
from alignfed.cli.words import duration

if TYPE_CHECKING:
    from alignfed.journal.rehandle import Rehandled
    from alignfed.replaying import ReplayResult

DIVERGED = 1
"""Exit code where the replay and the record are not the same."""


@refusing
def replay(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory, simulated or deployed.")
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="Largest relative difference of numbers and adapters; [b]0[/b] asks for equal "
            "bits. If left out: 0 on the platform the run was computed on, 1e-4 elsewhere.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print every event and what it led to."),
    ] = False,
) -> None:
    """Handle a run's recorded events again and compare every instruction and server version.

    Nothing is trained, and neither model nor data is needed: uploads, evaluations and the
    calibration set's answers come from the directory, which is only read.

    It begins at the oldest checkpoint kept: the start of a run that keeps its payloads, else one
    not long before the end.

    The first difference ends it with exit code 1, and with what was expected and what came.
    """
    from alignfed import replaying

    console = Console()
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    begun_s = time.monotonic()
    with Progress(
        TextColumn("replaying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("events"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("events", total=None)

        def watch(one: Rehandled, total: int) -> None:
            bar.update(task, advance=1, total=total)
            if verbose:
                for line in narrate(one):
                    show(line)

        result = replaying.replay(directory, tolerance=tolerance, watch=watch)
    for line in report(result, time.monotonic() - begun_s):
        show(line)
    if result.divergence is not None:
        raise typer.Exit(DIVERGED)


def narrate(one: Rehandled) -> list[str]:
    """Return an event and what is on record of it as lines of text."""
    from alignfed.journal.rehandle import describe

    row = one.recorded.row
    told = [f"  {describe(instruction)}" for instruction in one.recorded.instructions]
    return [f"row {row.seq}, {row.time_s:.6g} s: {describe(row)}", *told]


def report(result: ReplayResult, taken_s: float) -> list[str]:
    """Return what a replay found as lines of text."""
    from alignfed.journal.rehandle import describe

    lines = [f"warning: {warning}" for warning in result.warnings]
    start = "the start" if result.began_after == 0 else f"row {result.began_after}"
    done = (
        f"{result.events} events from {start} on: {result.instructions} instructions and"
        f" {result.versions} server versions"
    )
    found = result.divergence
    if found is None:
        how = "bit for bit" if result.exact else f"within {result.tolerance:g}"
        return [*lines, f"{done} reproduced, {how} ({duration(taken_s)})"]
    event = found.event
    lines.append(
        f"DIVERGED at row {event.seq}, {event.time_s:.6g} s: {describe(event, body=False)}"
    )
    if found.position is not None:
        lines.append(f"  in instruction {found.position + 1} of that event")
        lines.append(f"  expected: {describe(found.expected)}")
        lines.append(f"  came:     {describe(found.came)}")
    lines.append(f"  {found.difference}")
    lines.append(f"{done} were reproduced before that")
    return lines
