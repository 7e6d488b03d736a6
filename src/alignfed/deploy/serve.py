"""A run served on the nodes of a grid, from its first event or from its record to its summary."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from alignfed.closing import Closing, Scores, close_run, export_adapter, final_adapter
from alignfed.config import Recipe
from alignfed.core.instructions import Evaluate
from alignfed.core.state import CoordinatorState
from alignfed.deploy.device import training_digest
from alignfed.deploy.records import log_record, read_json
from alignfed.deploy.serving import Serving, build_serving
from alignfed.errors import JournalError
from alignfed.flower.dialect import AlignFedDialect
from alignfed.flower.driver import TRAFFIC_NOTE, Driver, DriverParts, DriverSettings, Recovery
from alignfed.flower.messages import Encoding
from alignfed.flower.ports import Members
from alignfed.flower.status import ServerStatus
from alignfed.inputs import fingerprint_files, refuse_changes
from alignfed.journal import RunDirectory, RunMeta, RunReader, write_text_atomically
from alignfed.journal.durable import REPLAY_BYTES, DurableLog
from alignfed.version import __version__


@dataclass(frozen=True)
class Server:
    """What is served, and how.

    Attributes:
        recipe: the federation's.
        place: the run's directory.
        members: tells who is behind a node.
        client_ids: the clients known so far.
        settings: the driver's.
        encoding: how uploads are written.
        keep_payloads: keep every upload, so that the run can be replayed from its start.
        replay_bytes: else, how much to keep for replays, beyond what recovery needs.
        report: is handed the driver's status after each step.
    """

    recipe: Recipe
    place: RunDirectory
    members: Members
    client_ids: Callable[[], list[int]]
    settings: DriverSettings
    encoding: Encoding = "fp32"
    keep_payloads: bool = False
    replay_bytes: int = REPLAY_BYTES
    report: Callable[[ServerStatus], None] = lambda status: None


def serve(grid: Grid, server: Server) -> dict[str, Any]:
    """Run a recipe on the nodes of a grid to its end, or go on with it; return its summary.

    A run that has finished is left as it is.

    Raises:
        AlignFedError: what the recipe names does not exist or does not fit, or the record is
            damaged or of another recipe.
    """
    place, recipe = server.place, server.recipe
    summary = read_json(place.summary)
    if summary is not None:
        log_record("run_finished_before", directory=str(place.root))
        return summary
    serving = build_serving(recipe, server.client_ids())
    for feature in serving.off:
        log_record("feature_off", what=feature)
    resumed = place.holds_run()
    log = _go_on(server, serving) if resumed else _begin(server, serving)
    with log:
        state, recovery = log.coordinator.initial_state(serving.initial_adapter), None
        if resumed:
            state, recovery = _recover(log, place, recipe)
        parts = DriverParts(
            coordinator=log.coordinator,
            grid=grid,
            log=log,
            dialect=AlignFedDialect(
                run_name(place), training_digest(recipe), server.encoding, log.coordinator.exchange
            ),
            members=server.members,
            clock=time.monotonic,
            sleep=time.sleep,
            evaluate=serving.evaluate,
            settings=server.settings,
            watch=lambda driver: server.report(driver.status),
        )
        driver = Driver(parts, state, run_name(place), recovery)
        try:
            driver.run()
        finally:
            server.report(driver.status)
        driver.checkpoint()
        return _close(server, serving, driver, log.meta["recipe_sha256"])


def run_name(place: RunDirectory) -> str:
    """Return the name by which devices know the run of a directory.

    Raises:
        JournalError: it has none.
    """
    found = read_json(_identity(place)) or {}
    if not isinstance(name := found.get("run"), str):
        raise JournalError(
            f"{_identity(place)} is missing or damaged: it holds the name by which devices know the"
            " run; restore it from a backup, or begin a new run in another directory",
            path=str(place.root),
        )
    return name


def _identity(place: RunDirectory) -> Path:
    return place.root / "deployment.json"


def _begin(server: Server, serving: Serving) -> DurableLog:
    place, text = server.place, serving.recipe.to_toml()
    place.root.mkdir(parents=True, exist_ok=True)
    write_text_atomically(place.recipe, text)
    name = f"{serving.recipe.name}-{secrets.token_hex(6)}"
    write_text_atomically(_identity(place), json.dumps({"run": name}) + "\n")
    log_record("run_begins", run=name, directory=str(place.root))
    files = json.dumps(fingerprint_files(serving.recipe))
    meta = RunMeta(__version__, _sha256(text), serving.recipe.seed, files)
    return DurableLog.create(
        place.root,
        meta,
        serving.coordinator,
        serving.initial_adapter,
        keep_payloads=server.keep_payloads,
        replay_bytes=server.replay_bytes,
    )


def _go_on(server: Server, serving: Serving) -> DurableLog:
    log = DurableLog(server.place.root, serving.coordinator, replay_bytes=server.replay_bytes)
    try:
        if log.meta["recipe_sha256"] == _sha256(serving.recipe.to_toml()):
            known = log.meta.get("inputs", "{}")
            refuse_changes(known, fingerprint_files(serving.recipe), server.place.root)
    except BaseException:
        log.close()
        raise
    return log


def _recover(
    log: DurableLog, place: RunDirectory, recipe: Recipe
) -> tuple[CoordinatorState, Recovery]:
    found = log.recover(recipe_sha256=_sha256(recipe.to_toml()))
    for warning in found.warnings:
        log_record("recovery_warning", what=warning)
    log_record(
        "run_goes_on",
        run=run_name(place),
        version=found.state.version,
        in_flight=len(found.state.tasks),
        events_handled_again=found.rehandled,
    )
    traffic: Mapping[str, Any] = {}
    with RunReader(place.root) as reader:
        for row in reader.rows(name=TRAFFIC_NOTE):
            traffic = row.body
    evaluations = tuple(one for one in found.instructions if isinstance(one, Evaluate))
    sent, received = int(traffic.get("sent", 0)), int(traffic.get("received", 0))
    return found.state, Recovery(found.time_s, evaluations, sent, received)


def _close(server: Server, serving: Serving, driver: Driver, recipe_sha256: str) -> dict[str, Any]:
    state, status = driver.state, driver.status
    with RunReader(server.place.root) as reader:
        loads = {
            str(row.client_id): int(row.body["metrics"]["model_loads"])
            for row in reader.rows(name="UpdateArrived")
            if isinstance(row.body["metrics"].get("model_loads"), int | float)
        }
        lost_tasks = sum(1 for _ in reader.rows(name="TaskFailed"))
    closing = Closing(
        recipe=serving.recipe,
        base=serving.base,
        place=server.place,
        state=state,
        client_ids=sorted({*server.client_ids(), *state.clients}),
        time_s=driver.now_s(),
        wall_time_s=driver.now_s(),
        recipe_sha256=recipe_sha256,
        extra={
            "evaluated_on": "common",
            "downloaded_bytes": status.sent_bytes,
            "uploaded_bytes": status.received_bytes,
            "trained_tokens": int(state.tokens),
            "lost_tasks": lost_tasks,
            "model_loads": loads,
            "features_off": list(serving.off),
        },
    )
    exported = final_adapter(closing)
    scores = Scores(None, None)
    if serving.evaluate_fully is not None:
        scores = Scores(
            serving.evaluate_fully(serving.initial_adapter),
            serving.evaluate_fully(exported.adapter),
            {} if serving.evaluate_clients is None else serving.evaluate_clients(exported.adapter),
        )
    export_adapter(closing, exported.adapter)
    summary = close_run(closing, exported, scores)
    log_record("run_finished", version=state.version, uploads=summary["uploads"])
    return summary


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["Server", "run_name", "serve"]
