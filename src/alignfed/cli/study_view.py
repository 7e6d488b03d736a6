"""A study as it is watched: bars on a terminal, a line for each finished part anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from alignfed.cli.words import duration
from alignfed.study.bench import Order
from alignfed.study.running import StudyInfo


class StudyScreen:
    """Implements ``alignfed.study.running.StudyView`` on a console."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Show a study on ``console``; ``clock`` gives wall-clock seconds."""
        self._console = console
        self._clock = clock
        self._progress: Progress | None = None
        self._whole: TaskID | None = None
        self._parts: dict[str, TaskID] = {}
        self._began_s: dict[str, float] = {}
        self._done = 0
        self._total = 0
        self._first_s: float | None = None
        self._first_done = 0

    def started(self, info: StudyInfo) -> None:
        """Say what is studied, and open the bars on a terminal."""
        self._total = info.total
        self._say(
            f"{info.name}: {info.question}\n{info.total} parts, {info.jobs} at a time; keeping"
            f" everything in {info.directory}"
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._whole = self._progress.add_task("all", total=info.total, left="")
            self._progress.start()

    def found(self, count: int) -> None:
        """Count parts that were finished before."""
        if not count:
            return
        self._done += count
        self._first_done += count
        self._advance()
        self._say(f"[{self._done}/{self._total}] {count} parts were finished before")

    def began(self, order: Order) -> None:
        """Open a bar for a part."""
        now_s = self._clock()
        self._began_s[order.key] = now_s
        if self._first_s is None:
            self._first_s, self._first_done = now_s, self._done
        if self._progress is not None:
            self._parts[order.key] = self._progress.add_task(order.key, total=100, left="")

    def advanced(self, order: Order, share: float) -> None:
        """Move a part's bar."""
        if self._progress is not None:
            self._progress.update(self._parts[order.key], completed=round(100 * share))

    def ended(self, order: Order) -> None:
        """Close a part's bar; write a line where nothing is redrawn."""
        self._done += 1
        took_s = self._clock() - self._began_s[order.key]
        if self._progress is not None:
            self._progress.remove_task(self._parts.pop(order.key))
        else:
            left = self.time_left_s()
            about = f", about {duration(left)} left" if left else ""
            self._say(f"[{self._done}/{self._total}] {order.key}: {duration(took_s)}{about}")
        self._advance()

    def finished(self, files: Sequence[Path]) -> None:
        """Close the bars, show the table and name the files."""
        self.close()
        for file in files:
            if file.suffix == ".md":
                text = file.read_text(encoding="utf-8")
                self._console.print(Markdown(text) if self._console.is_terminal else text)
        self._say(f"written: {', '.join(str(file) for file in files)}")

    def close(self) -> None:
        """Leave the terminal as it was found; calling it again changes nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def time_left_s(self) -> float | None:
        """Return wall-clock seconds to the end at the pace so far; None before there is one."""
        done = self._done - self._first_done
        if self._first_s is None or done <= 0:
            return None
        return (self._clock() - self._first_s) * (self._total - self._done) / done

    def _advance(self) -> None:
        if self._progress is not None and self._whole is not None:
            left = self.time_left_s()
            words = f"about {duration(left)} left" if left else ""
            self._progress.update(self._whole, completed=self._done, left=words)

    def _say(self, text: str) -> None:
        self._console.print(
            text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal
        )
