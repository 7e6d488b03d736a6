from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignfed
from alignfed.builtin import MODEL_PATH
from alignfed.core.aggregation import RULES
from alignfed.errors import AlignFedError, FleetError, JournalError
from alignfed.journal import RunReader
from alignfed.progress import SilentView
from tests.runs.recipes import SMALL

PROMISED = {
    *("strategy", "seed", "clients", "clients_participating", "base_eval_loss"),
    *("final_eval_loss", "base_exact_match", "final_exact_match", "virtual_time_s"),
    *("uploads", "server_version", "staleness_mean", "staleness_max", "rejected"),
    *("participation_jain", "client_loss_worst10", "wall_time_s"),
}


STEPS = {
    "fedasync": ["server.buffer_size=1"],
    "ace": ["strategy.settings.server_step=1.0"],
    "delayed_nesterov": ["strategy.settings.server_step=1.0"],
    "fedadam": ["strategy.settings.server_step=0.01"],
    "fedyogi": ["strategy.settings.server_step=0.01"],
    "fadas": ["strategy.settings.server_step=0.01"],
    "fedcompass": ["strategy.settings.server_step=4.0", "stop.uploads=24"],
}
"""What makes a rule's effective step fit a run of so few uploads."""


def rows_of(directory):
    with RunReader(directory) as reader:
        return [(row.seq, row.time_s, row.kind, row.name, row.body) for row in reader.rows()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "small"
    return alignfed.simulate(None, directory, overrides=SMALL)


def test_a_run_leaves_everything_it_promises(finished):
    names = {path.name for path in finished.directory.iterdir()}
    assert names >= {"recipe.toml", "journal.sqlite", "metrics.jsonl", "adapter", "summary.json"}
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert set(summary) >= PROMISED
    assert summary == finished.summary
    assert summary["uploads"] == 16
    assert summary["server_version"] == 8
    assert summary["final_eval_loss"] < summary["base_eval_loss"]
    assert summary["synchronous_virtual_time_s"] > summary["virtual_time_s"]
    lines = (finished.directory / "metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) >= 8


def test_the_journal_accounts_for_every_upload(finished):
    with RunReader(finished.directory) as reader:
        uploads = list(reader.uploads())
        assert [upload.outcome for upload in uploads] == ["applied"] * 16
        assert all(upload.weight is not None and upload.staleness >= 0 for upload in uploads)
        computed = [task_id for cohort in reader.cohorts() for task_id in cohort]
    assert {upload.task_id for upload in uploads} <= set(computed)
    assert len(computed) == len(set(computed))


def test_tasks_that_are_computed_alone_leave_no_cohorts(tmp_path):
    alone = [*SMALL, "stop.uploads=4", "training.cohort_size=1"]
    run = alignfed.simulate(None, tmp_path / "alone", overrides=alone)
    with RunReader(run.directory) as reader:
        assert list(reader.cohorts()) == []


def test_the_adapter_gives_the_runs_loss_in_plain_peft(finished):
    from alignfed.build import build_data

    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    data, _ = build_data(alignfed.load_recipe(finished.directory / "recipe.toml"))
    total, count = 0.0, 0
    with torch.no_grad():
        for example in data.evaluation:
            prompt = tokenizer(example.prompt).input_ids
            response = tokenizer(example.response, add_special_tokens=False).input_ids
            response = [*response, tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(response), reduction="sum"
            )
            total, count = total + float(losses), count + len(response)
    assert total / count == pytest.approx(finished.summary["final_eval_loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_journal_rows_and_the_same_adapter(finished, tmp_path):
    again = alignfed.simulate(None, tmp_path / "again", overrides=SMALL)
    assert again.summary["adapter_checksum"] == finished.summary["adapter_checksum"]
    assert rows_of(again.directory) == rows_of(finished.directory)
    other = alignfed.simulate(None, tmp_path / "other", overrides=[*SMALL, "seed=1"])
    assert other.summary["adapter_checksum"] != finished.summary["adapter_checksum"]


def test_a_buffer_on_disk_changes_no_bit_and_leaves_nothing_behind(finished, tmp_path):
    folder = tmp_path / "buffer"
    overrides = [*SMALL, f"server.buffer_folder={folder}"]
    mapped = alignfed.simulate(None, tmp_path / "mapped", overrides=overrides)
    assert mapped.summary["adapter_checksum"] == finished.summary["adapter_checksum"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"alignfed"}))
def test_every_rule_learns_on_the_built_in_data(rule, tmp_path):
    overrides = [*SMALL, f"strategy.rule={rule}", *STEPS.get(rule, ())]
    result = alignfed.simulate(None, tmp_path / rule, overrides=overrides)
    assert result.summary["strategy"] == rule
    assert result.summary["final_eval_loss"] < 0.9 * result.summary["base_eval_loss"]


def test_training_tasks_together_gives_the_same_run_to_rounding(finished, tmp_path):
    together = alignfed.simulate(
        None, tmp_path / "together", overrides=[*SMALL, "training.cohort_size=4"]
    )
    with RunReader(together.directory) as reader:
        cohorts = list(reader.cohorts())
        uploads = list(reader.uploads())
    assert max(len(cohort) for cohort in cohorts) > 1
    computed = [task_id for cohort in cohorts for task_id in cohort]
    assert {upload.task_id for upload in uploads} <= set(computed)
    assert together.summary["virtual_time_s"] == finished.summary["virtual_time_s"]
    assert together.summary["final_eval_loss"] == pytest.approx(
        finished.summary["final_eval_loss"], rel=1e-2
    )


@pytest.mark.slow
def test_however_many_processes_give_the_very_same_run(finished, tmp_path):
    two, three = (
        alignfed.simulate(
            None, tmp_path / str(workers), overrides=[*SMALL, f"training.workers={workers}"]
        )
        for workers in (2, 3)
    )
    assert two.summary["adapter_checksum"] == three.summary["adapter_checksum"]
    assert two.summary["virtual_time_s"] == finished.summary["virtual_time_s"]
    assert two.summary["final_eval_loss"] == pytest.approx(
        finished.summary["final_eval_loss"], rel=1e-2
    )
    training = alignfed.load_recipe(two.directory / "recipe.toml").training
    assert (training.workers, training.threads) == (2, 1)


@pytest.mark.slow
def test_a_cohort_of_one_gives_the_same_bits_wherever_it_is_trained(tmp_path):
    singly = [*SMALL, "stop.uploads=4", "training.cohort_size=1", "training.threads=1"]
    here, there = (
        alignfed.simulate(None, tmp_path / name, overrides=[*singly, f"training.workers={workers}"])
        for name, workers in (("here", 1), ("there", 2))
    )
    assert here.summary["adapter_checksum"] == there.summary["adapter_checksum"]
    names = [process.name for process in multiprocessing.active_children()]
    assert not names, "a run ends the workers it started"


@pytest.mark.slow
def test_a_script_without_a_main_guard_may_use_workers(tmp_path):
    script = tmp_path / "plain.py"
    lines = [*SMALL, "stop.uploads=2", "training.workers=2"]
    script.write_text(
        "import alignfed\nprint('begun')\n"
        f"alignfed.simulate(None, {str(tmp_path / 'run')!r}, overrides={lines!r})\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert found.stdout.count("begun") == 1


def test_what_was_chosen_for_training_is_kept_with_the_run(finished):
    training = alignfed.load_recipe(finished.directory / "recipe.toml").training
    assert training.workers == 1  # so few uploads are not worth starting processes for
    assert training.threads == torch.get_num_threads()


def test_a_measured_width_is_kept_with_the_run(tmp_path):
    short = [*SMALL, "stop.uploads=4", "training.cohort_size=auto"]
    run = alignfed.simulate(None, tmp_path / "auto", overrides=short)
    kept = alignfed.load_recipe(run.directory / "recipe.toml").training.cohort_size
    assert isinstance(kept, int)
    with RunReader(run.directory) as reader:
        assert max(len(cohort) for cohort in reader.cohorts()) <= kept


def test_a_recorded_device_trace_is_replayed_under_another_rule(tmp_path):
    varied = [*SMALL, "fleet.variation.compute_sigma=0.5", "fleet.variation.slot_s=1.0"]
    first = alignfed.simulate(None, tmp_path / "first", overrides=[*varied, "fleet.record_s=600.0"])
    trace = first.directory / "devices.jsonl"
    replay = [*SMALL, f"fleet.replay={trace}", "fleet.preset=unset"]
    again = alignfed.simulate(None, tmp_path / "again", overrides=replay)
    assert again.summary["virtual_time_s"] == first.summary["virtual_time_s"]
    assert again.summary["adapter_checksum"] == first.summary["adapter_checksum"]
    other = alignfed.simulate(
        None, tmp_path / "other", overrides=[*replay, "strategy.rule=fedbuff"]
    )
    assert other.summary["virtual_time_s"] == pytest.approx(
        first.summary["virtual_time_s"], rel=0.2
    )


def test_clients_that_come_go_and_vanish_do_not_stop_a_run(tmp_path):
    rough = [
        *SMALL,
        "fleet.variation.mean_on_s=4.0",
        "fleet.variation.mean_off_s=1.0",
        "fleet.variation.failures_per_hour=600.0",
        "server.task_timeout_s=10.0",
        "server.retry_backoff_s=0.1",
    ]
    result = alignfed.simulate(None, tmp_path / "rough", overrides=rough)
    assert result.summary["uploads"] == 16
    assert result.summary["lost_tasks"] > 0


def test_a_directory_that_holds_a_run_is_left_alone(finished):
    before = (finished.directory / "summary.json").read_bytes()
    with pytest.raises(JournalError, match="already holds a run"):
        alignfed.simulate(None, finished.directory, overrides=SMALL)
    assert (finished.directory / "summary.json").read_bytes() == before


def test_a_model_too_large_for_a_device_is_refused_with_its_numbers_before_anything_is_written(
    tmp_path,
):
    with pytest.raises(FleetError, match=r"GiB are needed"):
        alignfed.simulate(
            None, tmp_path / "large", overrides=[*SMALL, "training.batch_size=500000"]
        )
    assert not (tmp_path / "large").exists()


def test_a_standstill_is_reported_with_its_remedy(tmp_path):
    doomed = [*SMALL, "fleet.variation.failures_per_hour=10000000.0"]
    with pytest.raises(AlignFedError, match="task_timeout_s"):
        alignfed.simulate(None, tmp_path / "doomed", overrides=doomed)


def test_a_run_outside_the_main_thread_works_and_its_view_sees_progress(tmp_path):
    seen = []

    class Counting(SilentView):
        def progress(self, snapshot):
            seen.append(snapshot)

    errors = []

    def work():
        try:
            alignfed.simulate(None, tmp_path / "thread", overrides=SMALL, view=Counting())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert seen[-1].uploads == 16
    assert all(a.uploads <= b.uploads for a, b in itertools.pairwise(seen))


def test_faster_devices_take_more_local_steps_and_the_run_is_judged_by_tokens(tmp_path):
    short = [*SMALL, "stop.uploads=unset", "stop.tokens=20000", "training.workers=1"]
    runs = {
        steps: alignfed.simulate(
            None, tmp_path / steps, overrides=[*short, f"strategy.local_steps={steps}"]
        )
        for steps in ("by_speed", "equal")
    }
    tokens = {}
    for steps, run in runs.items():
        with RunReader(run.directory) as reader:
            tokens[steps] = {one.client_id: one.metrics["tokens"] for one in reader.uploads()}
    assert max(tokens["by_speed"].values()) > 2 * min(tokens["by_speed"].values())
    assert max(tokens["equal"].values()) < 2 * min(tokens["equal"].values())
    trained = [run.summary["trained_tokens"] for run in runs.values()]
    assert max(trained) < 1.2 * min(trained)
