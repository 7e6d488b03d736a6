"""A deployment's status and logs on a console."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from alignfed.cli.words import decimal, duration, percent, size
from alignfed.errors import DeploymentError
from alignfed.training.naming import nearest_name


def print_server(console: Console, picture: Mapping[str, Any]) -> None:
    """Show a server: the run, its devices, refusals, processes and warnings."""
    _print_run(console, picture["run"], running=picture["running"])
    console.print(_devices(picture["devices"]))
    if picture["refusals"]:
        console.print(_refusals(picture))
    if picture["processes"]:
        console.print(_processes(picture["processes"], running=picture["running"]))
    refused = {
        name.removeprefix("refused_"): number
        for name, number in picture["proxy"].items()
        if name.startswith("refused_")
    }
    if refused:
        words = ", ".join(f"{number} {name}" for name, number in sorted(refused.items()))
        _say(console, f"turned away at the proxy since its start: {words}")
    for warning in picture["warnings"]:
        _say(console, f"warning: {warning}")


def print_device(console: Console, picture: Mapping[str, Any]) -> None:
    """Show a device: processes, trainer, and what waits for the server."""
    if picture["processes"]:
        console.print(_processes(picture["processes"], running=picture["running"]))
    else:
        _say(console, "never started")
    trainer = picture["trainer"]
    if trainer:
        _say(
            console,
            f"trainer {trainer.get('state')}: {trainer.get('tasks')} tasks,"
            f" model loaded {trainer.get('model_loads')} times",
        )
        if trainer.get("last_error"):
            _say(console, f"last error: {trainer['last_error']}")
    waiting = picture["waiting"]
    if waiting:
        _say(
            console,
            f"{waiting} finished uploads wait for the server ({size(picture['outbox_bytes'])})",
        )


def print_logs(console: Console, folder: Path) -> None:
    """List the logs in a folder.

    Raises:
        DeploymentError: there are none.
    """
    found = sorted(folder.glob("*.log"))
    if not found:
        raise DeploymentError(f"{folder} holds no logs; nothing was started here yet")
    table = Table("log", "size", "file")
    for path in found:
        table.add_row(path.stem, size(path.stat().st_size), str(path))
    console.print(table)


def print_log(folder: Path, name: str, lines: int) -> None:
    """Write the last lines of a log to standard output.

    Raises:
        DeploymentError: there is no such log.
    """
    path = folder / f"{name}.log"
    known = [one.stem for one in sorted(folder.glob("*.log"))]
    if name not in known:
        near = nearest_name(name, known) or f"; there are {', '.join(known) or 'none'}"
        raise DeploymentError(f"there is no log {name!r} in {folder}{near}", name=name)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines):
            typer.echo(line.rstrip("\n"))


def _print_run(console: Console, run: Mapping[str, Any] | None, *, running: bool) -> None:
    state = "running" if running else "not running"
    if run is None:
        _say(console, f"server {state}; no run has begun")
        return
    if run.get("stopped"):
        state += f", run over ({run['stopped']})"
    cells = [
        ("server", state),
        ("version", str(run.get("version"))),
        ("time", duration(run.get("time_s"))),
        ("uploads", f"{run.get('accepted')} accepted of {run.get('received')}"),
        ("in flight", str(run.get("in_flight"))),
        ("buffered", str(run.get("buffered"))),
        (
            "staleness",
            f"{decimal(run.get('staleness_mean'), 1)} mean, {_shown(run.get('staleness_max'))} max",
        ),
        ("loss", decimal(run.get("loss"))),
        ("score", percent(run.get("score"))),
        ("sent", size(run.get("sent_bytes"))),
        ("received", size(run.get("received_bytes"))),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in cells:
        grid.add_row(name, value)
    console.print(grid)


def _devices(devices: list[Mapping[str, Any]]) -> Table:
    table = Table(title="devices", title_justify="left", box=SIMPLE)
    for name in ("device", "client", "state", "task", "uploads", "refused", "failed"):
        table.add_column(name, no_wrap=True, justify="left" if name == "device" else "right")
    table.add_column("last error")
    for one in devices:
        table.add_row(
            one["name"],
            str(one["client_id"]),
            one["state"],
            _shown(one.get("task_id")),
            _shown(one.get("received")),
            _shown(one.get("refused")),
            _shown(one.get("failures")),
            str(one.get("last_error") or ""),
        )
    return table


def _refusals(picture: Mapping[str, Any]) -> Table:
    words = ", ".join(f"{number} {reason}" for reason, number in picture["refusals"].items())
    table = Table(
        "at",
        "client",
        "task",
        "reason",
        "detail",
        title=f"uploads refused: {words}",
        title_justify="left",
        box=SIMPLE,
    )
    for one in picture["last_refusals"]:
        table.add_row(
            duration(one["time_s"]),
            _shown(one["client_id"]),
            _shown(one["task_id"]),
            _shown(one["reason"]),
            _shown(one["detail"]),
        )
    return table


def _processes(processes: Mapping[str, Mapping[str, Any]], *, running: bool) -> Table:
    table = Table(
        "process",
        "pid",
        "up",
        "restarts",
        "last exit",
        "last words",
        title="processes",
        title_justify="left",
        box=SIMPLE,
    )
    for name, one in processes.items():
        table.add_row(
            name,
            _shown(one["pid"] if running else None),
            duration(one["up_s"] if running else None),
            str(one["restarts"]),
            _shown(one["last_exit"]),
            str(one["last_error"] or ""),
        )
    return table


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
