"""The note of a message under work: whole, taken once, and harmless when it is not."""

from __future__ import annotations

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from alignfed.flower.messages import MESSAGE_TYPE, TaskOrder, read_order, write_order
from alignfed.flower.warm_client import take_note, write_note


@pytest.fixture
def message(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 5)
    order = TaskOrder("r", "digest", 3, 1, 2, b"adapter" * 100, acknowledged=(1, 2))
    return Message(write_order(order), dst_node_id=1, message_type=MESSAGE_TYPE)


CONTEXT = Context(
    run_id=5, node_id=7, node_config={"a": 1}, state=RecordDict(), run_config={}, series_id=0
)


def test_a_note_is_read_as_it_was_written_and_once(tmp_path, message):
    message.metadata.__dict__["_message_id"] = "some-id"
    write_note(tmp_path / "note", "token", message, CONTEXT)
    assert (tmp_path / "note").stat().st_mode & 0o777 == 0o600
    token, found, context = take_note(tmp_path / "note")
    assert token == "token"
    assert read_order(found.content) == read_order(message.content)
    assert found.metadata.message_id == "some-id"
    assert (context.run_id, context.node_id, context.node_config) == (5, 7, {"a": 1})
    assert take_note(tmp_path / "note") is None


def test_a_cut_or_garbled_note_is_given_up(tmp_path, message, caplog):
    path = tmp_path / "note"
    write_note(path, "token", message, CONTEXT)
    whole = path.read_bytes()
    for spoiled in (b"", whole[:10], whole[:-1], b"\xff" * len(whole), whole[:40] + b"\xff" * 300):
        path.write_bytes(spoiled)
        assert take_note(path) is None
        assert not path.exists()
    assert "is not sound" in caplog.text
