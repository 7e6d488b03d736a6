"""Which runs a study consists of, and what is refused before anything runs."""

from dataclasses import replace

import pytest

from alignfed.config import default_recipe
from alignfed.core.aggregation import RULES, make_rule
from alignfed.errors import JournalError, RecipeError
from alignfed.study.ablation import ablate, variants
from alignfed.study.comparison import compare
from alignfed.study.directory import open_study
from alignfed.study.plan import (
    PlannedRun,
    arm_of,
    candidates,
    check_strategies,
    default_strategies,
    environment_of,
    run_recipe,
    target_of,
    with_seeds,
)


def planned(rule, recipe=None):
    recipe = recipe or default_recipe()
    run = PlannedRun(f"{rule}/seed-3", "seed-3", arm_of(recipe, rule))
    environment = environment_of(recipe, 3)
    return run_recipe(environment.recipe, run, tokens=1000, devices="devices.jsonl")


def test_default_strategies_exist():
    assert {"alignfed", "fedbuff", "fedasync", "fedavg"} <= set(default_strategies())
    assert set(default_strategies()) <= set(RULES)


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="'fedbuf' does not exist; did you mean 'fedbuff'"):
        check_strategies(["alignfed", "fedbuf"])
    with pytest.raises(RecipeError, match="named twice"):
        check_strategies(["fedbuff", "fedbuff"])
    with pytest.raises(RecipeError, match="no strategies"):
        check_strategies([])


def test_a_tuning_seed_among_the_reported_ones_is_refused():
    with pytest.raises(RecipeError, match=r"compare\.tuning_seed.*reported"):
        with_seeds(default_recipe(), [0, 1000])
    with pytest.raises(RecipeError, match=r"compare\.seeds.*twice"):
        with_seeds(default_recipe(), [0, 0])


def test_a_study_without_a_target_or_an_amount_of_work_is_refused():
    with pytest.raises(RecipeError, match="fixes no target"):
        target_of(default_recipe(["compare.target_score=unset"]))
    with pytest.raises(RecipeError, match=r"stop\.uploads"):
        target_of(default_recipe(["stop.uploads=unset", "stop.versions=5"]))
    with pytest.raises(RecipeError, match="keep one target"):
        default_recipe(["compare.target_loss=1"])
    with pytest.raises(RecipeError, match=r"evaluation\.scorer"):
        target_of(default_recipe(["evaluation.scorer=none"]))


@pytest.mark.parametrize("rule", [name for name in RULES if name != "alignfed"])
def test_every_baseline_with_a_step_may_try_as_many_and_accepts_them(rule):
    recipe = default_recipe()
    found = candidates(recipe, rule)
    if found.setting is None:
        return
    assert len(set(found.values)) == len(recipe.compare.tuning_factors)
    for value in found.values:
        make_rule(rule, **{found.setting: value})


def test_a_step_with_an_upper_limit_is_tried_up_to_it():
    assert candidates(default_recipe(), "fedasync").values == (0.25, 0.5, 1.0)
    assert candidates(default_recipe(), "fedbuff").values == (1.0, 2.0, 4.0)


def test_steps_of_the_recipe_replace_multiples_of_the_default_with_the_same_budget():
    recipe = default_recipe(["compare.steps.fedbuff=[3.0, 5.0, 7.0]"])
    assert candidates(recipe, "fedbuff").values == (3.0, 5.0, 7.0)
    with pytest.raises(RecipeError, match="same budget"):
        default_recipe(["compare.steps.fedbuff=[3.0]"])
    recipe = default_recipe(["compare.steps.fedasync=[0.1, 0.5, 7.0]"])
    with pytest.raises(RecipeError, match=r"compare\.steps\.fedasync.*at most 1"):
        candidates(recipe, "fedasync")


def test_the_methods_own_constants_are_frozen():
    assert candidates(default_recipe(), "alignfed").setting is None
    recipe = default_recipe(["strategy.settings.guard=false"])
    assert arm_of(recipe, "alignfed").settings == {"guard": False}
    assert arm_of(recipe, "fedbuff").settings == {}


