"""The command line: what it shows, what it hands on, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alignfed.api
from alignfed.cli import app
from alignfed.config import default_recipe, load_recipe
from alignfed.core.aggregation import RULES
from alignfed.errors import FleetError
from alignfed.simulation.presets import KINDS, PRESETS
from alignfed.version import __version__

RECIPES = Path(__file__).parents[2] / "recipes"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


class Recorder:
    """Stands in for the API and keeps what it was called with."""

    def __init__(self, monkeypatch, raises=None, writes=None):
        self.calls = []
        self.kept = []
        self.raises, self.writes = raises, writes
        monkeypatch.setattr(alignfed.api, "simulate", self.simulate)
        monkeypatch.setattr(alignfed.api, "resume", self.resume)

    def simulate(self, recipe, directory, *, view, keep_payloads=False):
        self.kept.append(keep_payloads)
        self.calls.append((recipe, directory))
        if self.writes:
            directory.mkdir(parents=True)
            (directory / self.writes).touch()
        if self.raises:
            raise self.raises

    def resume(self, directory, *, view):
        self.simulate(None, directory, view=view)


def test_help_teaches_the_first_steps():
    result = run("--help")
    assert result.exit_code == 0
    for words in ("simulate", "resume", "strategies", "compare", "ablate", "plan", "First steps"):
        assert words in result.output


@pytest.mark.parametrize(
    "command",
    [
        "simulate",
        "resume",
        "strategies",
        "fleets",
        "init",
        "plan",
        "compare",
        "ablate",
        "sanitize",
        "uploads",
    ],
)
def test_every_command_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"alignfed {command}" in result.output or "alignfed simulate" in result.output


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from alignfed.cli import app;"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pandas', 'numpy', 'pydantic'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\n", "")


def test_version_is_shown():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"alignfed {__version__}\n")


def test_strategies_lists_every_rule_and_its_settings():
    output = run("strategies").output
    assert all(name in output for name in (*RULES, "factor", "product"))
    for name, entry in RULES.items():
        shown = run("strategies", name).output
        assert all(setting.name in shown for setting in entry.settings)


def test_an_unknown_rule_is_refused_with_the_nearest():
    result = run("strategies", "fedbuf")
    assert result.exit_code == 2
    assert "did you mean 'fedbuff'?" in result.stderr


def test_fleets_lists_every_preset_and_kind():
    output = run("fleets").output
    assert all(name in output for name in (*PRESETS, *KINDS))


def test_init_writes_the_default_and_never_overwrites(tmp_path):
    file = tmp_path / "mine.toml"
    assert run("init", file).exit_code == 0
    assert load_recipe(file) == default_recipe()
    file.write_text("mine")
    result = run("init", file)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert file.read_text() == "mine"


def test_init_into_a_missing_folder_is_refused(tmp_path):
    result = run("init", tmp_path / "no" / "mine.toml")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_plan_of_an_8b_model_needs_no_download():
    result = run("plan", RECIPES / "llama3-8b.toml")
    assert result.exit_code == 0
    assert "8.03B parameters frozen" in result.output
    assert "41.9M trained" in result.output
    assert "silo-a100" in result.output


def test_plan_says_when_a_fleet_is_too_small():
    result = run("plan", RECIPES / "llama3-8b.toml", "--set", "fleet.preset=phones")
    assert "would be refused" in result.output


def test_simulate_hands_the_overridden_recipe_on(monkeypatch, tmp_path):
    api = Recorder(monkeypatch)
    result = run("simulate", "--set", "seed=5", "--set", "lora.rank=2", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert api.calls == [(default_recipe(["seed=5", "lora.rank=2"]), tmp_path / "out")]


def test_simulate_hands_on_whether_payloads_are_kept(monkeypatch, tmp_path):
    api = Recorder(monkeypatch)
    for flags in ((), ("--keep-payloads",)):
        assert run("simulate", *flags, "--out", tmp_path / "out").exit_code == 0
    assert api.kept == [False, True]


def test_simulate_takes_a_new_directory_each_time(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    api = Recorder(monkeypatch, writes="journal.sqlite")
    for _ in range(3):
        assert run("simulate", "--set", "name=trial").exit_code == 0
    directories = [str(directory) for _, directory in api.calls]
    assert directories == ["runs/trial", "runs/trial-2", "runs/trial-3"]


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    Recorder(monkeypatch, raises=KeyboardInterrupt(), writes="journal.sqlite")
    out = tmp_path / "my run"
    result = run("simulate", "--out", out)
    assert result.exit_code == 130
    assert f"alignfed resume '{out}'" in result.stderr


def test_ctrl_c_before_anything_was_kept_says_so(monkeypatch, tmp_path):
    Recorder(monkeypatch, raises=KeyboardInterrupt())
    result = run("resume", tmp_path)
    assert result.exit_code == 130
    assert "nothing to resume" in result.stderr


def test_a_refusal_during_the_run_is_a_sentence(monkeypatch, tmp_path):
    Recorder(monkeypatch, raises=FleetError("device 3 [phone] is too small"))
    result = run("simulate", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: device 3 [phone] is too small\n"


def test_the_readme_shows_a_refusal_as_it_is():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    command, *shown = readme.split("```\n$ alignfed ")[1].split("\n```")[0].splitlines()
    assert run(*command.split()).stderr.splitlines() == shown


def test_debug_shows_where_a_refusal_was_raised(monkeypatch, tmp_path):
    Recorder(monkeypatch, raises=FleetError("too small"))
    result = run("--debug", "simulate", "--out", tmp_path / "out")
    assert isinstance(result.exception, FleetError)


def test_our_own_faults_are_not_dressed_up_as_refusals(monkeypatch, tmp_path):
    Recorder(monkeypatch, raises=ZeroDivisionError())
    result = run("simulate", "--out", tmp_path / "out")
    assert isinstance(result.exception, ZeroDivisionError)


def test_resume_of_a_directory_without_a_run_is_refused(tmp_path):
    result = run("resume", tmp_path)
    assert result.exit_code == 2
    assert "holds no run" in result.stderr
