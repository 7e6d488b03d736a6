"""The figures of a comparison, on records made by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from alignfed.errors import JournalError
from alignfed.study.bench import EnvironmentFacts
from alignfed.study.comparison import best_step
from alignfed.study.curves import mean_curve
from alignfed.study.figures import figures_of
from alignfed.study.measures import (
    Target,
    measure,
    slow_influence,
    slowest_tenth,
    spread,
    time_spread,
    time_to_target_s,
    worst_tenth_of_scores,
)
from alignfed.study.record import (
    ClientsEvaluated,
    Evaluated,
    RunRecord,
    load_record,
    write_record,
)


def record(scores=(0.0, 0.5, 0.9, 1.0), losses=(4.0, 2.0, 1.0, 0.5), **changes):
    evaluations = [
        Evaluated(10.0 * i, i, 4 * i, 400.0 * i, 1e6 * i, loss, score)
        for i, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]
    clients = [ClientsEvaluated(i, {0: 1.0, 1: 3.0}, {0: 1.0 - 0.1 * i, 1: 0.5}) for i in range(2)]
    base = RunRecord(
        evaluations=evaluations,
        clients=clients,
        uploads={0: 6, 1: 6},
        influence={0: 3.0, 1: 1.0},
        staleness={0: 2, 3: 2},
        virtual_time_s=30.0,
        trained_tokens=1200.0,
        uploaded_bytes=6e6,
        downloaded_bytes=7e6,
        rejected=0,
    )
    return replace(base, **changes)


SCORE = Target("score", 0.9)


def test_time_to_target_is_that_of_the_first_evaluation_at_it():
    assert time_to_target_s(record(), SCORE) == 20.0
    assert time_to_target_s(record(), Target("loss", 2.0)) == 10.0


def test_a_run_that_never_reaches_the_target_takes_for_ever():
    assert time_to_target_s(record(), Target("loss", 0.1)) == math.inf
    assert time_to_target_s(record(scores=(None,) * 4), SCORE) == math.inf


def test_a_loss_that_is_not_finite_reaches_nothing_and_makes_the_final_one_infinite():
    broken = record(losses=(4.0, None, None, None))
    assert time_to_target_s(broken, Target("loss", 3.0)) == math.inf
    found = measure(broken, SCORE, finals=2, slow_clients=[1])
    assert found.final_loss == math.inf


def test_final_values_are_means_over_the_last_evaluations():
    found = measure(record(), SCORE, finals=2, slow_clients=[1])
    assert found.final_loss == pytest.approx(0.75)
    assert found.final_score == pytest.approx(0.95)
    assert measure(record(), SCORE, finals=100, slow_clients=[1]).final_loss == pytest.approx(1.875)


def test_the_worst_tenth_goes_by_scores_where_there_are_scores_and_by_losses_elsewhere():
    found = measure(record(), SCORE, finals=2, slow_clients=[1])
    assert found.worst10 == pytest.approx(0.5)
    assert found.worst10_loss == pytest.approx(3.0)
    unscored = [ClientsEvaluated(0, {0: 1.0, 1: 3.0}, {0: None, 1: None})]
    found = measure(record(clients=unscored), SCORE, finals=2, slow_clients=[1])
    assert found.worst10 == found.worst10_loss == pytest.approx(3.0)
    assert found.client_variance == pytest.approx(2.0)


def test_the_worst_tenth_of_twenty_scores_is_the_mean_of_two():
    assert worst_tenth_of_scores([i / 20 for i in range(20)]) == pytest.approx(0.025)


def test_runs_without_slices_have_no_figures_of_clients():
    found = measure(record(clients=[]), SCORE, finals=2, slow_clients=[1])
    assert (found.worst10, found.worst10_loss, found.client_variance) == (None, None, None)


def test_slow_influence_is_one_where_slow_clients_move_as_much_as_others():
    assert slow_influence({0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0}, [3]) == pytest.approx(1.0)
    assert slow_influence({0: 3.0, 1: 1.0}, [1]) == pytest.approx(0.5)
    assert slow_influence({0: 3.0, 1: 0.0}, [1]) == 0.0
    assert slow_influence({0: 0.0, 1: 0.0}, [1]) is None


def test_the_slowest_tenth_is_rounded_up_and_ties_go_to_lower_ids():
    assert slowest_tenth({i: float(i) for i in range(24)}) == [21, 22, 23]
    assert slowest_tenth({5: 1.0, 3: 1.0}) == [3]


def test_staleness_is_a_mean_over_uploads():
    found = measure(record(), SCORE, finals=1, slow_clients=[1])
    assert (found.staleness_mean, found.staleness_max) == (1.5, 3)


def test_one_infinite_seed_makes_the_mean_infinite_but_not_the_median():
    found = time_spread([1.0, 3.0, math.inf])
    assert found["mean"] is found["std"] is None
    assert (found["median"], found["reached"]) == (3.0, 2)
    assert found["seeds"] == [1.0, 3.0, None]


def test_the_deviation_is_that_of_a_sample_and_unknown_for_one_seed():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2.0))}
    assert spread([1.0]) == {"mean": 1.0, "std": None}
    assert spread([1.0, None]) == {"mean": None, "std": None}


def test_the_step_that_reaches_the_target_first_wins_and_the_loss_breaks_ties():
    base = measure(record(), SCORE, finals=1, slow_clients=[1])
    tried = [
        replace(base, time_to_target_s=math.inf, final_loss=0.1),
        replace(base, time_to_target_s=5.0, final_loss=0.4),
        replace(base, time_to_target_s=5.0, final_loss=0.3),
    ]
    assert best_step(tried, "time_to_target") == 2
    assert best_step(tried, "final_loss") == 0


def test_figures_have_the_schema_that_is_promised():
    facts = EnvironmentFacts(100.0, (0, 1), (1,), "0")
    found = figures_of([record(), record(losses=(4, 2, 1, 1))], [facts] * 2, [0, 1], SCORE, 1)
    for name in ("final_eval_loss", "final_score", "worst10", "participation_jain"):
        assert set(found[name]) == {"mean", "std"}
    assert set(found["time_to_target_s"]) >= {"mean", "std", "reached"}
    assert found["final_eval_loss"]["mean"] == 0.75
    assert found["slow_influence"]["mean"] == pytest.approx(0.5)
    assert found["curves"][1]["bytes"] == [0.0, 1e6, 2e6, 3e6]
    json.dumps(found, allow_nan=False)


def test_a_record_is_read_back_as_written_and_only_under_its_digest(tmp_path):
    path = tmp_path / "record.json"
    assert load_record(path, "a") is None
    write_record(path, record(), "a")
    assert load_record(path, "a") == record()
    assert load_record(path, "b") is None
    path.write_text("{")
    with pytest.raises(JournalError, match="delete it"):
        load_record(path, "a")


def test_a_mean_curve_holds_the_last_value_and_ends_with_the_first_seed():
    curves = [
        {"time_s": [0.0, 1.0, 2.0], "loss": [4.0, 2.0, 1.0]},
        {"time_s": [0.0, 1.0, 4.0], "loss": [4.0, 3.0, 0.0]},
    ]
    places, mean, deviation = mean_curve(curves, "time_s", "loss")
    assert (places[0], places[-1]) == (0.0, 2.0)
    assert mean[0] == 4.0
    assert deviation[0] == 0.0
    assert mean[np.searchsorted(places, 1.5)] == 2.5
    assert mean[-1] == 2.0