def test_runs_of_a_seed_differ_in_rule_and_cadence_alone():
    found = {rule: planned(rule) for rule in ("alignfed", "fedbuff", "fedavg")}
    for recipe in found.values():
        assert recipe.fleet.replay == "devices.jsonl"
        assert recipe.stop.tokens == 1000
        assert recipe.stop.uploads is None
        assert recipe.seed == 3
        assert recipe.evaluation.measure == "clients"
    fedbuff, fedavg = found["fedbuff"], found["fedavg"]
    assert fedbuff.data == fedavg.data
    assert fedbuff.training == fedavg.training
    # Eight clients a round against four uploads a flush: neither is looked at more often.
    eight = default_recipe(["compare.evaluate_every_uploads=8"])
    assert planned("fedbuff", eight).evaluation.every_versions == 2
    assert planned("fedavg", eight).evaluation.every_versions == 1


def test_a_barrier_waits_whatever_an_asynchronous_buffer_does():
    recipe = default_recipe(["server.flush_timeout_s=5.0"])
    assert planned("fedavg", recipe).server.flush_timeout_s is None
    assert planned("fedbuff", recipe).server.flush_timeout_s == 5.0


def test_each_variant_switches_one_module_off():
    own = arm_of(default_recipe(), "alignfed")
    found = variants(own)
    assert found["full"] == own
    assert {"without alignment", "without fairness", "without guard"} <= set(found)
    assert {"without averaging", "without memory"} <= set(found)
    # What does nothing by default is not there to be switched off, and lengths are all of fairness.
    assert not {"without grouping", "without freshness", "without participation"} & set(found)
    assert "without lengths" not in found
    none = variants(replace(own, settings={"length_exponent": 0.0}))
    assert not {"without fairness", "without lengths"} & set(none)
    paper = variants(replace(own, settings={"variant": "paper"}))
    assert {"without grouping", "without alignment", "without fairness"} <= set(paper)
    for name, arm in found.items():
        switched = len(arm.settings) + (arm.local_steps == "equal")
        assert switched == (name != "full")
        make_rule("alignfed", **arm.settings)
    assert "without local steps by speed" in found
    more = {"deviation_keep": 0.5, "freshness_decay": 0.125, "participation_exponent": 0.25}
    more_on = variants(replace(own, settings=more))
    assert {"without grouping", "without freshness", "without participation"} <= set(more_on)
    assert {"without fairness", "without lengths"} <= set(more_on)
    assert more_on["without freshness"].settings == more | {"freshness_decay": 0.0}
    assert more_on["without grouping"].settings == more | {"grouping": False}
    off = replace(own, settings={"guard": False}, local_steps="equal")
    assert not {"without guard", "without local steps by speed"} & set(variants(off))


def test_a_strategy_may_say_who_decides_on_local_steps():
    assert check_strategies(["fedbuff", "fedbuff+by_speed"]) == ("fedbuff", "fedbuff+by_speed")
    recipe = planned("fedbuff+by_speed")
    assert (recipe.strategy.rule, recipe.strategy.local_steps) == ("fedbuff", "by_speed")
    assert planned("fedbuff").strategy.local_steps == "auto"
    assert candidates(default_recipe(), "fedbuff+by_speed") == candidates(
        default_recipe(), "fedbuff"
    )
    with pytest.raises(RecipeError, match=r"ends in 'fast'; after the \+ comes one of equal"):
        check_strategies(["fedbuff+fast"])


def test_a_folder_with_something_else_is_refused(tmp_path):
    recipe = default_recipe()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.sqlite").touch()
    with pytest.raises(JournalError, match="no study"):
        compare(recipe, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="is a file"):
        compare(recipe, tmp_path / "file")


def test_a_folder_with_another_study_is_refused_and_other_seeds_are_the_same_study(tmp_path):
    def opened(kind, recipe):
        _, lock = open_study(tmp_path / "study", kind, recipe)
        lock.release()

    opened("compare", default_recipe())
    opened("compare", with_seeds(default_recipe(), [5, 6]))
    with pytest.raises(JournalError, match=r"another study.*other settings"):
        opened("compare", default_recipe(["lora.rank=4"]))
    with pytest.raises(JournalError, match="alignfed compare"):
        opened("ablate", default_recipe())


def test_an_ablation_needs_data_dealt_by_dirichlet_shares(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.partition\.kind"):
        ablate(default_recipe(["data.partition.kind=iid"]), tmp_path / "study")


def test_ablation_regimes_must_fit_the_clients():
    with pytest.raises(RecipeError, match=r"ablate\.clients"):
        default_recipe(["ablate.clients=10"])
    with pytest.raises(RecipeError, match=r"ablate\.buffers"):
        default_recipe(["ablate.buffers=[4]"])
