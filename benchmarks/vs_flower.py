"""The same client tasks through Flower's simulation engine (flwr on Ray) and through this one.

    python benchmarks/vs_flower.py [--repeats 5] [--tasks 120] [--trainer recipe]

Needs ``pip install alignfed[dev]``. Every measurement is a fresh process with both cores to
itself; the sides take turns, and in a first turn, which is not timed, memory is sampled.

**No training.** A task is answered with the adapter it brought. Timed is from the first dispatch to
the last answer, Flower's after a first round that every node has answered: Ray, its actors and all
imports are up by then. Flower's server keeps every node busy and only collects; ours is the whole
engine: virtual clock, fleet, coordinator, admission, FedBuff. ``ratio_vs_flower_noop`` carries
next to nothing (8 numbers to Flower, an adapter of 32 here); Flower has the number of nodes that
serves it best, ours the recipe's 8 tasks in flight and a longer run, to be timed at all.
``ratio_vs_flower_noop_adapter`` carries the built-in model's adapter, and plans each task's batches
here.

**Training.** ``ratio_vs_flower``: the tasks of the default recipe, the ones its fleet and clock
hand out, with its local steps. Flower's clients train with a plain, well-written PEFT loop, model
and batches kept in each actor from task to task, so that the base is loaded once an actor and not
once a task; one actor and one thread a core; its server only collects. Ours is the run itself,
placed as `alignfed simulate` places it (workers and cohorts of the recipe), every task judged and
aggregated by FedBuff; neither side evaluates. Timed is the whole process: imports, start of the
engine, loading of model and data. ``ratio_vs_flower_warm`` leaves all of that out on both sides: it
begins when everything is loaded, in a run of its own on our side. The same two with ``_local`` at
the end: Flower's clients have this project's own ``LocalTrainer`` instead of the plain loop, so
that what is left of the difference is the engine and the cohorts.

Memory is of a side's whole tree of processes at its highest: ``rss`` counts a shared page in every
process that maps it, ``pss`` divides it among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from flower_sides import cores, default_simulation, planned

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def tree_bytes(root: psutil.Process) -> tuple[int, int]:
    """Return the resident and the proportional memory of a process and all below it."""
    rss = pss = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            found = process.memory_full_info()
        except psutil.Error:
            continue  # it ended between the listing and the look
        rss, pss = rss + found.rss, pss + found.pss
    return rss, pss


def measure_side(name: str, options: argparse.Namespace, *, memory: bool) -> dict[str, float]:
    """Run one side in a fresh process; return its figures, and its memory where asked.

    ``wall_s`` is from the start of the process to the last answer: clean-up costs nobody.
    """
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = "import sys, flower_sides; flower_sides.run_side(sys.argv[1], sys.argv[2])"
    given = json.dumps(vars(options))
    begun_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, name, given],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = [0, 0]
    over = threading.Event()

    def sample() -> None:
        root = psutil.Process(process.pid)
        while not over.wait(0.25):
            try:
                peaks[:] = map(max, zip(peaks, tree_bytes(root), strict=True))
            except psutil.Error:
                return

    sampler = threading.Thread(target=sample)
    if memory:
        sampler.start()
    output, errors = process.communicate()
    over.set()
    if memory:
        sampler.join()
    marked = [line for line in output.splitlines() if line.startswith("FOUND ")]
    if process.returncode or not marked:
        raise RuntimeError(f"{name} failed:\n{errors[-4000:]}")
    found: dict[str, float] = json.loads(marked[-1].removeprefix("FOUND "))
    found["wall_s"] = found.pop("ended_s") - begun_s
    return found | {"rss_bytes": peaks[0], "pss_bytes": peaks[1]}


def side_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**(vars(options) | changes))


def measured(
    sides: dict[str, tuple[str, argparse.Namespace]], repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Run all sides in turn; the first result of each holds its memory, the others its times."""
    found: dict[str, list[dict[str, float]]] = {key: [] for key in sides}
    for turn in range(repeats + 1):
        for key, (name, options) in sides.items():
            found[key].append(measure_side(name, options, memory=turn == 0))
            last = found[key][-1]
            note = f"{last['tasks'] / last['seconds']:,.1f} tasks/s, {last['wall_s']:.1f} s in all"
            print(f"{turn} {key}: {note}", file=sys.stderr)
    return found


