"""Recipes that must be refused: where, with which value and words; from Python and the shell."""

import pytest
from typer.testing import CliRunner

from alignfed.cli import app
from alignfed.config import default_recipe, load_recipe, make_recipe
from alignfed.errors import RecipeError

GOOD = """
name = "good"
[data]
path = "some/data"
calibration_examples = 0
[data.template]
prompt = "{question}"
response = " {answer}"
[data.partition]
num_clients = 10
[training]
steps = 4
[stop]
uploads = 20
"""

WRONG_VALUES = {
    # override of the default recipe: (path, words that the refusal must hold)
    "lora.rnk=4": ("lora.rnk", "unknown key", "did you mean 'lora.rank'?"),
    "rank=4": ("rank", "unknown key", "did you mean 'lora.rank'?"),
    "modle.path=x": ("modle", "unknown key", "did you mean 'model'?"),
    "server.buffersize=4": ("server.buffersize", "did you mean 'server.buffer_size'?"),
    "zebra=1": ("zebra", "unknown key", "known here: name, seed, model"),
    "lora.rank=0": ("lora.rank", "= 0", "a whole number from 1 to 1024"),
    "lora.rank=8.5": ("lora.rank", "= 8.5", "a whole number"),
    "lora.rank=true": ("lora.rank", "= true", "a whole number"),
    'lora.rank="8"': ("lora.rank", '= "8"', "a whole number"),
    "lora.alpha=0": ("lora.alpha", "= 0", "a number above 0"),
    "lora.alpha=inf": ("lora.alpha", "= inf", "a number above 0"),
    "lora.alpha=nan": ("lora.alpha", "= nan", "a number above 0"),
    "lora.dropout=1": ("lora.dropout", "= 1", "of at least 0 and below 1"),
    "lora.targets=[]": ("lora.targets", "= []", '"all-linear" or a list'),
    "lora.targets=[1, 2]": ("lora.targets", "= [1, 2]", '"all-linear" or a list'),
    "lora.targets=q_proj": ("lora.targets", '= "q_proj"', '"all-linear" or a list'),
    "lora=5": ("lora", "= 5", "must be a table, [lora]"),
    "name=../up": ("name", '= "../up"', "letters, digits"),
    "seed=-1": ("seed", "= -1", "from 0 to 2147483647"),
    "model.task=translation": ("model.task", '= "translation"', '"causal_lm"'),
    "model.dtype=bfloat": ("model.dtype", '= "bfloat"', "did you mean 'bfloat16'?"),
    "model.quantization=4bit": ("model.quantization", "needs CUDA"),
    "model.revision=main": ("model.revision", "has no revisions"),
    "model.path=./nowhere": ("model.path", '= "./nowhere"', "no such file or folder"),
    "strategy.rule=ca2f": ("strategy.rule", "did you mean 'ca2fl'?"),
    "data.num_examples=unset": ("data.num_examples", "how many to generate"),
    "data.label_column=skill": ("data.label_column", "data.path", "remove it"),
    "data.max_length=1": ("data.max_length", "= 1", "at least 2"),
    "data.held_out_fraction=1.0": ("data.held_out_fraction", "= 1.0", "below 1"),
    "data.partition.kind=dirichle": ("data.partition.kind", "did you mean 'dirichlet'?"),
    "data.partition.kind=files": ("data.partition.kind", "no files"),
    "data.partition.column=unset": ("data.partition.column", '"dirichlet" needs the column'),
    "data.partition.num_clients=unset": ("data.partition.num_clients", "needs a number"),
    "data.partition.alpha=0": ("data.partition.alpha", "= 0", "above 0"),
    "training.steps=unset": ("training.steps", "set steps or epochs"),
    "training.epochs=1": ("training.epochs", "steps", "remove one"),
    "training.learning_rate=-0.1": ("training.learning_rate", "= -0.1", "above 0"),
    "strategy.rule=fedbuf": ("strategy.rule", '"fedbuf"', "did you mean 'fedbuff'?"),
    "strategy.lora=prodcut": ("strategy.lora", '"prodcut"', "did you mean 'product'?"),
    "strategy.settings.server_stp=1": ("strategy.settings.server_stp", "'server_step'"),
    "strategy.settings.agreement=0": ("strategy.settings.agreement", "= 0", "above 0"),
    "server.concurrency=0": ("server.concurrency", "= 0", "at least 1"),
    "server.concurrency=1000": ("server.concurrency", "1000", "data.partition.num_clients"),
    "server.max_backoff_s=0.5": ("server.max_backoff_s", "below retry_backoff_s = 1"),
    "server.task_timeout_s=0": ("server.task_timeout_s", "= 0", "above 0"),
    "fleet.preset=phone": ("fleet.preset", '"phone"', "did you mean 'phones'?"),
    "fleet.distribution=pareto": ("fleet.distribution", "only one of", "fleet.preset=unset"),
    "fleet.efficiency=1.5": ("fleet.efficiency", "= 1.5", "of at most 1"),
    "fleet.format=flash": ("fleet.format", "file and format go together"),
    "fleet.variation.slot_s=0": ("fleet.variation.slot_s", "= 0", "at least 0.001"),
    "fleet.variation.failures_per_hour=1": ("server.task_timeout_s", "vanish", "set it"),
    "stop.uploads=unset": ("stop", "nothing ends the run"),
    "stop.target_loss=-1": ("stop.target_loss", "= -1", "above 0"),
    "evaluation.scorer=accuracy": ("evaluation.scorer", "classes", "exact_match"),
    "evaluation.scorer=bleu": ("evaluation.scorer", '= "bleu"', "one of"),
    "evaluation.max_new_tokens=999": ("evaluation.max_new_tokens", "999", "data.max_length"),
    "no_equals_sign": ("no_equals_sign", "key=value"),
    "a b=1": ("a b=1", "is no key"),
    "lora.targets=[broken": ("lora.targets", "not TOML", "put it in quotes", "--set 'lora"),
    "strategy.settings={eta=": ("strategy.settings", "table"),
    "seed.deep=1": ("seed.deep", "holds a value, not a table"),
}

