"""Recipes that must be accepted: defaults, files, overrides, paths, and writing them back."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alignfed.cli.starting import commented, starting_recipe
from alignfed.config import Recipe, default_recipe, load_recipe, make_recipe
from alignfed.config.problems import known_paths
from alignfed.config.section import BUILTIN, Section
from alignfed.config.words import allowed_words, table_of

RECIPES = sorted(Path(__file__).parents[2].joinpath("recipes").rglob("*.toml"))

MINIMAL = """
[data]
path = "{path}"
[data.template]
prompt = "{{question}}"
response = "{{answer}}"
[data.partition]
num_clients = 10
[training]
steps = 4
[stop]
uploads = 20
"""


def sections(section=Recipe):
    yield section
    for field in section.model_fields.values():
        inner = table_of(field.annotation)
        if inner is not None and issubclass(inner, Section):
            yield from sections(inner)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_in_the_repository_are_accepted_and_written_back_unchanged(path):
    recipe = load_recipe(path)
    assert make_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert recipe.name == path.stem


def test_the_repository_holds_the_promised_recipes():
    assert {path.stem for path in RECIPES} >= {
        "default",
        "dolly",
        "banking77",
        "gsm8k",
        "llama3-8b",
    }


def test_packaged_default_and_the_one_in_the_repository_are_equal():
    (file,) = [path for path in RECIPES if path.stem == "default"]
    assert load_recipe(file) == default_recipe()


def test_default_recipe_has_at_least_24_clients_dealt_unevenly():
    partition = default_recipe().data.partition
    assert partition.num_clients >= 24
    assert partition.kind == "dirichlet"


def test_a_commented_recipe_says_what_the_default_says():
    assert make_recipe(tomllib.loads(starting_recipe())) == default_recipe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_any_recipe_can_be_commented(path):
    recipe = load_recipe(path)
    assert make_recipe(tomllib.loads(commented(recipe))) == recipe


def test_a_commented_recipe_shows_every_key_there_is():
    text = starting_recipe()
    for path in known_paths():
        name = path.rpartition(".")[2]
        assert any(
            line.lstrip("#").startswith((f"{name} =", f"[{path}]")) for line in text.splitlines()
        ), path


def test_commented_out_keys_can_be_switched_on_one_by_one():
    """What init shows behind a # is TOML of the right type (whether it fits is another matter)."""
    for line in starting_recipe().splitlines():
        if line.startswith("#") and not line.startswith(("# ", "#[")) and line != "#":
            assert tomllib.loads(line.removeprefix("#"))


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_key_has_a_meaning_and_says_what_it_accepts(section):
    for name, field in section.model_fields.items():
        assert field.description, name
        if table_of(field.annotation) is None:
            assert allowed_words(field) not in ("", "a table"), name


@given(
    rank=st.integers(1, 1024),
    alpha=st.floats(1e-300, 1e300),
    learning_rate=st.floats(1e-12, 10.0, exclude_min=True),
    targets=st.just("all-linear") | st.lists(st.text(min_size=1), min_size=1),
    prompt=st.text(min_size=1),
    settings=st.fixed_dictionaries(
        {}, optional={"server_step": st.floats(1e-9, 1e9), "guard": st.booleans()}
    ),
)
def test_any_recipe_written_and_read_is_the_same(
    rank, alpha, learning_rate, targets, prompt, settings
):
    document = tomllib.loads(MINIMAL.format(path="data"))
    document["lora"] = {"rank": rank, "alpha": alpha, "targets": targets}
    document["training"]["learning_rate"] = learning_rate
    document["data"]["template"]["prompt"] = prompt
    document["strategy"] = {"settings": settings}
    recipe = make_recipe(document)
    assert make_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        default_recipe().seed = 1


def test_overrides_are_typed_by_toml_and_text_needs_no_quotes():
    recipe = default_recipe(
        [
            "seed=7",
            "lora.alpha=8",
            'lora.targets=["q_proj"]',
            "model.gradient_checkpointing=true",
            "name=2026-01-31",
            "strategy.rule = fedbuff",
            "strategy.settings={server_step = 2.0}",
        ]
    )
    assert recipe.seed == 7
    assert recipe.lora.alpha == 8.0
    assert recipe.lora.targets == ("q_proj",)
    assert recipe.model.gradient_checkpointing
    assert recipe.name == "2026-01-31"
    assert recipe.strategy.settings == {"server_step": 2.0}


def test_the_last_override_of_a_key_counts():
    assert default_recipe(["seed=1", "seed=2"]).seed == 2


def test_unset_removes_a_key_and_quotes_make_it_text():
    recipe = default_recipe(["training.steps=unset", "training.epochs=1.5"])
    assert (recipe.training.steps, recipe.training.epochs) == (None, 1.5)
    assert default_recipe(['name="unset"']).name == "unset"


def test_a_fleet_that_names_nothing_is_mixed():
    assert make_recipe(tomllib.loads(MINIMAL.format(path="data"))).fleet.preset == "mixed"
    given = ["fleet.preset=unset", "fleet.distribution=pareto"]
    assert default_recipe(given).fleet.preset is None


def write(folder, text):
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


def test_a_relative_path_is_looked_for_beside_the_recipe_first(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "recipes"
    for folder in (here, beside):
        (folder / "corpus").mkdir(parents=True)
    monkeypatch.chdir(here)
    file = write(beside, MINIMAL.format(path="corpus"))
    assert load_recipe(file).data.path == str(beside / "corpus")
    assert load_recipe(file, ["data.path=corpus"]).data.path == str(here / "corpus")
    (beside / "corpus").rmdir()
    assert load_recipe(file).data.path == str(here / "corpus")


def test_an_evaluation_file_is_looked_for_inside_the_data_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for folder in (tmp_path, tmp_path / "corpus"):
        (folder / "test.json").write_text("[]")
    file = write(tmp_path, MINIMAL.format(path="corpus"))
    found = load_recipe(file, ["data.evaluation=test.json"]).data.evaluation
    assert found == str(tmp_path / "corpus" / "test.json")
    assert load_recipe(file, ["data.evaluation=test_*.json"]).data.evaluation == "test_*.json"


def test_names_on_the_hub_and_builtin_are_left_as_they_are(tmp_path, monkeypatch):
    (tmp_path / BUILTIN).mkdir()
    monkeypatch.chdir(tmp_path)
    assert default_recipe().model.path == BUILTIN
    assert default_recipe(["model.path=org/name"]).model.path == "org/name"
    assert default_recipe(["model.path=./builtin"]).model.path == str(tmp_path / BUILTIN)


def test_a_resolved_recipe_means_the_same_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "a" / "corpus").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    recipe = load_recipe(write(tmp_path / "a", MINIMAL.format(path="corpus")))
    monkeypatch.chdir(tmp_path / "b")
    assert load_recipe(write(tmp_path / "b", recipe.to_toml())) == recipe
