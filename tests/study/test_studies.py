"""Whole studies on the built-in data: real workers, real training, a few uploads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignfed.cli import app
from alignfed.config import default_recipe
from alignfed.journal import RunReader
from alignfed.study.comparison import compare
from alignfed.study.running import SilentStudyView
from tests.runs.recipes import SMALL

TINY = [
    *SMALL,
    "stop.uploads=8",
    "compare.target_score=unset",
    "compare.target_loss=12.0",
    "compare.tuning_factors=[1.0, 2.0]",
    "compare.final_evaluations=2",
]
OPTIONS = ["--strategies", "fedbuff,fedavg", "--seeds", "0,1"]


def command(out, *options):
    changes = [part for change in TINY for part in ("--set", change)]
    return ["compare", *options, "--out", str(out), *changes]


class CountingView(SilentStudyView):
    def __init__(self):
        self.done, self.before = [], 0

    def found(self, count):
        self.before += count

    def ended(self, order):
        self.done.append(order.key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "whole"
    result = CliRunner().invoke(app, command(out, *OPTIONS, "--jobs", "1"))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_comparison_leaves_figures_table_and_curves(finished):
    out, output = finished
    figures = json.loads((out / "comparison.json").read_text())
    assert figures["target"] == {"measure": "loss", "value": 12.0}
    assert set(figures["strategies"]) == {"fedbuff", "fedavg"}
    for one in figures["strategies"].values():
        assert one["time_to_target_s"]["reached"] == 2
        assert one["time_to_target_s"]["mean"] > 0
        assert one["final_eval_loss"]["std"] >= 0
        assert one["worst10"]["mean"] is not None
        assert one["slow_influence"]["mean"] >= 0
        assert one["tuned"]["setting"] == "server_step"
        assert [each["value"] for each in one["tuned"]["tried"]] == [1.0, 2.0]
        assert one["settings"] == {"server_step": one["tuned"]["value"]}
    assert figures["strategies"]["fedavg"]["staleness"]["max"] == 0
    table = (out / "comparison.md").read_text()
    assert "| fedbuff |" in table
    assert "| fedbuff |" in output
    for name in ("loss.png", "score.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_every_rule_gets_the_same_client_tokens_on_the_same_devices(finished):
    out, _ = finished
    figures = json.loads((out / "comparison.json").read_text())
    tokens = [one["trained_tokens"]["mean"] for one in figures["strategies"].values()]
    assert max(tokens) / min(tokens) < 1 + 1 / 8  # one task of eight
    first_times = set()
    for rule in ("fedbuff", "fedavg"):
        with RunReader(out / "runs" / rule / "seed-0") as reader:
            first_times.add(min(upload.arrived_s for upload in reader.uploads()))
    assert len(first_times) == 1


def test_each_reported_run_is_an_ordinary_one_scored_client_by_client(finished):
    out, _ = finished
    run = out / "runs" / "fedbuff" / "seed-1"
    assert (run / "adapter" / "adapter_config.json").exists()
    with RunReader(run) as reader:
        notes = [row.body for row in reader.rows(name="ClientsEvaluated")]
        scores = [one.score for one in reader.evaluations()]
    assert len(notes) == len(scores) >= 3
    assert None not in scores
    assert len(notes[-1]["losses"]) == 6


def test_a_finished_study_is_not_run_again_and_further_seeds_are_added(finished):
    out, _ = finished
    before = (out / "comparison.json").read_bytes()
    view = CountingView()
    recipe = default_recipe(TINY)
    compare(recipe, out, strategies=["fedbuff", "fedavg"], seeds=[0, 1], jobs=1, view=view)
    assert (view.done, view.before) == ([], 3 + 8)
    assert (out / "comparison.json").read_bytes() == before


@pytest.mark.slow
def test_a_study_interrupted_and_gone_on_with_gives_the_same_figures(finished, tmp_path):
    out = tmp_path / "interrupted"
    arguments = [sys.executable, "-m", "alignfed", *command(out, *OPTIONS, "--jobs", "2")]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.glob("runs/*/*/record.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Go on with: alignfed compare" in errors
    assert "Traceback" not in errors
    kept = len(list(out.glob("runs/*/*/record.json")))
    assert 0 < kept < 8
    assert not (out / "comparison.json").exists()
    result = CliRunner().invoke(app, command(out, *OPTIONS, "--jobs", "1"))
    assert result.exit_code == 0, result.output
    assert f"{kept} parts were finished before" in result.output or kept > 4
    whole, _ = finished
    for name in ("comparison.json", "comparison.md"):
        assert (out / name).read_text() == (whole / name).read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategies", "fedbuf"], "did you mean 'fedbuff'?"),
        (["--seeds", "0,1000"], "compare.tuning_seed"),
        (["--seeds", "zero"], "no list of whole numbers"),
        (["--set", "compare.target_loss=unset"], "fixes no target"),
        (["--jobs", "0"], "jobs=0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(options, words, tmp_path):
    out = tmp_path / "study"
    result = CliRunner().invoke(app, [*command(out), *options])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not out.exists()


def test_a_folder_of_another_study_is_refused(finished):
    out, _ = finished
    result = CliRunner().invoke(app, [*command(out, *OPTIONS), "--set", "lora.rank=2"])
    assert result.exit_code == 2
    assert "another study" in result.stderr


def test_what_a_worker_is_refused_is_said_with_the_part_it_concerns(tmp_path):
    # One client's data are too few for the deal, which only loading them shows.
    options = [*command(tmp_path / "study", *OPTIONS, "--jobs", "1")]
    result = CliRunner().invoke(app, [*options, "--set", "data.partition.min_size=5000"])
    assert result.exit_code == 2
    assert "seed-" in result.stderr


@pytest.mark.slow
def test_an_ablation_leaves_figures_of_every_variant_and_regime(tmp_path):
    out = tmp_path / "modules"
    changes = [
        *TINY,
        "stop.uploads=4",
        "ablate.in_flight=[4]",
        "ablate.buffers=[2]",
        "ablate.alphas=[1.0]",
        "ablate.clients=6",
    ]
    arguments = [part for change in changes for part in ("--set", change)]
    result = CliRunner().invoke(
        app, ["ablate", "--seeds", "0", "--out", str(out), "--jobs", "1", *arguments]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "ablation.json").read_text())
    levels = [(one["in_flight"], one["buffer_size"], one["alpha"]) for one in figures["regimes"]]
    assert levels == [(4, 2, 1.0)]
    for regime in figures["regimes"]:
        assert "without alignment" in regime["variants"]
        for one in regime["variants"].values():
            assert one["final_eval_loss"]["mean"] > 0
    assert "| without guard |" in (Path(out) / "ablation.md").read_text()
