from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignfed.build import build_data
from alignfed.config import Recipe, load_recipe
from alignfed.core.instructions import Evaluate
from alignfed.deploy.serving import build_serving, server_data
from alignfed.errors import AlignFedError, DataError, DeploymentError
from tests.deploy.devices import small_recipe

OWN = """
[data]
path = "/nowhere/the-devices.jsonl"
calibration_examples = 4
max_length = 32
template = {prompt = "{question}", response = " {answer}"}
partition = {num_clients = 3}
[training]
steps = 1
[strategy]
rule = "alignfed"
settings = {alignment_map = "rank"}
[server]
concurrency = 2
buffer_size = 2
[stop]
uploads = 4
[deploy]
"""


def write_lines(path: Path, count: int, start: int = 0) -> None:
    rows = [
        {"question": f"what is {i}", "answer": f"it is {i}"} for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_recipe(folder: Path, **deploy: str) -> Recipe:
    """A recipe whose data is on the devices alone."""
    path = folder / "recipe.toml"
    path.write_text(OWN + "".join(f"{name} = {value!r}\n" for name, value in deploy.items()))
    return load_recipe(path, files_exist=False)


def test_the_built_in_corpus_gives_a_server_what_it_gives_a_simulation() -> None:
    recipe = small_recipe()
    data, off = server_data(recipe)
    simulated, _ = build_data(recipe)
    assert data.evaluation == simulated.evaluation and data.calibration == simulated.calibration
    assert off == ()


def test_without_data_of_its_own_a_server_says_what_is_off(tmp_path: Path) -> None:
    data, off = server_data(own_recipe(tmp_path))
    assert data.evaluation == data.calibration == () and not data.clients
    assert [what.split(":")[-1].strip() for what in off] == [
        "name a file in deploy.evaluation",
        "name a file in deploy.calibration",
        "their data stays with them",
    ]


def test_an_operators_own_files_are_scored_and_calibrated_on_and_kept_apart(tmp_path: Path) -> None:
    write_lines(tmp_path / "eval.jsonl", 6)
    write_lines(tmp_path / "calib.jsonl", 12, start=3)
    recipe = own_recipe(
        tmp_path,
        evaluation=str(tmp_path / "eval.jsonl"),
        calibration=str(tmp_path / "calib.jsonl"),
    )
    data, off = server_data(recipe)
    assert len(data.evaluation) == 6 and len(data.calibration) == 4
    assert not set(data.evaluation) & set(data.calibration)
    assert len(off) == 1
    serving = build_serving(recipe, [0, 1, 2])
    assert serving.evaluate is not None and serving.evaluate_clients is None
    adapter = serving.initial_adapter
    loss = serving.evaluate(Evaluate(0, adapter)).loss
    assert loss > 0 and serving.coordinator.calibrator is not None
    assert serving.coordinator.calibrator.loss(adapter) > 0


def test_too_few_calibration_examples_are_refused_with_the_number(tmp_path: Path) -> None:
    write_lines(tmp_path / "calib.jsonl", 3)
    with pytest.raises(DataError, match="holds 3 examples"):
        server_data(own_recipe(tmp_path, calibration=str(tmp_path / "calib.jsonl")))


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(AlignFedError, match=r"nowhere\.jsonl"):
        server_data(own_recipe(tmp_path, evaluation=str(tmp_path / "nowhere.jsonl")))


def test_a_rule_that_needs_calibration_is_refused_without_it(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path)
    strategy = recipe.strategy.model_copy(update={"settings": {"alignment_map": "both"}})
    with pytest.raises(DeploymentError, match=r"deploy\.calibration"):
        build_serving(recipe.model_copy(update={"strategy": strategy}), [0])
