from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest
from flwr.app import Message

from alignfed.errors import AlignFedError
from alignfed.flower.messages import CollectOrder, write_order
from alignfed.flower.post import ABSENT, PostOffice, Sent
from tests.flower.grids import Clock, FakeDevice, ScriptedGrid

ORDER = write_order(CollectOrder("run", "digest"))


def sent(node_id: int, ttl_s: float = 600.0) -> Sent:
    return Sent(node_id, node_id - 100, None, 0.0, ttl_s)


def fetched(post: PostOffice, now_s: float = 0.0) -> list[int]:
    return [reply.sent.node_id for reply in post.fetch(now_s)]


class HangingGrid(ScriptedGrid):
    """A pull that claims a reply of node 100 returns only once that reply is whole."""

    whole = threading.Event()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        if any(message.metadata.src_node_id == 100 for message in found):
            assert self.whole.wait(60.0)
        return found


def test_a_pull_that_hangs_holds_up_nobody_else() -> None:
    """Flower's pull waits until every reply it has claimed is whole, however slow its sender."""
    clock = Clock()
    grid = HangingGrid(clock, {100: FakeDevice(), 101: FakeDevice()})
    post = PostOffice(grid, "train")
    post.nodes()
    assert post.push(sent(100), ORDER)
    clock.sleep(1.0)
    assert fetched(post) == []
    assert post.push(sent(101), ORDER)
    clock.sleep(1.0)
    assert fetched(post) == [101]
    grid.whole.set()
    until_s = time.monotonic() + 60.0
    while not (found := fetched(post)):
        assert time.monotonic() < until_s
    assert found == [100]


def test_a_node_has_one_message_at_a_time() -> None:
    post = PostOffice(ScriptedGrid(Clock(), {100: FakeDevice()}), "train")
    assert post.push(sent(100), ORDER) and post.busy(100)
    with pytest.raises(AlignFedError, match="has a message already"):
        post.push(sent(100), ORDER)


def test_a_message_that_flower_does_not_take_is_not_waited_for() -> None:
    grid = ScriptedGrid(Clock(), {100: FakeDevice()})
    grid.refuses_push = True
    post = PostOffice(grid, "train")
    assert not post.push(sent(100), ORDER)
    assert not post.busy(100) and not post.under_way


def test_a_message_without_an_answer_ends_with_its_life() -> None:
    clock = Clock()
    grid = ScriptedGrid(clock, {100: FakeDevice(answer=lambda device, order: None)})
    post = PostOffice(grid, "train")
    assert post.push(sent(100, ttl_s=30.0), ORDER)
    assert post.fetch(29.0) == []
    (reply,) = post.fetch(30.0)
    assert reply.content is None and reply.code == ABSENT and not post.busy(100)


def test_what_the_grid_raises_reaches_the_caller() -> None:
    class Broken(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise RuntimeError("the run is over")

    post = PostOffice(Broken(Clock(), {100: FakeDevice()}), "train")
    assert post.push(sent(100), ORDER)
    with pytest.raises(RuntimeError, match="the run is over"):
        post.fetch(0.0)