WRONG_FILES = {
    # text appended to, or replaced in, a good recipe of one's own data
    "template missing": (
        ('[data.template]\nprompt = "{question}"\nresponse = " {answer}"\n', ""),
        ("data.template", "how a record becomes text"),
    ),
    "response missing": (
        ('response = " {answer}"\n', ""),
        ("data.template.response", "needs a response"),
    ),
    "prompt missing": (
        ('prompt = "{question}"\n', ""),
        ("data.template.prompt", "is missing", "text that is not empty"),
    ),
    "stop missing": (("[stop]\nuploads = 20\n", ""), ("stop", "is missing")),
    "training missing": (("[training]\nsteps = 4\n", ""), ("training", "is missing")),
    "generated and own": (
        ('path = "some/data"\n', 'path = "some/data"\nnum_examples = 5\n'),
        ("data.num_examples", "only the built-in corpus"),
    ),
    "nothing to evaluate on": (
        ('path = "some/data"\n', 'path = "some/data"\nevaluation_fraction = 0.0\n'),
        ("data.evaluation_fraction", "nothing to evaluate on"),
    ),
    "glob without files": (
        ('path = "some/data"\n', 'path = "some/data"\nclients = "*.json"\n'),
        ("data.clients", 'partition kind "files"'),
    ),
    "classifier without labels": (
        ('name = "good"\n', 'name = "good"\n[model]\ntask = "sequence_classification"\n'),
        ("data.label_column", "needs the labels' column"),
    ),
    "labels without a classifier": (
        ('path = "some/data"\n', 'path = "some/data"\nlabel_column = "intent"\n'),
        ("data.label_column", "sequence_classification"),
    ),
    "label names twice": (
        ('path = "some/data"\n', 'path = "some/data"\nlabel_names = ["a", "a"]\n'),
        ("data.label_names", "different names"),
    ),
    "heads do not divide": (
        (
            'name = "good"\n',
            'name = "good"\n[model.architecture]\nnum_layers = 1\nhidden_size = 10\n'
            "intermediate_size = 8\nnum_heads = 3\nnum_key_value_heads = 2\nvocab_size = 9\n",
        ),
        ("model.architecture.num_heads", "do not divide hidden_size 10"),
    ),
    "calibration asked for and off": (
        ("[stop]", '[strategy.settings]\nvariant = "paper"\n[stop]'),
        ("data.calibration_examples", "raise it"),
    ),
    "steps by speed without steps": (
        ("steps = 4\n", 'epochs = 1.0\n[strategy]\nlocal_steps = "by_speed"\n'),
        ("strategy.local_steps", '"by_speed" needs training.steps'),
    ),
    "steps by speed under a scheduler": (
        ("[stop]", '[strategy]\nrule = "fedcompass"\nlocal_steps = "by_speed"\n[stop]'),
        ("strategy.local_steps", "assigns local steps itself"),
    ),
    "moments where products are added": (
        ("[stop]", '[strategy]\nrule = "fedadam"\nlora = "product"\n[stop]'),
        ("strategy.lora", "keeps moments", 'choose "factor"'),
    ),
    "two pulls": (
        ("steps = 4\n", 'steps = 4\nfedprox_mu = 0.1\n[strategy]\nrule = "fedprox"\n'),
        ("training.fedprox_mu", "strategy.settings.mu"),
    ),
    "a new rule's setting out of range": (
        ("[stop]", '[strategy]\nrule = "fadas"\nsettings.delay_threshold = 0\n[stop]'),
        ("strategy.settings.delay_threshold", "= 0", "at least 1"),
    ),
    "two kinds of fleet conditions": (
        ("[stop]", '[fleet]\nfile = "x"\nformat = "livelab"\nbandwidth = "y"\n[stop]'),
        ("fleet.bandwidth", "keep one"),
    ),
    "conditions twice": (
        ("[stop]", '[fleet]\nbandwidth = "y"\nvariation.compute_sigma = 0.2\n[stop]'),
        ("fleet.variation", "remove the table"),
    ),
    "not TOML": (("[stop]", "[stop"), ("not valid TOML", "line")),
    "key twice": (("steps = 4\n", "steps = 4\nsteps = 5\n"), ("not valid TOML",)),
}


