"""The same ServerApp code on Flower's own simulation engine: real messages, real Ray actors."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from alignfed.config import Recipe
from alignfed.deploy.serve import Server, serve
from alignfed.flower.client_app import make_app
from alignfed.flower.driver import DriverSettings
from alignfed.flower.members import FirstComeMembers
from alignfed.journal import RunDirectory, RunReader
from tests.deploy.devices import small_recipe
from tests.deploy.engine_clients import finder


def run_on_engine(recipe: Recipe, root: Path, nodes: int) -> None:
    from flwr.simulation import run_simulation

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server = Server(
            recipe=recipe,
            place=RunDirectory(root),
            members=FirstComeMembers(),
            client_ids=lambda: list(range(nodes)),
            settings=DriverSettings(start_clients=nodes),
        )
        serve(grid, server)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            app,
            make_app(finder(recipe, root.parent)),
            num_supernodes=nodes,
            backend_config={"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}},
        )


@pytest.mark.slow
def test_a_recipe_runs_to_its_summary_on_flowers_simulation_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    # What the engine and Ray leave open when they end is their own process's affair.
    recipe = small_recipe("stop.uploads=8")
    process = multiprocessing.get_context("spawn").Process(
        target=run_on_engine, args=(recipe, tmp_path / "run", 3)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["uploads"] == 8
    assert summary["stop_reason"] == "max_uploads"
    assert summary["final_eval_loss"] < summary["base_eval_loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    with RunReader(tmp_path / "run") as reader:
        tasks = [upload.task_id for upload in reader.uploads("applied")]
    assert len(set(tasks)) == 8
