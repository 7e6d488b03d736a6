"""Worker processes that carry out orders, one torch thread each.

Processes are spawned, not forked: a forked torch may hang on its thread pool's locks. Ctrl-C
reaches a worker as the end of its current step: the run writes a checkpoint, and can go on from
there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Protocol

from alignfed.errors import AlignFedError
from alignfed.study.bench import Bench, Order

REPORT_EVERY_S = 0.5
"""Wall-clock seconds between a worker's reports."""

PATIENCE_S = 60.0
"""How long an interrupted worker may take to finish its step before it is stopped outright."""


class PoolView(Protocol):
    """Watches orders being carried out."""

    def began(self, order: Order) -> None:
        """Take note that a worker has taken an order."""
        ...

    def advanced(self, order: Order, share: float) -> None:
        """Take note of the share that is done."""
        ...

    def ended(self, order: Order) -> None:
        """Take note that an order was carried out."""
        ...


@dataclass(frozen=True, slots=True)
class Advanced:
    """A worker's word that a share of its order is done."""

    share: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker's last word on an order.

    Attributes:
        refusal: what AlignFed refused, if it did.
        fault: the traceback of a fault of our own, if there was one.
        interrupted: whether it was told to stop.
    """

    refusal: str | None = None
    fault: str | None = None
    interrupted: bool = False


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    order: Order | None = None
    environment: str = ""


class Pool:
    """A number of workers; a context manager that leaves none behind."""

    def __init__(self, jobs: int) -> None:
        """Allow ``jobs`` workers; each is started with its first order."""
        self._jobs = jobs
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every worker: at once where idle, after a checkpoint where busy."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                if worker.order is not None and worker.process.is_alive():
                    os.kill(worker.process.pid or 0, signal.SIGINT)
                else:
                    worker.pipe.close()
        until_s = time.monotonic() + PATIENCE_S
        try:
            for worker in self._workers:
                # Its pipe must not fill up while it comes to an end.
                while worker.process.is_alive() and time.monotonic() < until_s:
                    with contextlib.suppress(EOFError, OSError):
                        if not worker.pipe.closed and worker.pipe.poll(0.1):
                            if isinstance(worker.pipe.recv(), Ended):
                                worker.pipe.close()
                            continue
                    worker.process.join(0.1)
        finally:
            for worker in self._workers:
                if worker.process.is_alive():
                    worker.process.terminate()
                worker.process.join()
                worker.pipe.close()
            self._workers.clear()

    def carry_out(self, orders: Sequence[Order], view: PoolView) -> None:
        """Carry out every order, in order where there is no reason for another.

        Raises:
            AlignFedError: a worker was refused what its order asks for, or died.
            RuntimeError: a worker met a fault of our own.
        """
        waiting = list(orders)
        while waiting or any(worker.order for worker in self._workers):
            self._hand_out(waiting, view)
            busy = {worker.pipe: worker for worker in self._workers if worker.order}
            for pipe in wait(list(busy)):
                self._hear(busy[pipe], view)  # type: ignore[index]

    def _hand_out(self, waiting: list[Order], view: PoolView) -> None:
        idle = [worker for worker in self._workers if worker.order is None]
        while waiting and (idle or len(self._workers) < self._jobs):
            worker = idle.pop() if idle else self._start()
            # Orders of the environment that the worker holds spare it the loading.
            order = next((one for one in waiting if one.environment == worker.environment), None)
            order = order or waiting[0]
            waiting.remove(order)
            worker.order, worker.environment = order, order.environment
            worker.pipe.send(order)
            view.began(order)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        # A Ctrl-C while it still imports would have it print a traceback: ``serve`` lets it pass.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _hear(self, worker: _Worker, view: PoolView) -> None:
        order = worker.order
        assert order is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError) as error:
            worker.process.join()
            raise AlignFedError(
                f"the worker that did {order.key} died (exit code {worker.process.exitcode}),"
                " perhaps for want of memory; start again with fewer workers (--jobs 1):"
                " what was done is kept",
                order=order.key,
            ) from error
        if isinstance(message, Advanced):
            view.advanced(order, message.share)
            return
        worker.order = None
        if message.interrupted:
            raise KeyboardInterrupt
        if message.refusal is not None:
            raise AlignFedError(f"{order.key}: {message.refusal}", order=order.key)
        if message.fault is not None:
            raise RuntimeError(f"{order.key} failed in a worker:\n{message.fault}")
        view.ended(order)


def serve(pipe: Connection) -> None:
    """Carry out the orders that come through a pipe until it closes; a worker's main function."""
    # Between runs there is nothing to keep; during one, the run itself listens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    import torch

    torch.set_num_threads(1)
    bench = Bench()
    said_s = 0.0

    def report(share: float) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= REPORT_EVERY_S:
            said_s = time.monotonic()
            pipe.send(Advanced(share))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            ended = _ended(bench, pipe.recv(), report)
            pipe.send(ended)
            if ended.interrupted:
                return


def _ended(bench: Bench, order: Order, report: object) -> Ended:
    try:
        bench.carry_out(order, report)  # type: ignore[arg-type]
    except AlignFedError as error:
        return Ended(refusal=str(error))
    except KeyboardInterrupt:
        return Ended(interrupted=True)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception:
        return Ended(fault=traceback.format_exc())
    return Ended()
