"""How fast the server takes uploads in, against copying them.

    python benchmarks/aggregate.py [--layers 8] [--uploads 64] [--versions 4] [--repeats 5]
        [--threads 1]

Uploads are adapters of a Llama 8B (rank 16 on all seven linear maps of a layer, fp32, 42 million
parameters at 32 layers; fewer layers scale it down). They reach a real coordinator as events,
through admission, and the last one leads to the flush; all of that is timed, and nothing else.

`ratio_vs_copy` is bytes read in a second over those that a plain `Tensor.copy_` of the same
uploads, with as many threads, into one buffer already in memory reads. Each upload and its base
count once: admission must read both on arrival, when the base has long left the caches. Whatever is
read again (the sum, the comparison, the step) does not count. `ratio_uploads` counts uploads alone.
Updates come from a pool much larger than the processor's caches. AlignFed runs at its defaults
(alignment and agreement on) without a calibration set. `flush_share` is the share of the time that
the last upload takes, with its flush. `memory_ratio` is the peak of memory over one adapter, with
every upload's own memory counted.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from measure import interleaved, machine, publish, rss_bytes, spread

from alignfed.core.adapter import Adapter, AdapterLayout, LoraShape
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import ClientJoined, ClientLeft, RunStarted, TimerFired, UpdateArrived
from alignfed.core.instructions import Dispatch, Publish
from alignfed.core.lora import make_lora_rule
from alignfed.core.state import CoordinatorSettings, CoordinatorState
from alignfed.core.update import Task, Update

RANK = 16
LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
"""Input and output widths of a layer's linear maps (Llama 3 8B)."""


def make_layout(layers: int) -> AdapterLayout:
    shapes = [
        (f"layers.{layer}.{name}", LoraShape(in_dim, out_dim, RANK, 2.0 * RANK, "float32"))
        for layer in range(layers)
        for name, (in_dim, out_dim) in LINEARS.items()
    ]
    return AdapterLayout(tuple(sorted(shapes)), ())


