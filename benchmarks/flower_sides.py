"""What each side of ``vs_flower.py`` does in its own process, and in Flower's actors.

Flower's actors import this file by name: what it keeps then outlives a task. Nothing heavy is
imported before it is needed, so that a side holds in memory what it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

Pair = tuple[int, int]
"""A task: the client, and how many tasks it was given before."""

POLL_S = 0.01


def cores() -> int:
    return len(os.sched_getaffinity(0))


ALONE = {"workers": 1, "threads": 1, "cohort_size": 1}
"""Training in this process, one task at a time."""


def default_simulation(
    uploads: int, rule: str | None = None, training: dict[str, Any] | None = None
) -> Any:
    """Build the default recipe's run, with another number of uploads."""
    from alignfed.build import build_simulation
    from alignfed.config import default_recipe

    recipe = default_recipe()
    changes: dict[str, Any] = {"stop": recipe.stop.model_copy(update={"uploads": uploads})}
    if training is not None:
        changes["training"] = recipe.training.model_copy(update=training)
    if rule is not None:
        changes["strategy"] = recipe.strategy.model_copy(update={"rule": rule, "settings": {}})
    return build_simulation(recipe.model_copy(update=changes))


# --- this engine ------------------------------------------------------------------------------


class EchoTrainer:
    """Answers with the adapter that came; tells which tasks it was asked."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.asked: list[Pair] = []

    def train(self, jobs: Sequence[Any]) -> list[Any]:
        from alignfed.core.ports import TrainingResult

        self.asked += [(job.task.client_id, job.task.dispatch) for job in jobs]
        return [TrainingResult(job.adapter, 1) for job in jobs]


def finish(parts: Any, adapter: Any) -> dict[str, float]:
    """Run an engine to its end; return what it took and when it ended, on the system's clock."""
    from alignfed.simulation.engine import Engine

    begun_s = time.monotonic()
    engine = Engine(parts, adapter)
    engine.run()
    ended_s = time.monotonic()
    if not engine.finished:
        raise RuntimeError("the run did not reach its end")
    return {"seconds": ended_s - begun_s, "ended_s": ended_s}


def planned(tasks: int) -> list[Pair]:
    """Return the tasks the default run computes: results do not move its clock."""
    simulation = default_simulation(tasks, "fedbuff", ALONE)
    trainer = EchoTrainer(simulation.parts.trainer.work)
    finish(replace(simulation.parts, trainer=trainer, evaluate=None), simulation.initial_adapter)
    return trainer.asked


def ours_noop(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from alignfed.core.adapter import Adapter, LoraFactors
    from alignfed.core.ports import TaskWork

    torch.set_num_threads(1)
    simulation = default_simulation(options.tasks, "fedbuff", ALONE)
    parts = replace(simulation.parts, evaluate=None)
    if options.payload:
        adapter, trainer = simulation.initial_adapter, EchoTrainer(parts.trainer.work)
    else:
        adapter = Adapter.pack({"q": LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 4.0)})
        work = TaskWork(1000, 1e6)
        trainer = EchoTrainer(lambda task: work)
    found = finish(replace(parts, trainer=trainer), adapter)
    return found | {"tasks": len(trainer.asked)}


def ours_train(options: argparse.Namespace) -> dict[str, float]:
    from alignfed.prestart import start_server_if_likely

    training = None
    if options.trainer == "recipe":
        start_server_if_likely(None, [])  # as the command line does
    else:
        size = 1 if options.trainer == "local" else 8
        training = ALONE | {"threads": options.threads, "cohort_size": size}
    simulation = default_simulation(options.tasks, "fedbuff", training)
    if options.warm:
        # Workers' ids come when they have loaded the base.
        getattr(simulation.parts.trainer, "process_ids", list)()
    parts = replace(simulation.parts, evaluate=None)
    found = finish(parts, simulation.initial_adapter)
    return found | {"tasks": options.tasks}


# --- Flower -----------------------------------------------------------------------------------


class PlainTrainer:
    """Fine-tuning as one would write it with PEFT and torch, on the batches of our trainer."""

    def __init__(self, local: Any) -> None:
        """Take a ``LocalTrainer``'s PEFT model, its clients' batches and its settings.

        Raises:
            ValueError: settings that a plain loop does not know.
        """
        self._data, self._base, self._settings = local.data, local.base, local.settings
        known = replace(self._settings, warmup_steps=0, decay="none", fedprox_mu=0.0)
        if replace(known, representation_penalty=0.0) != self._settings:
            raise ValueError("the plain loop trains with a constant rate and no penalties")
        self._model = local.base.peft_model
        self._parameters = [one for one in self._model.parameters() if one.requires_grad]

    def train(self, jobs: Sequence[Any]) -> list[Any]:
        return [self._train_one(job) for job in jobs]

    def _train_one(self, job: Any) -> Any:
        from plain_loop import labels_of, train_plainly

        from alignfed.core.ports import TrainingResult

        self._base.install(job.adapter)
        plan = self._data.plan(job.task.client_id, job.task.dispatch)
        batches = (
            (batch.input_ids, batch.attention_mask, labels_of(batch))
            for batch in self._data.batches(job.task.client_id, plan)
        )
        train_plainly(self._model, self._parameters, batches, self._settings)
        return TrainingResult(self._base.read(like=job.adapter.layout), plan.num_examples)