def figures(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians, spreads, memory and the ratios between the sides."""
    from measure import spread

    shown: dict[str, Any] = {}
    for key, (first, *rest) in found.items():
        shown[key] = {
            "tasks": rest[0]["tasks"],
            "tasks_per_s": spread([one["tasks"] / one["seconds"] for one in rest]),
            "wall_s": spread([one["wall_s"] for one in rest]),
            "peak_rss_bytes": first["rss_bytes"],
            "peak_pss_bytes": first["pss_bytes"],
        }

    def rate(key: str) -> float:
        return float(shown[key]["tasks_per_s"]["median"])

    ratios: dict[str, float] = {}
    for name, ours_key, theirs_key in (
        ("ratio_vs_flower_noop", "ours_noop", "flower_noop"),
        ("ratio_vs_flower_noop_adapter", "ours_noop_adapter", "flower_noop_adapter"),
        ("ratio_vs_flower_warm", "ours_warm_train", "flower_train"),
        ("ratio_vs_flower_warm_local", "ours_warm_train", "flower_train_local"),
    ):
        if ours_key in found:
            ratios[name] = rate(ours_key) / rate(theirs_key)
    for end in ("", "_local"):
        if "ours_train" in found:
            ours, theirs = (
                median(one["wall_s"] for one in found[side][1:])
                for side in ("ours_train", f"flower_train{end}")
            )
            ratios[f"ratio_vs_flower{end}"] = theirs / ours
    for kind in ("noop", "train"):
        for memory in ("rss", "pss"):
            if f"ours_{kind}" in found:
                ours, theirs = (
                    found[f"{side}_{kind}"][0][f"{memory}_bytes"] for side in ("ours", "flower")
                )
                ratios[f"{memory}_ratio_{kind}"] = theirs / ours
    return ratios | {"sides": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=120, help="trained tasks of a repeat")
    parser.add_argument("--noop-tasks", type=int, default=600, help="answered tasks of a repeat")
    parser.add_argument("--nodes", type=int, default=64, help="Flower's nodes without training")
    parser.add_argument(
        "--threads", type=int, default=cores(), help="our torch threads, unless --trainer recipe"
    )
    parser.add_argument("--trainer", choices=("recipe", "local", "cohort"), default="recipe")
    parser.add_argument("--only", choices=("noop", "train"))
    options = parser.parse_args()

    import numpy as np
    import torch
    from measure import publish

    torch.set_num_threads(1)
    start = default_simulation(1).initial_adapter.buffers[torch.float32].numpy()
    with tempfile.TemporaryDirectory() as folder:
        pairs, values = Path(folder) / "pairs.json", Path(folder) / "start.npy"
        pairs.write_text(json.dumps(planned(options.tasks)), encoding="utf-8")
        np.save(values, start)
        common = side_options(
            options,
            warm=False,
            pairs=str(pairs),
            start=str(values),
            payload=0,
            tasks=options.noop_tasks,
        )
        ours = side_options(common, tasks=10 * options.noop_tasks)
        loaded = {"payload": start.size}
        training = side_options(common, tasks=options.tasks, nodes=8, flower_trainer="plain")
        sides = {
            "ours_noop": ("ours_noop", ours),
            "flower_noop": ("flower_noop", common),
            "ours_noop_adapter": ("ours_noop", side_options(ours, **loaded)),
            "flower_noop_adapter": ("flower_noop", side_options(common, **loaded)),
            "ours_train": ("ours_train", training),
            "ours_warm_train": ("ours_train", side_options(training, warm=True)),
            "flower_train": ("flower_train", training),
            "flower_train_local": ("flower_train", side_options(training, flower_trainer="local")),
        }
        if options.only is not None:
            sides = {key: side for key, side in sides.items() if options.only in key}
        found = measured(sides, options.repeats)
    publish(
        "vs_flower",
        figures(found)
        | {
            "trainer": options.trainer,
            "our_threads": None if options.trainer == "recipe" else options.threads,
            "flower_actors": cores(),
            "flower_nodes_noop": options.nodes,
            "adapter_bytes": int(start.nbytes),
            "flwr": version("flwr"),
            "ray": version("ray"),
        },
    )


if __name__ == "__main__":
    main()