def random_adapter(layout: AdapterLayout, seed: int, near: Adapter | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    (count,) = layout.sizes.values()
    values = torch.randn(count, generator=generator).mul_(0.01)
    if near is not None:
        values.mul_(0.1).add_(near.buffers[torch.float32])
    return Adapter(layout, {torch.float32: values})


class Scene:
    """A coordinator with tasks of several versions in flight, about to receive their uploads."""

    def __init__(self, rule: str, options: argparse.Namespace, start: Adapter, pool: list[Adapter]):
        self.coordinator = Coordinator(
            CoordinatorSettings(4 * options.uploads, options.uploads, flush_timeout_s=1.0),
            make_rule(rule),
            make_lora_rule("factor"),
        )
        self.pool = pool
        self.state: CoordinatorState = self.coordinator.initial_state(start)
        self.now_s, self.client = 0.0, 0
        self.waiting: list[Task] = []
        self._tell(RunStarted(0.0))
        each = options.uploads // options.versions
        for version in range(options.versions):
            # One more client: its upload, flushed alone, makes the next version.
            more = version < options.versions - 1
            tasks = [self._join() for _ in range(each + more)]
            if more:
                extra = tasks.pop()
                self.now_s += 1.0
                self._tell(self.upload(extra, random_adapter(start.layout, 100 + version, start)))
                self.now_s += 1.0
                self._tell(TimerFired(self.now_s))
            self.waiting += tasks
        assert self.state.version == options.versions - 1

    def _tell(self, event: object) -> list[object]:
        self.state, out = self.coordinator.handle(self.state, event)
        return out

    def _join(self) -> Task:
        out = self._tell(ClientJoined(self.now_s, self.client))
        self._tell(ClientLeft(self.now_s, self.client))
        self.client += 1
        (dispatch,) = [item for item in out if isinstance(item, Dispatch)]
        return dispatch.task

    def upload(self, task: Task, adapter: Adapter) -> UpdateArrived:
        update = Update(task.task_id, task.client_id, task.base_version, adapter, 8)
        return UpdateArrived(self.now_s, update)

    def receive_all(self, fetch: Callable[[Adapter], Adapter]) -> tuple[float, float]:
        """Hand every upload over; return how long the coordinator took, and for the last alone."""
        taken_s = last_s = 0.0
        published = []
        for number, task in enumerate(self.waiting):
            # Versions arrive mixed, as they would.
            event = self.upload(task, fetch(self.pool[number % len(self.pool)]))
            begun_s = time.perf_counter()
            out = self._tell(event)
            last_s = time.perf_counter() - begun_s
            taken_s += last_s
            del event
            published += [item for item in out if isinstance(item, Publish)]
        (step,) = published
        assert len(step.applied) == len(self.waiting)
        return taken_s, last_s

    def shuffle(self) -> None:
        each = len(self.waiting)
        self.waiting = [self.waiting[(7 * i) % each] for i in range(each)]


def copied(pool: Sequence[Adapter]) -> Adapter:
    return Adapter(pool[0].layout, {torch.float32: pool[0].buffers[torch.float32].clone()})


class PeakMemory:
    """Watches how much memory the process holds."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = self.peak = rss_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, rss_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="32 is the whole model")
    parser.add_argument("--uploads", type=int, default=64)
    parser.add_argument("--versions", type=int, default=4)
    parser.add_argument("--pool", type=int, default=16, help="different updates")
    parser.add_argument("--repeats", type=int, default=5)
    # A second thread helps a copy more than operations on tensors of 65,000 elements, most of which
    # torch does not split; and a thread that waits for a core others use holds up both.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rules", nargs="+", default=["fedbuff", "alignfed"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = make_layout(options.layers)
    start = random_adapter(layout, 0)
    pool = [random_adapter(layout, 1 + seed, start) for seed in range(options.pool)]
    target = torch.empty_like(start.buffers[torch.float32])

    def copy() -> None:
        for number in range(options.uploads):
            target.copy_(pool[number % len(pool)].buffers[torch.float32])

    flush_shares: dict[str, list[float]] = {rule: [] for rule in options.rules}

    def run(rule: str) -> float:
        scene = Scene(rule, options, start, pool)
        scene.shuffle()
        taken_s, last_s = scene.receive_all(lambda adapter: adapter)
        flush_shares[rule].append(last_s / taken_s)
        return taken_s

    sides: dict[str, Callable[[], float | None]] = {"copy": copy}
    for rule in options.rules:
        sides[rule] = lambda rule=rule: run(rule)
    times = interleaved(sides, options.repeats)
    upload_bytes = options.uploads * layout.size_bytes
    figures: dict[str, object] = {
        "parameters": layout.size_bytes // 4,
        "scale": options.layers / 32,
        "uploads": options.uploads,
        "versions": options.versions,
        "pool": options.pool,
        "copy_gb_per_s": spread([upload_bytes / t / 1e9 for t in times["copy"]]),
    }
    for rule in options.rules:
        uploads_alone = [c / t for c, t in zip(times["copy"], times[rule], strict=True)]
        # A base is as large as an upload, and every upload is compared with its own on arrival.
        ratios = [2 * ratio for ratio in uploads_alone]
        suffix = "" if rule == "fedbuff" else f"_{rule}"
        figures[f"ratio_vs_copy{suffix}"] = median(ratios)
        figures[f"ratio_vs_copy{suffix}_spread"] = spread(ratios)
        figures[f"ratio_uploads{suffix}"] = median(uploads_alone)
        figures[f"flush_share{suffix}"] = median(flush_shares[rule][1:])
        scene = Scene(rule, options, start, pool)
        scene.shuffle()
        with PeakMemory() as memory:
            scene.receive_all(lambda adapter: copied([adapter]))
        figures[f"memory_ratio{suffix}"] = (memory.peak - memory.before) / layout.size_bytes
        print(rule, {name: value for name, value in figures.items() if name.endswith(suffix)})
        del scene
    print(machine())
    publish("aggregate", figures)


if __name__ == "__main__":
    main()
