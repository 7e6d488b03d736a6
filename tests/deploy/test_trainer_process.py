"""The warm trainer as a process: one model load, tasks over a socket, death and return."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from alignfed.deploy.client_app import client_side
from alignfed.deploy.device import training_digest
from alignfed.deploy.trainer_process import read_status
from alignfed.flower.messages import CollectOrder, Failure, Uploads
from alignfed.flower.training_socket import (
    NotTrained,
    Trained,
    TrainerClient,
    TrainerError,
    listen,
    receive_frame,
    send_frame,
)
from alignfed.flower.wire import decode_upload
from tests.deploy.devices import (
    initial_adapter,
    make_device,
    order_for,
    small_recipe,
    trainer_process,
    wait_until,
)

RECIPE = small_recipe()


@pytest.fixture(scope="module")
def start():
    return initial_adapter(RECIPE)


@pytest.fixture(scope="module")
def digest():
    return training_digest(RECIPE)


@pytest.mark.slow
def test_tasks_are_trained_one_after_another_with_one_model_load(tmp_path, start, digest):
    directory = make_device(tmp_path / "device", RECIPE)
    with trainer_process(directory):
        side = client_side(directory)
        for task_id in range(3):
            reply = side.answer(order_for(start, digest, task_id, dispatch=task_id))
            assert isinstance(reply, Uploads), reply
            assert list(reply.payloads) == list(range(task_id + 1))
        claims, _ = decode_upload(reply.payloads[2], start)
        assert claims.task_id == 2
        again = side.answer(order_for(start, digest, 1, dispatch=1, acknowledged=(0, 2)))
        assert again.payloads == {1: reply.payloads[1]}
        # The same socket still serves after words that are no task and a client that went away.
        with socket.socket(socket.AF_UNIX) as bad:
            bad.connect(str(directory.trainer_socket))
            bad.sendall(b"\xff" * 64)
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(str(directory.trainer_socket))
        refusal = side.answer(order_for(start, "0" * 64, 9))
        assert isinstance(refusal, Failure) and "same recipe" in refusal.reason
        nothing = side.answer(CollectOrder("run-1", digest, (1,)))
        assert nothing.payloads == {} and nothing.step_s == read_status(directory.status).step_s
        assert nothing.step_s is not None and 0 < nothing.step_s < 60
        given = side.answer(order_for(start, digest, 3, dispatch=3, steps=2))
        claims, _ = decode_upload(given.payloads[3], start)
        assert 0 < claims.metrics["step_s"] < 60
        assert stat.S_IMODE(directory.trainer_socket.stat().st_mode) == 0o600
    status = read_status(directory.status)
    assert (status.model_loads, status.tasks) == (1, 4)
    assert "same recipe" in status.last_error


@pytest.mark.slow
def test_a_trainer_that_is_killed_mid_task_is_given_the_task_again(tmp_path, start, digest):
    recipe = small_recipe("training.steps=2000")
    directory = make_device(tmp_path / "device", recipe)
    replies = []
    side = client_side(directory)
    order = order_for(start, training_digest(recipe), 4, steps=400)
    asking = threading.Thread(target=lambda: replies.append(side.trainer.train(order)))
    asking.start()
    with trainer_process(directory) as first:
        wait_until(lambda: read_status(directory.status).state == "training", 120)
        time.sleep(0.3)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert side.outbox.waiting("run-1") == []
    with trainer_process(directory):
        asking.join(120)
        assert replies == [Trained()]
    assert [one.task_id for one in side.outbox.waiting("run-1")] == [4]
    assert read_status(directory.status).model_loads == 2


@pytest.mark.slow
def test_a_second_trainer_in_the_same_directory_is_refused(tmp_path, start, digest):
    directory = make_device(tmp_path / "device", RECIPE)
    with trainer_process(directory):
        wait_until(lambda: read_status(directory.status).state == "ready", 120)
        with trainer_process(directory) as second:
            assert second.wait(60) == 1
        side = client_side(directory)
        assert isinstance(side.answer(order_for(start, digest)), Uploads)
    assert "is in use by process" in (directory.logs / "trainer.log").read_text()


# --- the socket alone ---------------------------------------------------------------------


def serve(path, *answers):
    """Answer connections in turn; an answer of None dies without one."""

    def run(listener):
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    if answer is not None:
                        receive_frame(connection, 1 << 20)
                        send_frame(connection, answer)

    thread = threading.Thread(target=run, args=(listen(path),))
    thread.start()
    return thread


def test_a_trainer_that_dies_over_a_task_again_and_again_fails_it(tmp_path, start, digest):
    serving = serve(tmp_path / "s", None, None, None)
    outcome = TrainerClient(tmp_path / "s").train(order_for(start, digest, 6))
    serving.join()
    assert isinstance(outcome, NotTrained) and "died 3 times" in outcome.reason


def test_a_death_or_two_cost_nothing_but_time(tmp_path, start, digest):
    serving = serve(tmp_path / "s", None, None, {"kind": "trained"})
    assert TrainerClient(tmp_path / "s").train(order_for(start, digest)) == Trained()
    serving.join()


def test_without_a_trainer_the_task_fails_when_patience_or_deadline_ends(tmp_path, start, digest):
    order = order_for(start, digest)
    outcome = TrainerClient(tmp_path / "s", patience_s=0.2).train(order)
    assert isinstance(outcome, NotTrained) and "is it running" in outcome.reason
    late = order_for(start, digest, deadline_s=0.2)
    assert isinstance(TrainerClient(tmp_path / "s").train(late), NotTrained)


def test_a_frame_beyond_its_limits_is_refused_before_it_is_read():
    here, there = socket.socketpair()
    with here, there:
        send_frame(here, {"a": 1}, b"12345")
        with pytest.raises(TrainerError, match="5 bytes"):
            receive_frame(there, 4)
    here, there = socket.socketpair()
    with here, there:
        here.sendall((1 << 20).to_bytes(4, "big") + bytes(8))
        with pytest.raises(TrainerError):
            receive_frame(there, 4)
    here, there = socket.socketpair()
    with there:
        with here:
            here.sendall((4).to_bytes(4, "big") + bytes(8) + b"[1]")
        with pytest.raises(ConnectionError):
            receive_frame(there, 4)


def test_a_client_process_starts_without_torch():
    code = (
        "import sys, alignfed.deploy.client_app\n"
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert json.loads(ran.stdout.strip().replace("'", '"')) == []
