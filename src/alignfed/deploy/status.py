"""What a deployment is doing, put together from what its processes leave on disk.

Works while the server runs, after it has stopped, and on a copy of its directory.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from alignfed.deploy.directory import DeviceDirectory, ServerDirectory
from alignfed.deploy.pki import days_left, read_certificate
from alignfed.deploy.records import read_json
from alignfed.deploy.registry import load_registry
from alignfed.deploy.settings import ServerSettings
from alignfed.errors import JournalError
from alignfed.flower.outbox import Outbox
from alignfed.flower.status import ServerStatus
from alignfed.journal.reader import RunReader

RENEW_WITHIN_DAYS = 30
STALE_S = 30.0
"""A status file older than this says nothing about the present."""

SHOWN_REFUSALS = 8


def status_document(status: ServerStatus, now_s: float) -> dict[str, Any]:
    """Return what the ServerApp writes to ``status.json``.

    Args:
        status: as the driver keeps it.
        now_s: seconds since 1970.
    """
    document = asdict(status)
    document["clients"] = [asdict(one) for one in status.clients.values()]
    return {"written_s": now_s, **document}


def server_picture(
    directory: ServerDirectory, settings: ServerSettings, now: datetime.datetime
) -> dict[str, Any]:
    """Return everything known about a server, as plain values.

    Keys: ``running``, ``processes``, ``run`` (None before the first), ``devices``, ``refusals``
    (uploads by reason), ``last_refusals``, ``proxy``, ``certificate_days``, ``warnings``.

    Raises:
        DeploymentError: the registry or a certificate is damaged.
    """
    now_s = now.timestamp()
    written = read_json(directory.status)
    processes = read_json(directory.processes) or {}
    running = is_running(processes, now_s)
    days = {
        path.stem: days_left(read_certificate(path), now)
        for path in (
            directory.proxy_certificate,
            directory.superlink_certificate,
            directory.ca_certificate,
        )
    }
    run = run_figures(written, now_s)
    refusals, last = _refusals(directory, settings)
    return {
        "running": running,
        "processes": processes.get("processes", {}),
        "run": run,
        "devices": _devices(directory, written if running else None),
        "refusals": refusals,
        "last_refusals": last,
        "proxy": (read_json(directory.state / "proxy.json") or {}).get("counts", {}),
        "certificate_days": days,
        "warnings": _warnings(days, run, processes, running=running),
    }


def device_picture(directory: DeviceDirectory, now: datetime.datetime) -> dict[str, Any]:
    """Return everything known about a device where it lives, as plain values.

    Keys: ``running``, ``processes``, ``trainer``, ``waiting`` (uploads the server has not
    acknowledged), ``outbox_bytes``.
    """
    processes = read_json(directory.processes) or {}
    waiting, used_bytes = 0, 0
    if (file := directory.outbox / "outbox.sqlite").exists():
        with contextlib.closing(Outbox(file)) as outbox:
            waiting, used_bytes = outbox.waiting_of_all(), outbox.used_bytes
    return {
        "running": is_running(processes, now.timestamp()),
        "processes": processes.get("processes", {}),
        "trainer": read_json(directory.status) or {},
        "waiting": waiting,
        "outbox_bytes": used_bytes,
    }


def is_running(processes: Mapping[str, Any], now_s: float) -> bool:
    """Return whether a supervisor that wrote ``processes.json`` is at work."""
    pid, time_s = processes.get("pid"), processes.get("time_s")
    if not isinstance(pid, int) or not isinstance(time_s, int | float) or now_s - time_s > STALE_S:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, so alive
    return True


def run_figures(written: Mapping[str, Any] | None, now_s: float) -> dict[str, Any] | None:
    """Return what the ServerApp says of the run, with the age of its words; None before any."""
    if written is None:
        return None
    figures = {name: value for name, value in written.items() if name != "clients"}
    figures["age_s"] = max(0.0, now_s - float(figures.pop("written_s", 0.0)))
    return figures


def _devices(directory: ServerDirectory, written: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    seen = {int(one["client_id"]): one for one in (written or {}).get("clients", [])}
    rows = []
    for device in load_registry(directory.registry).devices:
        client = {} if device.revoked else seen.get(device.client_id, {})
        if device.revoked:
            state = "revoked"
        elif written is None:
            state = "unknown"
        else:
            state = "online" if client.get("online") else "offline"
        rows.append(
            {
                "name": device.name,
                "fingerprint": device.fingerprint,
                "state": state,
                **client,
                "client_id": device.client_id,
                "node_id": device.node_id,
            }
        )
    return rows


def _refusals(
    directory: ServerDirectory, settings: ServerSettings
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    try:
        with RunReader(settings.run_folder(directory.root)) as reader:
            every = list(reader.uploads("rejected"))
            return reader.rejections(), [
                {
                    "time_s": one.arrived_s,
                    "client_id": one.client_id,
                    "task_id": one.task_id,
                    "reason": one.reason,
                    "detail": one.detail,
                }
                for one in every[-SHOWN_REFUSALS:]
            ]
    except JournalError:
        return {}, []  # no run yet


def _warnings(
    days: Mapping[str, float],
    run: Mapping[str, Any] | None,
    processes: Mapping[str, Any],
    *,
    running: bool,
) -> list[str]:
    warnings = [
        f"certificate {name} ends in {left:.0f} days; run alignfed deploy renew"
        if left > 0
        else f"certificate {name} has ended; run alignfed deploy renew"
        for name, left in days.items()
        if left < RENEW_WITHIN_DAYS
    ]
    for name, one in processes.get("processes", {}).items() if running else ():
        if one.get("pid") is None:
            warnings.append(f"{name} is not running; last words: {one.get('last_error')}")
    if running and run is not None and run["age_s"] > STALE_S and run.get("stopped") is None:
        warnings.append(f"the ServerApp has not been heard of for {run['age_s']:.0f} s")
    return warnings
