"""The device's answers to the server's orders. Nothing here trains or loads a model.

A task that the device has finished is answered from its outbox. Any other goes to the trainer,
which keeps the base model loaded and puts the upload into the outbox before it says so. Each reply
carries, beside what was asked for, uploads of the run that the server has not acknowledged.

No torch here: Flower may start a fresh process for every message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from alignfed.flower.messages import (
    Failure,
    Order,
    Reply,
    TaskOrder,
    Uploads,
    read_order,
    write_reply,
)
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import NotTrained, Trained

_log = logging.getLogger(__name__)

REPLY_BYTES = 64 << 20
"""Uploads of earlier tasks join a reply up to this many bytes; the rest waits for the next."""


class TaskTrainer(Protocol):
    """Trains tasks and leaves their uploads in the outbox."""

    def train(self, order: TaskOrder) -> Trained | NotTrained:
        """Have a task trained; its upload is in the outbox once this says so."""
        ...


@dataclass(frozen=True)
class ClientSide:
    """What a device answers with.

    Attributes:
        outbox: its finished uploads.
        trainer: where it trains.
        step_s: says how many seconds a local step takes; None: it is not known.
    """

    outbox: Outbox
    trainer: TaskTrainer
    step_s: Callable[[], float | None] = lambda: None

    def answer(self, order: Order) -> Reply:
        """Carry out an order and return what to send back.

        Raises:
            DeploymentError: the device's disk fails.
        """
        run = order.run
        self.outbox.acknowledge(run, order.acknowledged)
        if not isinstance(order, TaskOrder):
            return self._uploads(run, None)
        if all(one.task_id != order.task_id for one in self.outbox.waiting(run)):
            outcome = self.trainer.train(order)
            if isinstance(outcome, NotTrained):
                _log.warning("task %d of run %s failed: %s", order.task_id, run, outcome.reason)
                return Failure(run, order.task_id, outcome.reason)
        return self._uploads(run, order.task_id)

    def _uploads(self, run: str, task_id: int | None) -> Uploads:
        """Return what waits, oldest first: the task's own always, others while there is room."""
        waiting = self.outbox.waiting(run)
        room = REPLY_BYTES - sum(one.size_bytes for one in waiting if one.task_id == task_id)
        payloads: dict[int, bytes] = {}
        for one in waiting:
            if one.task_id != task_id:
                if one.size_bytes > room and (payloads or task_id is not None):
                    continue
                room -= one.size_bytes
            if (payload := self.outbox.payload(run, one.task_id)) is not None:
                payloads[one.task_id] = payload
        return Uploads(run, payloads, self.step_s() if task_id is None else None)


def answer_message(side: ClientSide, message: Message) -> Message:
    """Return a device's reply to a Flower message.

    Raises:
        ProtocolError: the message is no order.
        DeploymentError: the device's disk fails.
    """
    return Message(write_reply(side.answer(read_order(message.content))), reply_to=message)


def make_app(find: Callable[[Context], ClientSide]) -> ClientApp:
    """Return a Flower ClientApp that answers with the device that ``find`` returns."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer_message(find(context), message)

    return app
