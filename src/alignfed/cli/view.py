"""A run as it is watched: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alignfed.cli.summary import summary_table
from alignfed.cli.words import count, decimal, duration, percent
from alignfed.progress import RunInfo, RunSnapshot, fraction_done

PLAIN_EVERY_S = 5.0
"""Wall-clock seconds between lines where the output is no terminal."""


class UnheardConsole(Console):
    """Falls silent where its reader has gone: a run is worth more than its words.

    So ``alignfed simulate | head -1`` finishes, keeps its results and ends with exit code 0.
    """

    def on_broken_pipe(self) -> None:
        """Say nothing more, and let nobody else trip over the closed pipe."""
        self.quiet = True
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stdout.fileno())
        os.close(silence)


class RunView:
    """Implements ``alignfed.progress.ProgressView`` on a console."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Show a run on ``console``; ``clock`` gives wall-clock seconds for the time left."""
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._info: RunInfo | None = None
        self._first: tuple[float, float] | None = None
        self._line_at_s = float("-inf")
        self._last: RunSnapshot | None = None
        self._printed: RunSnapshot | None = None
        self._closed = False

    def started(self, info: RunInfo) -> None:
        """Say what runs where, and open the live panel on a terminal."""
        self._info = info
        verb = "resuming" if info.resumed else "running"
        self._console.print(
            f"{verb} {info.name}: {info.strategy} ({info.lora}),"
            f" {info.clients} clients on {info.fleet}, {info.concurrency} in flight,"
            f" buffer {info.buffer_size}\n"
            f"{info.model}, {count(info.base_parameters)} parameters frozen,"
            f" {count(info.adapter_parameters)} trained; keeping everything in {info.directory}",
            highlight=False,
            markup=False,
            soft_wrap=not self._console.is_terminal,
        )
        for warning in info.warnings:
            self._console.print(f"warning: {warning}", highlight=False, markup=False)
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, refresh_per_second=8, get_renderable=self._panel
            )
            self._live.start()

    def progress(self, snapshot: RunSnapshot) -> None:
        """Keep the latest figures; write a line now and then where nothing is redrawn."""
        now_s = self._clock()
        known = 0 if self._last is None else len(self._last.notes)
        self._last = snapshot
        for note in snapshot.notes[known:]:
            self._console.print(f"note: {note}", highlight=False, markup=False)
        if self._first is None:
            self._first = (now_s, self._fraction(snapshot) or 0.0)
        if self._live is None and now_s - self._line_at_s >= PLAIN_EVERY_S:
            self._line_at_s = now_s
            self._print_line(snapshot)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Close the panel and show the closing table."""
        self.close()
        self._console.print(summary_table(summary))

    def close(self) -> None:
        """Leave the terminal as it was found; calling it again changes nothing."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._last is not None and self._last is not self._printed:
            self._print_line(self._last)

    def time_left_s(self, snapshot: RunSnapshot) -> float | None:
        """Return wall-clock seconds to the nearest stop condition at the pace so far."""
        fraction = self._fraction(snapshot)
        if fraction is None or self._first is None:
            return None
        started_s, began = self._first
        if fraction <= began:
            return None
        return (self._clock() - started_s) * (1.0 - fraction) / (fraction - began)

    def _fraction(self, snapshot: RunSnapshot) -> float | None:
        return None if self._info is None else fraction_done(self._info.limits, snapshot)

    def _panel(self) -> Group | Text:
        if self._last is None:
            return Text("preparing ...", style="dim")
        bar = Table.grid()  # a bare bar ends without a line break
        bar.add_row(ProgressBar(total=1.0, completed=self._fraction(self._last) or 0.0, width=60))
        return Group(bar, self._figures(self._last))

    def _figures(self, snapshot: RunSnapshot) -> Table:
        grid = Table.grid(padding=(0, 2))
        cells = self._cells(snapshot)
        for _ in cells:
            grid.add_column(justify="right")
        grid.add_row(*(Text(name, style="dim") for name, _ in cells))
        grid.add_row(*(value for _, value in cells))
        return grid

    def _print_line(self, snapshot: RunSnapshot) -> None:
        self._printed = snapshot
        line = "  ".join(f"{name} {value}" for name, value in self._cells(snapshot))
        self._console.print(line, highlight=False, soft_wrap=True)

    def _cells(self, snapshot: RunSnapshot) -> list[tuple[str, str]]:
        limits = self._info.limits if self._info is not None else None
        uploads = str(snapshot.uploads)
        if limits is not None and limits.uploads is not None:
            uploads = f"{uploads}/{limits.uploads}"
        cells = [
            (
                self._info.clock if self._info is not None else "virtual time",
                duration(snapshot.virtual_time_s),
            ),
            ("version", str(snapshot.version)),
            ("uploads", uploads),
            ("staleness", decimal(snapshot.staleness_mean, 1)),
            ("loss", decimal(snapshot.loss)),
            ("score", percent(snapshot.score)),
            ("in flight", str(snapshot.in_flight)),
            ("left", duration(self.time_left_s(snapshot))),
        ]
        if snapshot.rejected:
            cells.insert(3, ("refused", str(snapshot.rejected)))
        return [cell for cell in cells if cell[0] != "score" or snapshot.score is not None]
