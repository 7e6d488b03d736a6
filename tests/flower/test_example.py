"""The app under examples/, whose ClientApp knows nothing of AlignFed, on Flower's own engine."""

from __future__ import annotations

import ast
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_llm"


def _statements(name: str) -> list[str]:
    tree = ast.parse((EXAMPLE / "flower_llm" / name).read_text())
    return [ast.unparse(statement) for statement in tree.body[1:]]  # without the docstring


def test_one_import_makes_the_app_asynchronous() -> None:
    before, after = _statements("server_app.py"), _statements("async_server_app.py")
    assert set(before) - set(after) == {"from flwr.serverapp.strategy import FedAvg"}
    assert set(after) - set(before) == {"from alignfed.flower import AsyncFedAvg as FedAvg"}


def test_the_client_app_knows_nothing_of_alignfed() -> None:
    assert "alignfed." not in (EXAMPLE / "flower_llm" / "client_app.py").read_text()


def run_on_engine() -> None:
    from flower_llm import async_server_app, client_app
    from flwr.simulation import run_simulation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            async_server_app.app,
            client_app.app,
            num_supernodes=3,
            backend_config={"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}},
        )


@pytest.mark.slow
def test_the_app_learns_asynchronously(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    paths = [str(EXAMPLE), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    # What the engine and Ray leave open when they end is their own process's affair.
    process = multiprocessing.get_context("spawn").Process(target=run_on_engine)
    process.start()
    process.join()
    assert process.exitcode == 0
    said = capfd.readouterr().out
    losses = [
        float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if "evaluation loss" in line
    ]
    assert len(losses) == 7 and losses[-1] < 0.5 * losses[0]
