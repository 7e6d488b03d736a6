"""A recipe may have its tasks trained by Ray's workers, on this machine or another."""

import os

import pytest

import alignfed
from alignfed.errors import RecipeError
from tests.runs.recipes import SMALL

FEW = [*SMALL, "stop.uploads=4", "training.cohort_size=1", "training.threads=1"]

# Ray leaves its own servers' processes and log files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.slow
def test_rays_workers_give_the_very_same_run(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install alignfed[ray]")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    here = alignfed.simulate(None, tmp_path / "here", overrides=[*FEW, "training.workers=1"])
    there = alignfed.simulate(
        None,
        tmp_path / "there",
        overrides=[*FEW, "training.workers=2", "training.workers_on=ray"],
    )
    assert not ray.is_initialized(), "the run ends what it started"
    assert there.summary["adapter_checksum"] == here.summary["adapter_checksum"]
    training = alignfed.load_recipe(there.directory / "recipe.toml").training
    assert (training.workers, training.threads, training.workers_on) == (2, 1, "ray")
    if before is None:
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)


def test_an_address_without_ray_is_refused():
    with pytest.raises(RecipeError, match="ray_address"):
        alignfed.default_recipe(["training.ray_address=auto"])


@pytest.mark.parametrize("name", ["cohort_size", "workers", "threads"])
def test_numbers_of_workers_outside_their_range_are_refused(name):
    with pytest.raises(RecipeError, match='must be from 1 to 1024, or "auto"'):
        alignfed.default_recipe([f"training.{name}=0"])
