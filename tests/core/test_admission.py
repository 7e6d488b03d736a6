"""Thirty and more malformed uploads: each is refused with its reason, and the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core import admission
from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.admission import ExpiredTasks
from alignfed.core.events import TaskFailed, UpdateArrived
from alignfed.core.instructions import Dispatch, Publish, Reject, RejectReason
from alignfed.core.state import check_invariants
from alignfed.core.update import Update
from tests.core.adapters import make_adapter, moved
from tests.core.coordinators import answer, dispatches, start

Spoil = Callable[[Update], Update]


def with_adapter(change: Callable[[Adapter], Adapter]) -> Spoil:
    return lambda update: replace(update, adapter=change(update.adapter))


def with_element(value: float, index: int) -> Spoil:
    def change(adapter: Adapter) -> Adapter:
        buffers = {dtype: buffer.clone() for dtype, buffer in adapter.buffers.items()}
        next(iter(buffers.values()))[index] = value
        return Adapter(adapter.layout, buffers)

    return with_adapter(change)


def renamed(adapter: Adapter) -> Adapter:
    lora = dict(adapter.lora)
    lora["layers.9.q_proj"] = lora.pop("layers.0.q_proj")
    return Adapter.pack(lora, adapter.dense)


def without_layer(adapter: Adapter) -> Adapter:
    lora = dict(adapter.lora)
    del lora["layers.1.up_proj"]
    return Adapter.pack(lora, adapter.dense)


def with_extra_layer(adapter: Adapter) -> Adapter:
    extra = LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 4.0)
    return Adapter.pack({**adapter.lora, "layers.2.extra": extra}, adapter.dense)


def with_extra_dense(adapter: Adapter) -> Adapter:
    return Adapter.pack(adapter.lora, {**adapter.dense, "score.bias": torch.ones(3)})


def transposed_head(adapter: Adapter) -> Adapter:
    return Adapter.pack(
        adapter.lora, {name: tensor.T.contiguous() for name, tensor in adapter.dense.items()}
    )


def other_rank(adapter: Adapter) -> Adapter:
    return make_adapter(rank=3)


def other_alpha(adapter: Adapter) -> Adapter:
    lora = {name: LoraFactors(f.a, f.b, 8.0) for name, f in adapter.lora.items()}
    return Adapter.pack(lora, adapter.dense)


def swapped_factors(adapter: Adapter) -> Adapter:
    lora = {
        name: LoraFactors(f.b.T.contiguous(), f.a.T.contiguous(), f.alpha)
        for name, f in adapter.lora.items()
    }
    return Adapter.pack(lora, adapter.dense)


def claims_layout(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """An adapter whose buffers do not hold what its layout claims."""
    return with_adapter(
        lambda adapter: Adapter(
            adapter.layout, {dtype: change(buffer) for dtype, buffer in adapter.buffers.items()}
        )
    )


MALFORMED: dict[str, tuple[Spoil, RejectReason]] = {
    "nan in A": (with_element(math.nan, 0), RejectReason.NOT_FINITE),
    "nan in the head": (with_element(math.nan, -1), RejectReason.NOT_FINITE),
    "infinity": (with_element(math.inf, 5), RejectReason.NOT_FINITE),
    "minus infinity": (with_element(-math.inf, 11), RejectReason.NOT_FINITE),
    "nan metric": (lambda u: replace(u, metrics={"loss": math.nan}), RejectReason.NOT_FINITE),
    "infinite metric": (lambda u: replace(u, metrics={"loss": math.inf}), RejectReason.NOT_FINITE),
    "text metric": (lambda u: replace(u, metrics={"loss": "low"}), RejectReason.NOT_FINITE),
    "renamed layer": (with_adapter(renamed), RejectReason.WRONG_NAMES),
    "missing layer": (with_adapter(without_layer), RejectReason.WRONG_NAMES),
    "extra layer": (with_adapter(with_extra_layer), RejectReason.WRONG_NAMES),
    "extra dense tensor": (with_adapter(with_extra_dense), RejectReason.WRONG_NAMES),
    "missing head": (with_adapter(lambda a: Adapter.pack(a.lora)), RejectReason.WRONG_NAMES),
    "empty adapter": (with_adapter(lambda a: Adapter.pack({})), RejectReason.WRONG_NAMES),
    "transposed head": (with_adapter(transposed_head), RejectReason.WRONG_SHAPE),
    "another rank": (with_adapter(other_rank), RejectReason.WRONG_SHAPE),
    "another alpha": (with_adapter(other_alpha), RejectReason.WRONG_SHAPE),
    "A and B swapped": (with_adapter(swapped_factors), RejectReason.WRONG_SHAPE),
    "bf16": (with_adapter(lambda a: a.to(torch.bfloat16)), RejectReason.WRONG_DTYPE),
    "fp16": (with_adapter(lambda a: a.to(torch.float16)), RejectReason.WRONG_DTYPE),
    "truncated buffer": (claims_layout(lambda b: b[:-1]), RejectReason.WRONG_SHAPE),
    "oversized buffer": (claims_layout(lambda b: b.repeat(10)), RejectReason.WRONG_SHAPE),
    "empty buffer": (claims_layout(lambda b: b[:0]), RejectReason.WRONG_SHAPE),
    "two-dimensional buffer": (claims_layout(lambda b: b[None]), RejectReason.WRONG_SHAPE),
    "buffer of other dtype": (claims_layout(lambda b: b.double()), RejectReason.WRONG_DTYPE),
    "no buffer": (with_adapter(lambda a: Adapter(a.layout, {})), RejectReason.WRONG_DTYPE),
    "future version": (lambda u: replace(u, base_version=99), RejectReason.FUTURE_VERSION),
    "negative version": (lambda u: replace(u, base_version=-1), RejectReason.EVICTED_VERSION),
    "unknown client": (lambda u: replace(u, client_id=77), RejectReason.UNKNOWN_CLIENT),
    "someone else's task": (lambda u: replace(u, client_id=1), RejectReason.WRONG_CLIENT),
    "task never given": (lambda u: replace(u, task_id=12345), RejectReason.UNKNOWN_TASK),
    "negative task": (lambda u: replace(u, task_id=-1), RejectReason.UNKNOWN_TASK),
    "task id of another type": (lambda u: replace(u, task_id="0"), RejectReason.UNKNOWN_TASK),
    "no examples": (lambda u: replace(u, num_examples=0), RejectReason.NO_EXAMPLES),
    "negative examples": (lambda u: replace(u, num_examples=-4), RejectReason.NO_EXAMPLES),
    "fractional examples": (lambda u: replace(u, num_examples=1.5), RejectReason.NO_EXAMPLES),
    "norm x1000": (
        lambda u: replace(u, adapter=moved(u.adapter, 5, 100.0)),
        RejectReason.OUTLYING_NORM,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_upload_is_refused_with_its_reason_and_the_run_goes_on(name):
    spoil, reason = MALFORMED[name]
    coordinator, state, out = start(clients=4, concurrency=3, buffer_size=2)
    tasks = dispatches(out)
    for turn in range(12):  # enough accepted uploads for the norm's history
        task = tasks.pop(0)
        state, out = coordinator.handle(state, UpdateArrived(1.0 + turn, answer(state, task, turn)))
        tasks += dispatches(out)
    task = next(task for task in tasks if task.client_id == 0)
    before, accepted = state.adapter.checksum, state.accepted

    spoiled = spoil(answer(state, task, 100))
    state, out = coordinator.handle(state, UpdateArrived(50.0, spoiled))

    (rejection,) = [instruction for instruction in out if isinstance(instruction, Reject)]
    assert rejection.reason == reason
    assert rejection.detail
    assert state.rejections == {reason: 1}
    assert state.accepted == accepted
    assert state.adapter.checksum == before
    tasks = [task for task in tasks if task.task_id in state.tasks] + dispatches(out)
    versions = state.version
    for turn in range(4):
        state, out = coordinator.handle(
            state, UpdateArrived(60.0 + turn, answer(state, tasks.pop(0), turn))
        )
        tasks += [i.task for i in out if isinstance(i, Dispatch)]
    assert state.version > versions


def test_an_answer_sent_twice_counts_once():
    coordinator, state, out = start(clients=2, concurrency=2, buffer_size=4)
    update = answer(state, dispatches(out)[0], 1)
    state, _ = coordinator.handle(state, UpdateArrived(1.0, update))
    state, out = coordinator.handle(state, UpdateArrived(1.1, update))
    (rejection,) = [i for i in out if isinstance(i, Reject)]
    assert rejection.reason == RejectReason.TASK_USED
    assert state.accepted == 1


def test_a_late_upload_is_known_as_late_however_many_tasks_were_given_up_after_it(monkeypatch):
    monkeypatch.setattr(admission, "MOST_EXPIRED", 4)
    coordinator, state, out = start(clients=2, concurrency=2, buffer_size=99, retry_backoff_s=0.0)
    patient, task = dispatches(out)
    used, first = answer(state, patient, 1), answer(state, task, 2)
    for turn in range(40):
        failed = TaskFailed(float(turn), task.task_id, task.client_id, "node gone")
        state, out = coordinator.handle(state, failed)
        (task,) = dispatches(out)
        check_invariants(state, coordinator.settings)
        assert len(state.expired.ids) <= 8
    refused = []
    # The first task given up, then one that is in flight all the while, and the same again.
    for update in (first, used, used):
        state, out = coordinator.handle(state, UpdateArrived(50.0, update))
        refused.append([i.reason for i in out if isinstance(i, Reject)])
    assert refused == [[RejectReason.TASK_EXPIRED], [], [RejectReason.TASK_EXPIRED]]
    assert state.accepted == 1


@given(st.permutations(range(60)))
def test_every_task_given_up_counts_as_such_in_whichever_order(order):
    expired = ExpiredTasks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "MOST_EXPIRED", 5)
        for done, task_id in enumerate(order):
            expired.add(task_id)
            assert all(one in expired for one in order[: done + 1])
            assert 60 not in expired and len(expired.ids) <= 10


def test_an_upload_that_names_another_held_version_than_its_task_is_refused():
    coordinator, state, out = start(clients=3, concurrency=3, buffer_size=1)
    first, second, _ = dispatches(out)
    state, out = coordinator.handle(state, UpdateArrived(1.0, answer(state, first, 1)))
    assert any(isinstance(i, Publish) for i in out)
    lying = replace(answer(state, second, 2), base_version=state.version)
    state, out = coordinator.handle(state, UpdateArrived(2.0, lying))
    assert [i.reason for i in out if isinstance(i, Reject)] == [RejectReason.WRONG_VERSION]


def test_norms_are_not_judged_before_enough_have_been_seen():
    coordinator, state, out = start(clients=4, concurrency=2, buffer_size=4)
    task = dispatches(out)[0]
    large = replace(answer(state, task, 1), adapter=moved(state.adapter, 1, 50.0))
    state, out = coordinator.handle(state, UpdateArrived(1.0, large))
    assert not [i for i in out if isinstance(i, Reject)]
