"""One process's part of a run: steps, checkpoints, and what remains when it ends.

What decides the result is computed by the engine; this file keeps the record and watches the real
clock to decide when to write a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignfed.build import Simulation, fleet_words
from alignfed.closing import Closing, Scores, close_run, export_adapter, final_adapter
from alignfed.core.adapter import Adapter
from alignfed.core.events import EvaluationFinished, Event
from alignfed.core.instructions import Evaluate, Instruction, Publish
from alignfed.core.ports import Evaluation, TakesNotes
from alignfed.errors import AlignFedError, JournalError
from alignfed.interruption import interrupt_between_steps
from alignfed.journal import (
    Checkpoints,
    Codec,
    Recorder,
    RunDirectory,
    SqliteJournal,
    rule_state_class,
    write_text_atomically,
)
from alignfed.progress import Limits, ProgressView, RunInfo, RunSnapshot
from alignfed.reference import synchronous_time_s
from alignfed.simulation.engine import Engine, own_adapters
from alignfed.simulation.state import CHECKPOINTED, EngineState, RunState
from alignfed.simulation.trace import record_trace
from alignfed.training.personal import mean_of_clients

CHECKPOINT_EVERY_S = 10.0
"""Real seconds between checkpoints: the most work that a killed run does again."""

CLIENTS_NOTE = "ClientsEvaluated"
"""Name of the journal's note of losses and scores on every client's own slice."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: where everything was kept.
        summary: the content of ``summary.json``.
    """

    directory: Path
    summary: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """The final adapter's folder, for ``PeftModel.from_pretrained``."""
        return RunDirectory(self.directory).adapter


