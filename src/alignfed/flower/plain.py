"""The words of a plain Flower app: arrays and a config there, arrays and metrics back.

Such an app knows nothing of AlignFed. It keeps no finished uploads, so what is lost on the way is
trained again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from alignfed.core.adapter import DTYPES, Adapter, LoraFactors
from alignfed.core.reasons import RejectReason
from alignfed.core.update import Task
from alignfed.errors import AdapterError
from alignfed.flower.ports import Answer, Decoded, RefusedError

_DOWN, _UP = ".lora_A", ".lora_B"


def adapter_of(arrays: ArrayRecord) -> Adapter:
    """Return named arrays as an adapter: pairs called as PEFT calls them are LoRA factors.

    The scale ``alpha / rank`` belongs to the app and is the same for all, so it is left at 1.

    Raises:
        AdapterError: an array is neither fp32 nor fp16, or a pair does not fit.
    """
    tensors = {name: _tensor(name, array) for name, array in arrays.items()}
    lora, dense = {}, {}
    for name, tensor in tensors.items():
        partner = tensors.get(name.replace(_DOWN, _UP)) if _DOWN in name else None
        if partner is not None and tensor.ndim == partner.ndim == 2:
            lora[name.replace(_DOWN, "")] = LoraFactors(tensor, partner, float(tensor.shape[0]))
        elif _UP not in name or name.replace(_UP, _DOWN) not in tensors or tensor.ndim != 2:
            dense[name] = tensor
    return Adapter.pack(lora, dense)


def arrays_of(adapter: Adapter, names: Sequence[str]) -> ArrayRecord:
    """Return an adapter as named arrays, in the app's order."""
    lora, dense = adapter.lora, adapter.dense
    record = ArrayRecord()
    for name in names:
        if name in dense:
            tensor = dense[name]
        elif _DOWN in name:
            tensor = lora[name.replace(_DOWN, "")].a
        else:
            tensor = lora[name.replace(_UP, "")].b
        record[name] = Array(np.ascontiguousarray(tensor.numpy()))
    return record


class PlainDialect:
    """Implements ``Dialect`` for an app that was written for a synchronous strategy."""

    message_type = "train"
    keeps_uploads = False

    def __init__(
        self,
        names: Sequence[str],
        config: ConfigRecord,
        *,
        arrays_key: str = "arrays",
        config_key: str = "config",
        examples_key: str = "num-examples",
    ) -> None:
        """Speak for one app.

        Args:
            names: its arrays, in order.
            config: what it is sent with every task.
            arrays_key: name of the record of arrays in what it is sent.
            config_key: the same of the config.
            examples_key: the metric that says how many examples it trained on.
        """
        self._names = tuple(names)
        self._config = dict(config)
        self._arrays_key = arrays_key
        self._config_key = config_key
        self._examples_key = examples_key
        self._sent: tuple[int, ArrayRecord] | None = None

    def task(
        self, task: Task, sent: Adapter, left_s: float, acknowledged: Sequence[int]
    ) -> RecordDict:
        """Return what the app is sent in a round; the round is the version that it works on."""
        if self._sent is None or self._sent[0] != task.base_version:
            self._sent = (task.base_version, arrays_of(sent, self._names))
        config = ConfigRecord({**self._config, "server-round": task.base_version + 1})
        return RecordDict({self._arrays_key: self._sent[1], self._config_key: config})

    def collect(self, acknowledged: Sequence[int]) -> RecordDict:
        """Plain apps keep nothing, so nobody asks."""
        raise NotImplementedError("a plain app keeps no uploads")

    def stop(self, acknowledged: Sequence[int]) -> RecordDict:
        """Plain apps are not told of the end."""
        raise NotImplementedError("a plain app is not told of the end")

    def read(self, content: RecordDict, task_id: int | None) -> Answer:
        """Return the answer to a task, not looked into."""
        assert task_id is not None
        return Answer({task_id: content})

    def decode(self, task_id: int, payload: RecordDict, base: Adapter) -> Decoded:
        """Return an upload; names, shapes and dtypes are left to admission.

        Raises:
            RefusedError: not one record of arrays and one of metrics, or arrays that are damaged.
        """
        if len(payload.array_records) != 1 or len(payload.metric_records) != 1:
            raise RefusedError(
                f"the reply holds {len(payload.array_records)} ArrayRecords and"
                f" {len(payload.metric_records)} MetricRecords, must be one of each",
                RejectReason.MALFORMED,
            )
        (arrays,) = payload.array_records.values()
        (metrics,) = payload.metric_records.values()
        # What a header claims is compared before any of it is unpacked.
        most = 2 * base.layout.size_bytes + 4096 * (len(self._names) + 1)
        if (size := sum(len(array.data) for array in arrays.values())) > most:
            raise RefusedError(
                f"the arrays take {size} bytes, at most {most} are expected", RejectReason.TOO_LARGE
            )
        try:
            adapter = adapter_of(arrays)
        except AdapterError as error:
            raise RefusedError(str(error), RejectReason.WRONG_DTYPE) from error
        except (ValueError, TypeError, OSError, EOFError, MemoryError) as error:
            raise RefusedError(
                f"the arrays are damaged: {error}", RejectReason.MALFORMED
            ) from error
        return Decoded(None, adapter, self._examples(metrics), _numbers(metrics))

    def size_bytes(self, content: RecordDict) -> int:
        """Return the bytes of a message's arrays."""
        records = content.array_records.values()
        return sum(len(array.data) for record in records for array in record.values())

    def _examples(self, metrics: Mapping[str, Any]) -> int:
        value = metrics.get(self._examples_key)
        whole = isinstance(value, int | float) and math.isfinite(value) and value == int(value)
        return int(value) if whole and value is not None else 0


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _tensor(name: str, array: Array) -> Tensor:
    found = array.numpy()
    tensor = torch.from_numpy(np.array(found))
    if tensor.dtype not in DTYPES.values():
        raise AdapterError(
            f"array {name!r} is {found.dtype}, AlignFed combines float32 and float16; send the"
            " trained weights alone, or convert them",
            name=name,
        )
    return tensor


__all__ = ["PlainDialect", "adapter_of", "arrays_of"]
