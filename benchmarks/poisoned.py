"""What a tenth of poisoned clients does to a run, and whether the journal names their uploads.

    python benchmarks/poisoned.py [--seeds 22,23,24] [--rules alignfed,fedbuff] [--uploads 192]
                                  [--recipe FILE] [--set KEY=VALUE ...]

The clients, devices and data of recipes/compare/builtin-8.toml (96 clients, 32 tasks in flight,
mean staleness about 7) or of another recipe, cut to fewer uploads. A tenth of the clients, drawn
by the seed, train like everybody and send something else, see src/alignfed/study/poisoning.py.
Everything else is equal, down to every batch. Two figures, both ratios to the clean run of the
same rule and seed: the final loss (mean of the last three evaluations, one every four flushes), and
the loss over the whole run (geometric mean of all evaluations but the first). Where the loss still
falls steeply at the end, the first swings with every flush; the second is steadier. Each is an
ordinary run, kept in --out (studies/poisoned), where `alignfed uploads DIR` shows who was refused
or cut; runs that are finished there are not done again, so that another version of the package
needs another --out. Seed, rule, uploads, evaluations and workers are set here, whatever --set says.
Half a minute a run on one core.

Pull is how far an upload moved the server: its coefficient times the length of its update, on
average over those applied. FedBuff runs at its default step and is there for contrast: no rule may
apply what the gate refuses, and it damps nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measure import publish

import alignfed
from alignfed.build import Loaded, Simulation, assemble, load
from alignfed.config import Recipe, load_recipe
from alignfed.journal import RunReader
from alignfed.study.poisoning import ATTACKS, choose_attackers, poison

RECIPE = Path(__file__).parents[1] / "recipes" / "compare" / "builtin-8.toml"
CLEAN = "clean"
LIMIT = 1.05
SHARE = 0.1
LAST = 3


def recipe_of(file: Path, changed: list[str], rule: str, seed: int, uploads: int) -> Recipe:
    changes = {
        "seed": seed,
        "strategy.rule": rule,
        "stop.uploads": uploads,
        "evaluation.every_versions": 4,
        "evaluation.per_client": "false",
        "training.workers": 1,
        "training.threads": 1,
    }
    return load_recipe(file, [*changed, *(f"{key}={value}" for key, value in changes.items())])


def do(place: Path, recipe: Recipe, build: Callable[[Recipe], Simulation]) -> None:
    """Run a recipe in a folder, or go on with what is there."""
    if (place / "journal.sqlite").exists():
        alignfed.resume(place, build=build)
    else:
        alignfed.simulate(recipe, place, build=build)


def figures(place: Path, attackers: Collection[int]) -> dict[str, Any]:
    """Return a run's loss and what its journal says of the attackers' uploads and of the rest."""
    with RunReader(place) as reader:
        losses = [math.inf if one.loss is None else one.loss for one in reader.evaluations()]
        uploads = list(reader.uploads())
    found: dict[str, Any] = {
        "loss": fmean(losses[-LAST:]),
        "whole": math.exp(fmean(math.log(loss) for loss in losses[1:])),
    }
    for name, mine in (("attackers", True), ("honest", False)):
        some = [one for one in uploads if (one.client_id in attackers) is mine]
        applied = [one for one in some if one.outcome == "applied"]
        found[name] = {
            "uploads": len(some),
            "refused": sum(one.outcome == "rejected" for one in some),
            "cut": sum(one.reason == "cut" for one in applied),
            "untouched": sum(one.reason is None for one in applied),
            "pull": fmean(abs(one.weight or 0.0) * (one.norm or 0.0) for one in applied)
            if applied
            else 0.0,
        }
    return found


def build(loaded: Loaded, attack: str, attackers: Collection[int], recipe: Recipe) -> Simulation:
    simulation = assemble(loaded, recipe)
    return simulation if attack == CLEAN else poison(simulation, attack, attackers)


def spread_of(ratios: list[float]) -> dict[str, Any]:
    return {
        "mean": fmean(ratios),
        "std": stdev(ratios) if len(ratios) > 1 else None,
        "each": ratios,
        "within_limit": fmean(ratios) <= LIMIT,
    }


def summed_up(runs: dict[str, dict[str, Any]], clean: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one rule and attack over seeds."""
    ratios = {
        key: [run[key] / clean[seed][key] for seed, run in runs.items()]
        for key in ("loss", "whole")
    }
    attackers, honest = (
        {
            key: sum(run[name][key] for run in runs.values())
            for key in ("uploads", "refused", "cut", "untouched")
        }
        for name in ("attackers", "honest")
    )
    named = attackers["refused"] + attackers["cut"]
    pulls = [
        run["attackers"]["pull"] / run["honest"]["pull"]
        for run in runs.values()
        if run["attackers"]["pull"] > 0
    ]
    return {
        "loss": fmean(run["loss"] for run in runs.values()),
        "final": spread_of(ratios["loss"]),
        "whole": spread_of(ratios["whole"]),
        "attackers_refused": attackers["refused"] / attackers["uploads"],
        "attackers_cut": attackers["cut"] / attackers["uploads"],
        "honest_refused": honest["refused"] / honest["uploads"],
        "honest_cut": honest["cut"] / honest["uploads"],
        # Of the uploads that the journal names, how many were an attacker's.
        "precision": named / max(1, named + honest["refused"] + honest["cut"]),
        "pull": fmean(pulls) if pulls else None,
    }


