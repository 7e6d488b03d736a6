"""An asynchronous strategy in the place of Flower's ``FedAvg``, for apps that exist already.

The ClientApp stays as it is: it receives weights as an ``ArrayRecord`` and returns them with
``num-examples``. In the ServerApp one import changes::

    from alignfed.flower import AsyncFedAvg as FedAvg  # was: from flwr.serverapp.strategy ...

    strategy = FedAvg(fraction_train=0.5, min_available_nodes=8)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=30)

A round becomes a server version: nobody waits for the slowest node, a node that has answered gets
the newest version at once, and every ``buffer_size`` answers make the next one. Nothing is kept on
disk; a run that must survive its server's death is for ``alignfed deploy``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import Event, UpdateArrived, UploadRefused
from alignfed.core.instructions import Evaluate, Instruction, Publish
from alignfed.core.lora import LORA_RULES, make_lora_rule
from alignfed.core.lora.exchange import WHOLE
from alignfed.core.ports import Evaluation, scheduler_of
from alignfed.core.state import CoordinatorSettings, CoordinatorState, StopConditions
from alignfed.core.update import Update
from alignfed.errors import RuleError
from alignfed.flower.driver import Driver, DriverParts, DriverSettings
from alignfed.flower.members import FirstComeMembers
from alignfed.flower.plain import PlainDialect, adapter_of, arrays_of

_log = logging.getLogger("alignfed.flower")

ABLE = tuple(name for name, row in LORA_RULES.items() if row.exchange == WHOLE and not row.folds)
"""LoRA rules under which all weights travel, and none of the base's change."""


