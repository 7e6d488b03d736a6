"""kill -9 of each process of a real federation, while it works: nothing lost, nothing twice."""

import time

import pytest

from tests.faults.federation import EVERYTHING, Federation, small_recipe, until
from tests.faults.records import check_record

pytestmark = pytest.mark.slow

DEVICES = 3
MOMENTS = {"early": 0.0, "midway": 0.5, "late": 0.85}
"""Share of the run's uploads that have been received when the process is killed."""


def training(federation, number):
    """Wait until a device is in the middle of a task."""
    until(lambda: federation.trainer(number).get("state") == "training", 120, 0.01)


def kill_server_app(federation):
    federation.kill_app()


def kill_superlink(federation):
    federation.kill("superlink")


def kill_supernode(federation):
    training(federation, 0)
    federation.kill("d0-supernode")


def kill_trainer(federation):
    training(federation, 1)
    federation.kill("d1-trainer")


def kill_client(federation):
    training(federation, 2)
    federation.kill("d2-client")


def reached(federation, uploads):
    until(
        lambda: (
            federation.failure
            or (federation.status()["received"] >= uploads and federation.status()["in_flight"] > 0)
        ),
        240,
    )
    assert federation.failure is None


def complete(federation):
    until(lambda: federation.failure or federation.host.completed, 400)
    assert federation.failure is None
    return check_record(federation.run, federation.finished_tasks())


def test_a_run_survives_the_death_of_each_of_its_processes_in_turn(tmp_path):
    recipe = small_recipe(DEVICES, "stop.uploads=24")
    with Federation(tmp_path / "server", DEVICES, recipe) as federation:
        for number in range(DEVICES):
            federation.start_device(number)
        for uploads, kill in (
            (2, kill_trainer),
            (6, kill_supernode),
            (9, kill_superlink),
            (14, kill_server_app),
        ):
            reached(federation, uploads)
            kill(federation)
            time.sleep(1.0)
        summary = complete(federation)
        assert summary["uploads"] >= 23
        loads = [federation.trainer(number)["model_loads"] for number in range(DEVICES)]
        assert loads == [1, 2, 1], "only the trainer that was killed loads its model again"


@pytest.mark.skipif(not EVERYTHING, reason="ALIGNFED_FAULTS=all runs it, as make faults does")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "kill",
    [kill_server_app, kill_superlink, kill_supernode, kill_trainer, kill_client],
    ids=lambda one: one.__name__,
)
def test_a_run_survives(kill, moment, tmp_path):
    uploads = 12
    recipe = small_recipe(DEVICES, f"stop.uploads={uploads}")
    with Federation(tmp_path / "server", DEVICES, recipe) as federation:
        for number in range(DEVICES):
            federation.start_device(number)
        reached(federation, int(MOMENTS[moment] * uploads))
        kill(federation)
        complete(federation)