@pytest.mark.parametrize(("override", "expected"), WRONG_VALUES.items())
def test_wrong_value_is_refused_with_its_path_and_the_remedy(override, expected):
    with pytest.raises(RecipeError) as refused:
        default_recipe([override])
    for words in expected:
        assert words in str(refused.value)


@pytest.mark.parametrize(("override", "expected"), WRONG_VALUES.items())
def test_wrong_value_on_the_command_line_is_a_sentence_and_no_traceback(override, expected):
    result = CliRunner().invoke(app, ["simulate", "--set", override, "--out", "never"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for words in expected:
        assert words in result.stderr


@pytest.mark.parametrize(("change", "expected"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file_is_refused_with_its_path_and_the_remedy(change, expected, tmp_path):
    before, after = change
    assert before in GOOD
    file = tmp_path / "wrong.toml"
    file.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(RecipeError) as refused:
        load_recipe(file)
    for words in expected:
        assert words in str(refused.value)
    result = CliRunner().invoke(app, ["simulate", str(file)])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_the_recipe_that_wrong_ones_are_made_of_is_accepted(tmp_path):
    file = tmp_path / "good.toml"
    file.write_text(GOOD)
    assert load_recipe(file).data.partition.num_clients == 10


def test_all_problems_are_listed_at_once():
    with pytest.raises(RecipeError) as refused:
        default_recipe(["lora.rank=0", "sed=1", "stop.uploads=unset", "strategy.rule=1"])
    paths = [problem.path for problem in refused.value.problems]
    assert sorted(paths) == ["lora.rank", "sed", "stop", "strategy.rule"]
    assert "has 4 problems" in str(refused.value)


def test_problems_across_sections_are_listed_at_once():
    with pytest.raises(RecipeError) as refused:
        default_recipe(["server.concurrency=99", "evaluation.scorer=accuracy", "strategy.rule=fed"])
    assert len(refused.value.problems) == 3


def test_a_union_is_reported_once():
    with pytest.raises(RecipeError) as refused:
        default_recipe(["lora.targets=7"])
    assert len(refused.value.problems) == 1


def test_a_missing_recipe_names_the_nearest_file(tmp_path):
    (tmp_path / "dolly.toml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"does not exist; did you mean 'dolly\.toml'"):
        load_recipe(tmp_path / "doly.toml")


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(file)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("document", [{"data": 3}, {"data": {"path": 3}}, {"data": []}])
def test_wrong_types_of_tables_are_refused(document):
    with pytest.raises(RecipeError):
        make_recipe(document)
