"""A fleet: devices, and what happens to a task that runs on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alignfed.core.value import value
from alignfed.errors import FleetError
from alignfed.simulation.conditions import Conditions
from alignfed.simulation.cost import TaskCost
from alignfed.simulation.devices import DeviceTable

LostReason: TypeAlias = Literal["unavailable", "failure"]


@value(frozen=True, slots=True)
class TaskTimes:
    """When a task's phases end, in virtual seconds.

    Attributes:
        downloaded_s: the adapter has arrived on the device.
        computed_s: local training is done.
        finished_s: the upload has arrived at the server.
        lost_at_s: when the task is lost instead; None where it finishes.
        lost_reason: the device went away (the server can see that), or the task vanished.
    """

    downloaded_s: float
    computed_s: float
    finished_s: float
    lost_at_s: float | None = None
    lost_reason: LostReason | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices and their conditions over time."""

    devices: DeviceTable
    conditions: Conditions

    def __len__(self) -> int:
        """Return the number of devices."""
        return len(self.devices)

    def task_times(self, device_id: int, start_s: float, cost: TaskCost) -> TaskTimes:
        """Return when a task that is sent at ``start_s`` is done, or lost.

        Compute time is tokens x FLOPs per token / (FLOP/s x efficiency), transfer time is
        bytes / bandwidth; both stretch with the conditions of each moment they last.

        Raises:
            FleetError: there is no such device.
        """
        table, conditions = self.devices, self.conditions
        speeds = table.seconds_per_flop
        if not 0 <= device_id < len(speeds):  # a negative index would name another device
            raise FleetError(
                f"there is no device {device_id}: the fleet's ids are 0 to {len(table) - 1}",
                device_id=device_id,
                devices=len(table),
            )
        download_s = cost.download_bytes * table.seconds_per_byte_down[device_id]
        compute_s = cost.tokens * cost.flops_per_token * speeds[device_id]
        upload_s = cost.upload_bytes * table.seconds_per_byte_up[device_id]
        if conditions.steady:
            downloaded_s = start_s + download_s
            computed_s = downloaded_s + compute_s
            return TaskTimes(downloaded_s, computed_s, computed_s + upload_s)
        network, compute = conditions.network_factor, conditions.compute_factor
        downloaded_s = self._end(device_id, start_s, download_s, network)
        computed_s = self._end(device_id, downloaded_s, compute_s, compute)
        finished_s = self._end(device_id, computed_s, upload_s, network)
        lost_at_s, reason = self._loss(device_id, start_s)
        if lost_at_s >= finished_s:
            return TaskTimes(downloaded_s, computed_s, finished_s)
        return TaskTimes(downloaded_s, computed_s, finished_s, lost_at_s, reason)

    def refuse_unanswered(self, task_timeout_s: float | None) -> None:
        """Refuse devices that lose tasks without a word where the server waits for ever.

        Raises:
            FleetError: tasks vanish and no timeout is set.
        """
        if task_timeout_s is None and self.conditions.loses_tasks():
            raise FleetError(
                "the fleet's devices lose tasks without a word (failures_s in a device trace), and"
                " the server would wait for them for ever; set server.task_timeout_s"
            )

    def _loss(self, device_id: int, start_s: float) -> tuple[float, LostReason]:
        if not self.conditions.available(device_id, start_s):
            return start_s, "unavailable"
        gone_s = self.conditions.next_change_s(device_id, start_s)
        failed_s = self.conditions.next_failure_s(device_id, start_s)
        return (failed_s, "failure") if failed_s < gone_s else (gone_s, "unavailable")

    def _end(
        self,
        device_id: int,
        start_s: float,
        duration_s: float,
        factor: Callable[[int, float], float],
    ) -> float:
        """Return when work of ``duration_s`` at factor 1 ends, through every change on the way."""
        now_s, left_s = start_s, duration_s
        while True:
            slowness = factor(device_id, now_s)
            step_s = self.conditions.next_step_s(device_id, now_s)
            end_s = now_s + left_s * slowness
            if end_s <= step_s or step_s == math.inf:
                return end_s
            left_s -= (step_s - now_s) / slowness
            now_s = step_s
