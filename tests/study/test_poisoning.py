"""Clients that attack: what they send, what it does to a run, and whether its record names them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alignfed
from alignfed.build import Loaded, Simulation, assemble, load
from alignfed.cli import app
from alignfed.config import Recipe, default_recipe
from alignfed.core.adapter import Adapter, difference, inner_product, norm
from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.errors import AlignFedError
from alignfed.journal import RunReader, UploadRecord
from alignfed.study.poisoning import ATTACKS, COSINE, SCALE, choose_attackers, poison
from tests.runs.recipes import SMALL

CHANGES = [
    *SMALL,
    "data.partition.num_clients=12",
    "server.concurrency=8",
    "server.buffer_size=4",
    "training.cohort_size=4",
    "training.learning_rate=1e-3",
    "stop.uploads=32",
    "strategy.local_steps=equal",  # so that an attacker's pull is no matter of its device
]
ATTACKER = frozenset({3})


@cache
def loaded() -> Loaded:
    return load(default_recipe(CHANGES))


def record_of(directory: Path, attack: str) -> list[UploadRecord]:
    """Return what the record of a run under an attack says of every upload."""

    def build(recipe: Recipe) -> Simulation:
        return poison(assemble(loaded(), recipe), attack, ATTACKER)

    alignfed.simulate(default_recipe(CHANGES), directory, build=build)
    with RunReader(directory) as reader:
        return list(reader.uploads())


def sent(attack: str, dispatch: int = 0) -> tuple[Adapter, Adapter]:
    """Return what the attacker trained and what it sends, as differences to its base."""
    base = loaded().base.initial_adapter()
    honest = assemble(loaded(), default_recipe(CHANGES))
    job = TrainingJob(Task(0, 3, 0, dispatch), base)
    trained = honest.parts.trainer.train([job])[0].adapter
    made = poison(honest, attack, ATTACKER).parts.trainer.train([job])[0].adapter
    return difference(trained, base), difference(made, base)


def cosine(first: Adapter, other: Adapter) -> float:
    return inner_product(first, other) / (norm(first) * norm(other))


@pytest.mark.parametrize(
    ("attack", "angle", "length"),
    [
        ("sign_flipped", -1.0, 1.0),
        ("scaled", 1.0, SCALE),
        ("random", 0.0, 1.0),
        ("conflicting", COSINE, 1.0),
    ],
)
def test_an_attacker_sends_what_the_attack_says(attack, angle, length):
    honest, made = sent(attack)
    assert cosine(made, honest) == pytest.approx(angle, abs=0.02)
    assert norm(made) / norm(honest) == pytest.approx(length, rel=1e-3)
    again, other = sent(attack)[1], sent(attack, dispatch=1)[1]
    assert again.checksum == made.checksum
    assert other.checksum != made.checksum


def test_every_attack_is_tested_here():
    assert set(ATTACKS) == {"sign_flipped", "scaled", "random", "conflicting"}


def test_whoever_is_no_attacker_sends_what_it_trained():
    simulation = assemble(loaded(), default_recipe(CHANGES))
    job = TrainingJob(Task(0, 4, 0, 0), loaded().base.initial_adapter())
    (honest,) = simulation.parts.trainer.train([job])
    (same,) = poison(simulation, "random", ATTACKER).parts.trainer.train([job])
    assert same.adapter.checksum == honest.adapter.checksum


def test_the_record_names_whoever_pushes_against_the_others(tmp_path):
    uploads = record_of(tmp_path / "run", "sign_flipped")
    theirs = [one for one in uploads if one.client_id in ATTACKER]
    honest = [one for one in uploads if one.client_id not in ATTACKER]
    assert theirs and all(one.reason == "cut" for one in theirs)
    assert sum(one.reason == "cut" for one in honest) < 0.25 * len(honest)
    pulls = [sum(one.weight * one.norm for one in some) / len(some) for some in (theirs, honest)]
    assert pulls[0] < 0.25 * pulls[1]
    with RunReader(tmp_path / "run") as reader:
        first, *rest = reader.senders()
    assert (first.client_id, first.refused, first.cut) == (3, 0, len(theirs))
    assert first.pull == pytest.approx(pulls[0])
    assert sum(one.uploads for one in (first, *rest)) == len(uploads)
    shown = CliRunner().invoke(app, ["uploads", str(tmp_path / "run")]).output
    assert next(line.split()[1] for line in shown.splitlines() if "100.0%" in line) == "3"
    shown = CliRunner().invoke(app, ["uploads", str(tmp_path / "run"), "--client", "3"]).output
    assert "coefficient multiplied by" in " ".join(shown.split())
    nobody = CliRunner().invoke(app, ["uploads", str(tmp_path / "run"), "--client", "12"])
    assert nobody.exit_code == 2 and "client 12 has sent nothing" in nobody.output


def test_the_record_names_whoever_is_far_too_loud(tmp_path):
    uploads = record_of(tmp_path / "run", "scaled")
    theirs = [one for one in uploads if one.client_id in ATTACKER]
    # Until eight lengths are known nobody is refused for his, but cut for it all the same.
    assert {one.reason for one in theirs} == {"cut", "outlying_norm"}
    assert all(one.outcome != "rejected" for one in uploads if one not in theirs)
    with RunReader(tmp_path / "run") as reader:
        (found,) = [one for one in reader.senders() if one.refused]
    assert (found.client_id, found.uploads, found.reasons) == (3, len(theirs), ("outlying_norm",))
    shown = CliRunner().invoke(app, ["uploads", str(tmp_path / "run")]).output
    assert "outlying norm" in " ".join(shown.split())


def test_attackers_are_drawn_by_the_seed():
    ids = list(range(100, 196))
    chosen = choose_attackers(ids, 0.1, seed=0)
    assert len(chosen) == 10 and chosen <= set(ids)
    assert chosen == choose_attackers(ids, 0.1, seed=0) != choose_attackers(ids, 0.1, seed=1)
    with pytest.raises(AlignFedError, match=r"share=0, must be above 0"):
        choose_attackers(ids, 0, seed=0)


def test_an_unknown_attack_is_refused_with_those_there_are():
    simulation = assemble(loaded(), default_recipe(CHANGES))
    with pytest.raises(AlignFedError, match=r"'scale'; there are sign_flipped, scaled"):
        poison(simulation, "scale", ATTACKER)