class Run:
    """Implements the journal's port to see what passes."""

    def __init__(
        self,
        simulation: Simulation,
        place: RunDirectory,
        journal: SqliteJournal,
        view: ProgressView,
        began_s: float,
        checkpoint_every_s: float,
    ) -> None:
        """Take what the run is made of, where it is kept and who watches it."""
        self.simulation = simulation
        self.place = place
        self.journal = journal
        self.view = view
        self.began_s = began_s
        self.checkpoint_every_s = checkpoint_every_s
        self.recorder = Recorder(journal)
        rule = simulation.parts.coordinator.rule
        codec = Codec(rule_state_class(rule), *CHECKPOINTED)
        self.checkpoints = Checkpoints(journal, codec, self.recorder.payloads)
        self.warnings: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.expected_cohorts: deque[tuple[int, ...]] = deque()
        self.engine: Engine | None = None
        self.earlier_s = 0.0
        self.loss: float | None = None
        self.score: float | None = None
        self.staleness_mean: float | None = None

    # --- the journal's port ---------------------------------------------------------------

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Append an event and the instructions it led to."""
        self.recorder.record(event, instructions)
        if isinstance(event, EvaluationFinished):
            self.loss, self.score = event.loss, event.score
        for instruction in instructions:
            if isinstance(instruction, Evaluate):
                self._note_clients(event.time_s, instruction)
            if isinstance(instruction, Publish) and instruction.applied:
                staleness = [upload.staleness for upload in instruction.applied]
                self.staleness_mean = sum(staleness) / len(staleness)

    def record_cohort(self, time_s: float, task_ids: Sequence[int]) -> None:
        """Append which tasks were computed together."""
        if self.expected_cohorts and (again := self.expected_cohorts.popleft()) != tuple(task_ids):
            raise JournalError(
                f"after recovery tasks {list(task_ids)} were computed together where it was"
                f" {list(again)} before, so results may differ in their last bits; resume with the"
                " version of AlignFed that began the run",
                path=str(self.place.root),
            )
        self.journal.record_cohort(time_s, task_ids)

    def _note_clients(self, time_s: float, evaluate: Evaluate) -> None:
        if self.simulation.recipe.evaluation.measure != "clients":
            return
        found = self._clients(evaluate.adapter)
        values = {
            "version": evaluate.version,
            "losses": {
                str(client_id): one.loss if math.isfinite(one.loss) else None
                for client_id, one in found.items()
            },
            "scores": {str(client_id): one.score for client_id, one in found.items()},
        }
        self.journal.record_note(time_s, CLIENTS_NOTE, values)

    # --- running --------------------------------------------------------------------------

    def go_on(self, state: RunState | None, *, resumed: bool) -> RunResult:
        """Run from ``state`` (None: from the beginning) to the end and write what it leaves.

        Raises:
            AlignFedError: the run came to a standstill.
            KeyboardInterrupt: interrupted; a checkpoint was written.
        """
        parts = self.simulation.with_journal(self)
        parts = replace(parts, coordinator=self.recorder.observe(parts.coordinator))
        if state is None:
            engine = Engine(parts, self.simulation.initial_adapter)
            self._checkpoint(engine)  # where a replay begins
        else:
            engine = Engine.restore(parts, state.engine)
            self.earlier_s = state.wall_time_s
        self.engine = engine
        self.view.started(self._info(resumed))
        self._step_to_the_end(engine)
        summary = self._finish(engine)
        self.view.finished(summary)
        return RunResult(self.place.root, summary)

    def _step_to_the_end(self, engine: Engine) -> None:
        last_s = time.monotonic()
        with interrupt_between_steps() as interrupted:
            while engine.step():
                self.view.progress(self._snapshot(engine))
                now_s = time.monotonic()
                if interrupted.is_set() or now_s - last_s >= self.checkpoint_every_s:
                    self._checkpoint(engine)
                    last_s = now_s
                if interrupted.is_set():
                    raise KeyboardInterrupt
            self.view.progress(self._snapshot(engine))
            self._checkpoint(engine)

    def _checkpoint(self, engine: Engine) -> None:
        self.checkpoints.write(RunState(engine.snapshot(), self._wall_time_s()))

    def _wall_time_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.began_s

    # --- what a run leaves ----------------------------------------------------------------

    def _finish(self, engine: Engine) -> dict[str, Any]:
        simulation, recipe = self.simulation, self.simulation.recipe
        if not engine.finished:
            raise _standstill(engine.state)
        state = engine.state
        closing = Closing(
            recipe=recipe,
            base=simulation.base,
            place=self.place,
            state=state.coordinator,
            client_ids=tuple(simulation.data.clients),
            time_s=state.now_s,
            wall_time_s=0.0,
            recipe_sha256=self.journal.meta["recipe_sha256"],
            synchronous_time_s=synchronous_time_s(simulation, state.coordinator.received),
            extra={
                "evaluated_on": "common" if simulation.personal is None else "own",
                "downloaded_bytes": state.downloaded_bytes,
                "uploaded_bytes": state.uploaded_bytes,
                "trained_tokens": state.trained_tokens,
                "lost_tasks": state.lost_tasks,
                "server_busy_s": state.server_busy_s,
                "duplicates_removed": simulation.data.removed,
                **({"notes": [*simulation.notes, *self.notes]} if self.notes else {}),
            },
        )
        exported = final_adapter(closing)
        scores = self._score(engine, exported.adapter)
        export_adapter(closing, exported.adapter)
        if simulation.personal is not None:
            own = own_adapters(simulation.parts, state, exported.adapter)
            name = simulation.base.settings.path
            for client_id in state.kept:
                simulation.base.export(own[client_id], self.place.client_adapter(client_id), name)
        if recipe.fleet.record_s is not None:
            trace = record_trace(simulation.fleet, recipe.fleet.record_s)
            write_text_atomically(self.place.root / "devices.jsonl", trace)
        self.journal.flush()
        return close_run(replace(closing, wall_time_s=self._wall_time_s()), exported, scores)

    def _score(self, engine: Engine, final: Adapter) -> Scores:
        """Score version 0 and the final adapter, and the final one on each client's own data."""
        simulation = self.simulation
        first, personal = simulation.initial_adapter, simulation.personal
        if personal is not None:
            before = personal.evaluate(dict.fromkeys(simulation.parts.clients, first))
            own = own_adapters(simulation.parts, engine.state, final)
            clients = personal.evaluate_clients(own)
            return Scores(before, mean_of_clients(clients), clients)
        evaluator = simulation.evaluator
        before = evaluator.evaluate(first, with_score=True)
        after = evaluator.evaluate(final, with_score=True)
        wanted = simulation.recipe.evaluation.per_client
        return Scores(before, after, evaluator.evaluate_clients(final) if wanted else {})

    def _clients(self, adapter: Adapter) -> Mapping[int, Evaluation]:
        """Score an adapter on each client's own data, with what the client keeps in its place."""
        simulation = self.simulation
        if simulation.personal is None or self.engine is None:
            return simulation.evaluator.evaluate_clients(adapter, with_score=True)
        own = own_adapters(simulation.parts, self.engine.state, adapter)
        return simulation.personal.evaluate_clients(own)

    def _info(self, resumed: bool) -> RunInfo:
        simulation, recipe = self.simulation, self.simulation.recipe
        stop = recipe.stop
        return RunInfo(
            name=recipe.name,
            directory=self.place.root,
            strategy=recipe.strategy.rule,
            lora=recipe.strategy.lora,
            model=f"{recipe.model.path} model",
            base_parameters=simulation.base.num_parameters,
            adapter_parameters=simulation.base.adapter_parameters,
            fleet=fleet_words(recipe.fleet),
            clients=len(simulation.data.clients),
            concurrency=recipe.server.concurrency,
            buffer_size=recipe.server.buffer_size,
            limits=Limits(stop.virtual_time_s, stop.uploads, stop.versions, stop.tokens),
            resumed=resumed,
            warnings=(*self.warnings, *simulation.notes),
        )

    def _snapshot(self, engine: Engine) -> RunSnapshot:
        state, trainer = engine.state, self.simulation.parts.trainer
        if isinstance(trainer, TakesNotes):
            self.notes += tuple(trainer.take_notes())
        return RunSnapshot(
            virtual_time_s=state.now_s,
            version=state.coordinator.version,
            uploads=state.coordinator.received,
            rejected=state.coordinator.rejections.total(),
            in_flight=len(state.coordinator.tasks),
            staleness_mean=self.staleness_mean,
            loss=self.loss,
            score=self.score,
            tokens=state.coordinator.tokens,
            notes=self.notes,
        )


def _standstill(state: EngineState) -> AlignFedError:
    happened = ", ".join(f"{number} x {kind}" for kind, number in state.idle.most_common())
    return AlignFedError(
        f"the run came to a standstill at {state.now_s:.6g} virtual seconds, after"
        f" {state.coordinator.accepted} accepted uploads; since it last came nearer to its end"
        f" there was: {happened or 'nothing'}. Where no task comes back, set server.task_timeout_s"
        " to give vanished tasks up, and well above the time a task takes; where all come too late"
        " raise it (server.flush_timeout_s for a synchronous rule), where all are refused as"
        " outlying_norm raise server.max_norm_ratio, and where devices leave too soon raise"
        " fleet.variation.mean_on_s",
        virtual_time_s=state.now_s,
        happened=dict(state.idle),
    )
