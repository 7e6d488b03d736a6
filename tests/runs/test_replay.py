"""Simulated runs of the real model, replayed without it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import alignfed
from alignfed.journal import RunReader
from alignfed.progress import SilentView
from tests.runs.recipes import SMALL


class Interrupting(SilentView):
    """Presses Ctrl-C at an upload."""

    def __init__(self, at: int) -> None:
        self.at = at

    def progress(self, snapshot) -> None:
        if snapshot.uploads == self.at:
            signal.raise_signal(signal.SIGINT)


def test_a_default_run_is_reproduced_from_its_start_and_loads_no_model(tmp_path: Path) -> None:
    kept = alignfed.simulate(None, tmp_path / "run", overrides=SMALL, keep_payloads=True)
    script = (
        "import sys, alignfed; found = alignfed.replay(sys.argv[1]);"
        " assert found.divergence is None and found.exact, found;"
        " assert not {'transformers', 'peft', 'datasets'} & set(sys.modules);"
        " print(found.began_after, found.versions, found.events)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(kept.directory)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    with RunReader(kept.directory) as reader:
        events = sum(row.kind == "event" for row in reader.rows())
    assert done.stdout.split() == ["0", str(kept.summary["server_version"]), str(events)]


@pytest.mark.parametrize("keep_payloads", [False, True])
def test_an_interrupted_and_resumed_run_is_reproduced_across_the_break(
    tmp_path: Path, keep_payloads: bool
) -> None:
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        alignfed.simulate(
            None,
            directory,
            overrides=SMALL,
            view=Interrupting(at=7),
            keep_payloads=keep_payloads,
            checkpoint_every_s=0.3,
        )
    assert alignfed.replay(directory).divergence is None
    result = alignfed.resume(directory, checkpoint_every_s=0.3)
    found = alignfed.replay(directory)
    assert (found.divergence, found.exact) == (None, True)
    if keep_payloads:
        assert (found.began_after, found.versions) == (0, result.summary["server_version"])
    else:
        assert found.began_after > 0


def test_keeping_payloads_changes_neither_result_nor_rows(tmp_path: Path) -> None:
    overrides = [*SMALL, "stop.uploads=8", "strategy.rule=fedbuff"]
    summaries, rows = [], []
    for keep_payloads in (False, True):
        run = alignfed.simulate(
            None, tmp_path / str(keep_payloads), overrides=overrides, keep_payloads=keep_payloads
        )
        summaries.append({k: v for k, v in run.summary.items() if k != "wall_time_s"})
        with RunReader(run.directory) as reader:
            rows.append(list(reader.rows()))
    assert summaries[0] == summaries[1]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.rule=fedavg"],
        ["strategy.lora=flora", "strategy.rule=fedbuff", "lora.client_ranks=[2, 8, 4]"],
        ["strategy.settings.alignment_map=activation", "stop.uploads=8"],
    ],
    ids=["rounds", "folded-mixed-ranks", "activations"],
)
def test_other_runs_are_reproduced_too(tmp_path: Path, overrides: list[str]) -> None:
    run = alignfed.simulate(
        None, tmp_path / "run", overrides=[*SMALL, *overrides], keep_payloads=True
    )
    found = alignfed.replay(run.directory)
    assert (found.divergence, found.exact, found.began_after) == (None, True, 0)
    assert found.versions == run.summary["server_version"]


def test_activations_that_were_not_kept_are_computed_from_model_and_data(tmp_path: Path) -> None:
    overrides = [*SMALL, "strategy.settings.alignment_map=activation", "stop.uploads=8"]
    run = alignfed.simulate(None, tmp_path / "run", overrides=overrides)
    found = alignfed.replay(run.directory)
    assert (found.divergence, found.exact) == (None, True)
    assert found.versions > 0