class AsyncFedAvg:
    """Trains with ``start``, as Flower's strategies do; arguments of ``FedAvg`` mean the same."""

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        *,
        buffer_size: int | None = None,
        rule: str = "fedbuff",
        lora: str = "factor",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose how many nodes train at once and how their answers are combined.

        Args:
            fraction_train: share of the nodes that train at any time.
            fraction_evaluate: accepted for ``FedAvg``'s sake; nodes are not asked to evaluate.
            min_train_nodes: the fewest that train at any time.
            min_evaluate_nodes: as ``fraction_evaluate``.
            min_available_nodes: nodes to wait for before the start.
            weighted_by_key: the metric that says how many examples an answer was trained on.
            arrayrecord_key: name of the record of arrays in messages to nodes.
            configrecord_key: name of the record of configuration there.
            buffer_size: answers that make a server version; None: half of those that train.
            rule: an aggregation rule (``alignfed list``).
            lora: a LoRA rule under which all weights travel.
            settings: the aggregation rule's settings.

        Raises:
            RuleError: a name or setting that does not exist, or a rule that asks more of a client
                than a plain app can do.
        """
        self.rule = make_rule(rule, **(settings or {}))
        self.lora = make_lora_rule(lora)
        if lora not in ABLE:
            raise RuleError(
                f"LoRA rule {lora!r} needs AlignFed's own client app; choose one of"
                f" {', '.join(ABLE)}",
                lora=lora,
            )
        if scheduler_of(self.rule) is not None or getattr(self.rule, "needs_calibrator", False):
            raise RuleError(
                f"rule {rule!r} with these settings assigns local steps or needs calibration data,"
                " which a plain app has not; choose another, or set alignment_map = 'rank'",
                rule=rule,
            )
        for name, value in (("min_train_nodes", min_train_nodes), ("buffer_size", buffer_size)):
            if value is not None and value < 1:
                raise RuleError(f"{name} is {value}, must be at least 1", name=name)
        self.fraction_train = fraction_train
        self.min_train_nodes = min_train_nodes
        self.min_available_nodes = max(min_available_nodes, 1)
        self.buffer_size = buffer_size
        self._keys = {
            "arrays_key": arrayrecord_key,
            "config_key": configrecord_key,
            "examples_key": weighted_by_key,
        }

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train until ``num_rounds`` server versions are made.

        Args:
            grid: the ServerApp's.
            initial_arrays: what training begins with.
            num_rounds: server versions.
            timeout: seconds after which a node's task is given up.
            train_config: sent with every task.
            evaluate_config: accepted for the sake of Flower's strategies; nodes do not evaluate.
            evaluate_fn: scores the beginning and every version.

        Returns:
            The final arrays, ``evaluate_fn``'s metrics by version, and by version the mean of the
            metrics that came with its uploads, weighted by their examples.

        Raises:
            AlignFedError: the arrays cannot be combined.
        """
        if evaluate_config:
            _log.warning("evaluate_config is not used: nodes are not asked to evaluate")
        initial, names = adapter_of(initial_arrays), list(initial_arrays)
        nodes = self._wait_for_nodes(grid)
        concurrency = max(self.min_train_nodes, int(nodes * self.fraction_train))
        coordinator = Coordinator(
            CoordinatorSettings(
                concurrency=concurrency,
                buffer_size=self.buffer_size or max(1, concurrency // 2),
                task_timeout_s=timeout,
                stop=StopConditions(max_versions=num_rounds),
            ),
            self.rule,
            self.lora,
        )
        result, record = Result(), _Record()
        scores: dict[int, MetricRecord] = result.evaluate_metrics_serverapp

        def evaluate(asked: Evaluate) -> Evaluation:
            arrays = arrays_of(asked.adapter, names)
            found = None if evaluate_fn is None else evaluate_fn(asked.version, arrays)
            if found is not None:
                scores[asked.version] = found
            return Evaluation(0.0, None, 0)

        parts = DriverParts(
            coordinator=coordinator,
            grid=grid,
            log=record,
            dialect=PlainDialect(names, train_config or ConfigRecord(), **self._keys),
            members=FirstComeMembers(),
            clock=time.monotonic,
            sleep=time.sleep,
            evaluate=None if evaluate_fn is None else evaluate,
            settings=DriverSettings(start_clients=nodes),
        )
        state = Driver(parts, coordinator.initial_state(initial), "dropin", None).run()
        result.arrays = arrays_of(state.adapter, names)
        result.train_metrics_clientapp = record.metrics
        return result

    def _wait_for_nodes(self, grid: Grid) -> int:
        while (count := len(list(grid.get_node_ids()))) < self.min_available_nodes:
            _log.info("waiting for nodes: %d of %d are there", count, self.min_available_nodes)
            time.sleep(1.0)
        return count


class _Record:
    """Implements the driver's log in memory: what the result is made of, and no more."""

    def __init__(self) -> None:
        self.metrics: dict[int, MetricRecord] = {}
        self._waiting: dict[int, Update] = {}

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        if isinstance(event, UpdateArrived):
            update = event.update
            self._waiting[update.task_id] = Update(
                update.task_id,
                update.client_id,
                update.base_version,
                Adapter.pack({}),
                update.num_examples,
                update.metrics,
            )
        elif isinstance(event, UploadRefused):
            _log.warning("client %d: %s: %s", event.client_id, event.reason, event.detail)
        for instruction in instructions:
            if isinstance(instruction, Publish):
                updates = [self._waiting[one.task_id] for one in instruction.applied]
                self._waiting.clear()
                self.metrics[instruction.version] = _mean(updates)
                _log.info("version %d, of %d uploads", instruction.version, len(updates))

    def record_note(self, time_s: float, name: str, values: Mapping[str, Any]) -> None:
        _log.info("%s: %s", name, dict(values))

    def sync(self) -> None: ...

    def checkpoint(self, state: CoordinatorState) -> None: ...

    def holds_upload(self, task_id: int, client_id: int) -> bool:
        return False


def _mean(updates: Sequence[Update]) -> MetricRecord:
    total = sum(update.num_examples for update in updates)
    shared = set.intersection(*(set(update.metrics) for update in updates)) if updates else set()
    return MetricRecord(
        {
            name: sum(update.metrics[name] * update.num_examples for update in updates) / total
            for name in sorted(shared)
        }
    )


__all__ = ["ABLE", "AsyncFedAvg"]