@cache
def actors_trainer(plain: bool) -> tuple[Any, Any]:
    """Return the trainer this process keeps, and the layout of what it trains."""
    import torch

    torch.set_num_threads(1)
    simulation = default_simulation(1, training=ALONE)
    local = simulation.parts.trainer
    return PlainTrainer(local) if plain else local, simulation.initial_adapter.layout


def trained(values: Any, client: int, dispatch: int, plain: bool) -> Any:
    """Train one task from an adapter's flat values, and return the trained ones."""
    import torch

    from alignfed.core.adapter import Adapter
    from alignfed.core.ports import TrainingJob
    from alignfed.core.update import Task

    trainer, layout = actors_trainer(plain)
    start = Adapter(layout, {torch.float32: torch.from_numpy(values.copy())})
    (result,) = trainer.train([TrainingJob(Task(0, client, 0, dispatch), start)])
    return result.adapter.buffers[torch.float32].numpy()


def client_app(trainer: str | None) -> Any:
    """Return Flower's client: it trains with the ``plain`` or ``local`` trainer, or not at all."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def handle(message: Any, context: Any) -> Any:
        import flower_sides  # by name, so that what the actor keeps outlives the task

        arrays, task = message.content["adapter"], message.content["task"]
        if trainer is not None:
            (values,) = arrays.to_numpy_ndarrays()
            pair, plain = (task["client"], task["dispatch"]), trainer == "plain"
            arrays = ArrayRecord([flower_sides.trained(values, *pair, plain)])
        content = {"adapter": arrays, "task": ConfigRecord({"process": os.getpid()})}
        return Message(RecordDict(content), reply_to=message)

    return app


class Collector:
    """Flower's server here: every node has a task until there are none left."""

    def __init__(self, grid: Any, values: Any) -> None:
        self._grid = grid
        self._values = values
        self._nodes: list[int] = []

    def await_nodes(self, count: int) -> None:
        while len(self._nodes) < count:
            time.sleep(POLL_S)
            self._nodes = list(self._grid.get_node_ids())

    def collect(self, tasks: Iterable[Pair]) -> list[int]:
        """Have all tasks answered; return the process that answered each."""
        waiting, free = list(tasks)[::-1], list(self._nodes)
        pushed: dict[str, int] = {}
        processes: list[int] = []
        while waiting or pushed:
            batch = []
            while waiting and free:
                batch.append((free.pop(), waiting.pop()))
            messages = [self._message(node, *pair) for node, pair in batch]
            ids = self._grid.push_messages(messages)
            pushed |= dict(zip(ids, (node for node, _ in batch), strict=True))
            replies = list(self._grid.pull_messages(list(pushed)))
            for reply in replies:
                if reply.has_error():
                    raise RuntimeError(f"a client failed: {reply.error}")
                free.append(pushed.pop(reply.metadata.reply_to_message_id))
                processes.append(int(reply.content["task"]["process"]))
            if not replies:
                time.sleep(POLL_S)
        return processes

    def timed(self, tasks: Sequence[Pair]) -> dict[str, float]:
        """Have all tasks answered; return how many, how long it took and when it ended."""
        begun_s = time.monotonic()
        answered = self.collect(tasks)
        ended_s = time.monotonic()
        return {"tasks": len(answered), "seconds": ended_s - begun_s, "ended_s": ended_s}

    def _message(self, node: int, client: int, dispatch: int) -> Any:
        from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

        content = {
            "adapter": ArrayRecord([self._values]),
            "task": ConfigRecord({"client": client, "dispatch": dispatch}),
        }
        return Message(RecordDict(content), node, "train")


def through_flower(
    app: Any, nodes: int, values: Any, serve: Callable[[Collector], dict[str, float]]
) -> dict[str, float]:
    """Run Flower's simulation with one actor a core and return what ``serve`` found."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()
    found: dict[str, float] = {}

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        collector = Collector(grid, values)
        collector.await_nodes(nodes)
        found.update(serve(collector))

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores(), "log_to_driver": False, "logging_level": 40},
        },
    )
    return found


def flower_noop(options: argparse.Namespace) -> dict[str, float]:
    import numpy as np

    values = np.zeros(options.payload or 8, np.float32)

    def serve(collector: Collector) -> dict[str, float]:
        collector.collect((node, 0) for node in range(2 * options.nodes))
        return collector.timed([(task, 0) for task in range(options.tasks)])

    return through_flower(client_app(None), options.nodes, values, serve)


def flower_train(options: argparse.Namespace) -> dict[str, float]:
    import numpy as np

    values = np.load(options.start)
    pairs = [tuple(pair) for pair in json.loads(Path(options.pairs).read_text(encoding="utf-8"))]

    def serve(collector: Collector) -> dict[str, float]:
        # The first tasks count; they also bring each actor to load. What follows them is warm.
        loaded: set[int] = set()
        done = 0
        while len(loaded) < cores() and done + cores() < len(pairs):
            loaded |= set(collector.collect(pairs[done : done + cores()]))
            done += cores()
        return collector.timed(pairs[done:])

    return through_flower(client_app(options.flower_trainer), options.nodes, values, serve)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "ours_noop": ours_noop,
    "ours_train": ours_train,
    "flower_noop": flower_noop,
    "flower_train": flower_train,
}


def run_side(name: str, given: str) -> None:
    """Run one side in this process, and say what was found on the last line."""
    found = SIDES[name](argparse.Namespace(**json.loads(given)))
    print("FOUND " + json.dumps(found), flush=True)