def shown(ratio: dict[str, Any]) -> str:
    return f"{ratio['mean']:.3f}" + ("" if ratio["std"] is None else f" +- {ratio['std']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="22,23,24")
    parser.add_argument("--rules", default="alignfed,fedbuff")
    parser.add_argument("--uploads", type=int, default=192)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], dest="changed", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("studies/poisoned"))
    options = parser.parse_args()
    rules, seeds = options.rules.split(","), options.seeds.split(",")
    found: dict[str, Any] = {rule: {} for rule in rules}
    recipe_for = partial(recipe_of, options.recipe, options.changed)
    other = "" if options.recipe.resolve() == RECIPE.resolve() else f"_{options.recipe.stem}"
    if options.changed:
        other += "_" + hashlib.sha256(repr(sorted(options.changed)).encode()).hexdigest()[:8]
    for seed in seeds:
        loaded = load(recipe_for(rules[0], int(seed), options.uploads))
        attackers = choose_attackers(list(loaded.data.clients), SHARE, int(seed))
        for rule in rules:
            recipe = recipe_for(rule, int(seed), options.uploads)
            for attack in (CLEAN, *ATTACKS):
                place = options.out / f"{rule}{other}-{attack}-{seed}-{options.uploads}"
                do(place, recipe, partial(build, loaded, attack, attackers))
                run = figures(place, attackers)
                found[rule].setdefault(attack, {})[seed] = run
                print(f"seed {seed}, {rule}, {attack}: {json.dumps(run)}", flush=True)
    summary = {
        rule: {attack: summed_up(runs, attacks[CLEAN]) for attack, runs in attacks.items()}
        for rule, attacks in found.items()
    }
    head = ("rule", "attack", "loss", "final", "whole run", "refused", "cut", "honest cut", "pull")
    print("".join(f"{word:>16}" for word in head))
    for rule, attacks in summary.items():
        for attack, row in attacks.items():
            cells = (
                *(rule, attack, f"{row['loss']:.3f}", shown(row["final"]), shown(row["whole"])),
                *(f"{row[key]:.0%}" for key in ("attackers_refused", "attackers_cut")),
                *(f"{row['honest_cut']:.0%}", "-" if row["pull"] is None else f"{row['pull']:.2f}"),
            )
            print("".join(f"{cell:>16}" for cell in cells))
    publish(
        f"poisoned_{options.recipe.stem}",
        {
            "recipe": options.recipe.name,
            "set": options.changed,
            "seeds": seeds,
            "uploads": options.uploads,
            "poisoned_clients": SHARE,
            "limit": LIMIT,
            "attacks": {name: attack.description for name, attack in ATTACKS.items()},
            "rules": summary,
        },
    )


if __name__ == "__main__":
    main()
