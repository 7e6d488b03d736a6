"""A device computes what the simulator computes for its client, and remembers what it must."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from alignfed.build import load
from alignfed.core.lora import exchange_of
from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.deploy.device import build_device, training_digest
from alignfed.errors import AlignFedError, DataError, DeploymentError
from alignfed.flower.blob import WireError
from alignfed.flower.outbox import Outbox, OutboxFullError
from alignfed.flower.wire import decode_upload
from alignfed.training.data import DataSettings
from alignfed.training.federate import own_client
from alignfed.training.templates import TemplateSettings
from tests.deploy.devices import order_for, small_recipe

RECIPE = small_recipe()


@pytest.fixture(scope="module")
def simulated():
    return load(RECIPE)


@pytest.fixture(scope="module")
def device():
    return build_device(RECIPE, 1)


@pytest.fixture
def outbox(tmp_path):
    box = Outbox(tmp_path / "outbox.sqlite", 1 << 26)
    yield box
    box.close()


def answer(outbox, task_id, base, run="run-1"):
    return decode_upload(outbox.payload(run, task_id), base)


def test_a_device_trains_to_the_bit_what_the_simulator_trains_for_its_client(
    device, simulated, outbox
):
    start = simulated.base.initial_adapter()
    device.work(order_for(start, device.digest, 5, base_version=2, dispatch=3), outbox)
    claims, adapter = answer(outbox, 5, start)
    (expected,) = simulated.placed.trainer.train([TrainingJob(Task(5, 1, 2, 3), start)])
    assert adapter.checksum == expected.adapter.checksum
    assert claims.num_examples == expected.num_examples
    assert claims.metrics == expected.metrics
    assert claims.base_version == 2


def test_a_task_that_is_finished_is_not_trained_again(device, simulated, outbox):
    start = simulated.base.initial_adapter()
    device.work(order_for(start, device.digest), outbox)
    before = outbox.payload("run-1", 0)
    # Garbage in place of the adapter would be noticed if anybody looked at it.
    device.work(replace(order_for(start, device.digest), payload=b"garbage"), outbox)
    assert outbox.payload("run-1", 0) == before


def test_assigned_steps_are_taken(device, simulated, outbox):
    start = simulated.base.initial_adapter()
    device.work(order_for(start, device.digest, 1, steps=1), outbox)
    device.work(order_for(start, device.digest, 2, steps=3), outbox)
    few, many = (answer(outbox, task_id, start)[0].num_examples for task_id in (1, 2))
    assert many == 3 * few


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "int8"])
def test_lossy_uploads_are_close_to_the_exact_one(device, simulated, outbox, encoding):
    start = simulated.base.initial_adapter()
    device.work(order_for(start, device.digest, 0), outbox)
    device.work(order_for(start, device.digest, 1, encoding=encoding), outbox)
    exact, lossy = (answer(outbox, task_id, start)[1] for task_id in (0, 1))
    step = exact.buffers[torch.float32] - start.buffers[torch.float32]
    off = lossy.buffers[torch.float32] - exact.buffers[torch.float32]
    assert float(off.norm()) < 0.1 * float(step.norm())
    assert (outbox.remembered("run-1", "feedback") is not None) == (encoding == "int8")


def test_feedback_goes_into_the_next_upload(device, simulated, outbox):
    start = simulated.base.initial_adapter()
    for task_id in (0, 1):
        device.work(order_for(start, device.digest, task_id, encoding="int8"), outbox)
    assert outbox.payload("run-1", 0)[-200:] != outbox.payload("run-1", 1)[-200:]
    assert answer(outbox, 0, start)[0].metrics == answer(outbox, 1, start)[0].metrics


def test_factors_of_its_own_stay_on_the_device_and_are_trained_on(outbox):
    recipe = small_recipe("strategy.lora=fedsa", "strategy.rule=fedavg")
    device, exchange = build_device(recipe, 0), exchange_of("fedsa")
    start = load(recipe).base.initial_adapter()
    base = exchange.upload(start)
    device.work(order_for(start, device.digest, 0), outbox)
    assert set(dict(answer(outbox, 0, base)[1].layout.dense)) == set(dict(base.layout.dense))
    assert b"lora_B" not in outbox.payload("run-1", 0)
    device.work(order_for(start, device.digest, 1), outbox)
    first, second = (answer(outbox, task_id, base)[0].metrics["loss_first"] for task_id in (0, 1))
    assert first != second
    # In a run of its own it begins afresh.
    device.work(order_for(start, device.digest, 0, run="run-2"), outbox)
    assert answer(outbox, 0, base, "run-2")[0].metrics["loss_first"] == first


def test_another_recipe_a_damaged_adapter_and_a_full_outbox_are_refused(
    device, simulated, outbox, tmp_path
):
    start = simulated.base.initial_adapter()
    with pytest.raises(DeploymentError, match="same recipe"):
        device.work(order_for(start, "0" * 64), outbox)
    order = order_for(start, device.digest)
    with pytest.raises(WireError):
        device.work(replace(order, payload=order.payload[:-1]), outbox)
    with pytest.raises(AlignFedError, match="fit"):
        other = exchange_of("ffa").upload(start)
        device.work(order_for(other, device.digest), outbox)
    small = Outbox(tmp_path / "small.sqlite", 1000)
    with pytest.raises(OutboxFullError):
        device.work(order, small)
    small.close()
    assert outbox.waiting("run-1") == []


def test_the_digest_follows_what_clients_do_and_nothing_else():
    digest = training_digest(RECIPE)
    same = ("server.concurrency=3", "stop.uploads=7", "fleet.preset=phones", "training.workers=2",
            "data.evaluation_examples=8")  # fmt: skip
    assert {training_digest(small_recipe(one)) for one in same} == {digest}
    other = ("training.learning_rate=0.1", "seed=1", "data.max_length=32", "strategy.lora=ffa",
             "lora.dropout=0.1", "training.steps=3")  # fmt: skip
    assert digest not in {training_digest(small_recipe(one)) for one in other}
    assert len({training_digest(small_recipe(one)) for one in other}) == len(other)


def test_a_device_trains_on_a_file_of_its_own(tmp_path, simulated, outbox):
    path = tmp_path / "own.jsonl"
    rows = [{"instruction": "repeat", "input": f"{i}", "response": f"{i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    device = build_device(RECIPE, 7, str(path))
    start = simulated.base.initial_adapter()
    device.work(order_for(start, device.digest), outbox)
    assert device.digest == training_digest(RECIPE)
    assert answer(outbox, 0, start)[0].num_examples == 8


def test_own_data_that_cannot_be_trained_on_is_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "good", "label": "yes"}\n')
    template = TemplateSettings("{text}")
    settings = DataSettings(path=str(path), label_column="label")
    with pytest.raises(DataError, match="label_names"):
        own_client("mine", 0, settings, template)
    named = replace(settings, label_names=("yes", "no"))
    client, names = own_client("mine", 0, named, template)
    assert (len(client.train), len(client.held_out), names) == (1, 0, ("yes", "no"))
    path.write_text('{"text": "good", "label": "maybe"}\n')
    with pytest.raises(DataError, match="maybe"):
        own_client("mine", 0, named, template)
    path.write_text('{"text": "Good", "label": "yes"}\n{"text": "good ", "label": "no"}\n')
    with pytest.raises(DataError, match="nothing to train on"):
        own_client("mine", 0, replace(named, held_out_fraction=0.5), template)


def test_a_client_without_a_share_is_told_how_many_there_are():
    with pytest.raises(DataError, match="3 clients"):
        build_device(RECIPE, 3)
