"""What a device answers: its outbox first, then the trainer, and what is still owed."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from alignfed.flower import client_app
from alignfed.flower.client_app import ClientSide, answer_message
from alignfed.flower.messages import (
    MESSAGE_TYPE,
    CollectOrder,
    Failure,
    ProtocolError,
    StopOrder,
    TaskOrder,
    Uploads,
    read_reply,
    write_order,
)
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import NotTrained, Trained


class Trainer:
    """Keeps a short upload for each task, as the trainer process does, or refuses."""

    def __init__(self, outbox):
        self.outbox, self.refusal, self.trained = outbox, None, []

    def train(self, order):
        if self.refusal:
            return NotTrained(self.refusal)
        self.trained.append(order.task_id)
        self.outbox.put(order.run, order.task_id, b"upload %d" % order.task_id, {})
        return Trained()


@pytest.fixture
def side(tmp_path):
    outbox = Outbox(tmp_path / "outbox.sqlite")
    yield ClientSide(outbox, Trainer(outbox))
    outbox.close()


def task(task_id, *acknowledged, run="r"):
    return TaskOrder(run, "digest", task_id, 0, task_id, b"adapter", acknowledged=acknowledged)


def test_a_task_is_trained_once_and_answered_again_from_the_outbox(side):
    first = side.answer(task(1))
    assert first == Uploads("r", {1: b"upload 1"})
    assert side.answer(task(1)) == first
    assert side.trainer.trained == [1]


def test_what_is_not_acknowledged_joins_every_reply_and_what_is_leaves(side):
    side.answer(task(1))
    assert side.answer(task(2)).payloads == {1: b"upload 1", 2: b"upload 2"}
    assert side.answer(task(3, 1)).payloads == {2: b"upload 2", 3: b"upload 3"}
    assert side.answer(CollectOrder("r", "digest", (3,))).payloads == {2: b"upload 2"}
    assert side.answer(StopOrder("r", "digest", (2,))).payloads == {}


def test_another_run_s_uploads_stay_at_home(side):
    side.answer(task(1))
    assert side.answer(task(1, run="other")).payloads == {1: b"upload 1"}
    assert side.answer(CollectOrder("other", "digest", (1,))).payloads == {}
    assert side.answer(CollectOrder("r", "digest")).payloads == {1: b"upload 1"}


def test_a_task_that_cannot_be_trained_is_said_to_have_failed(side):
    side.trainer.refusal = "no room"
    assert side.answer(task(4)) == Failure("r", 4, "no room")


def test_a_reply_is_bounded_and_always_holds_its_own_task(side, monkeypatch):
    for task_id in range(4):
        side.answer(task(task_id))
    monkeypatch.setattr(client_app, "REPLY_BYTES", 17)
    assert list(side.answer(task(4)).payloads) == [0, 4]
    monkeypatch.setattr(client_app, "REPLY_BYTES", 1)
    assert list(side.answer(task(5)).payloads) == [5]
    # Asked for what it has, a device sends at least the oldest: else nothing would ever arrive.
    assert list(side.answer(CollectOrder("r", "digest")).payloads) == [0]


def test_a_flower_message_is_answered_in_kind_and_another_is_refused(side, monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(write_order(task(1)), dst_node_id=1, message_type=MESSAGE_TYPE)
    message.metadata.__dict__["_message_id"] = "some-id"
    assert read_reply(answer_message(side, message).content).payloads == {1: b"upload 1"}
    strange = Message(
        RecordDict({"config": ConfigRecord({"lr": 0.1})}), dst_node_id=1, message_type=MESSAGE_TYPE
    )
    with pytest.raises(ProtocolError):
        answer_message(side, strange)
