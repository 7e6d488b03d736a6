from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from alignfed.core.adapter import Adapter
from alignfed.errors import AdapterError, RuleError
from alignfed.flower import AsyncFedAvg, dropin
from alignfed.flower.plain import adapter_of, arrays_of
from tests.flower.grids import Clock, ScriptedGrid

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.bias"


def arrays(value: float = 0.0) -> ArrayRecord:
    shapes = {B: (4, 2), A: (2, 3), HEAD: (5,)}
    return ArrayRecord(
        {name: Array(np.full(shape, value, np.float32)) for name, shape in shapes.items()}
    )


@dataclass
class PlainDevice:
    """A ClientApp written for FedAvg: it adds 1 to every weight it is sent."""

    takes_s: float = 1.0
    answer: Callable[[RecordDict], RecordDict | Error | None] | None = None
    rounds: list[int] = field(default_factory=list)

    def take(self, content: RecordDict) -> tuple[float, RecordDict, RecordDict | Error | None]:
        self.rounds.append(int(content.config_records["config"]["server-round"]))
        assert content.config_records["config"]["lr"] == 0.5
        return self.takes_s, content, (self.answer or self.honest)(content)

    @staticmethod
    def honest(content: RecordDict) -> RecordDict:
        moved = {name: Array(one.numpy() + 1) for name, one in content["arrays"].items()}  # type: ignore[union-attr]
        metrics = MetricRecord({"num-examples": 8, "train_loss": 2.0})
        return RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dropin.time, "monotonic", clock)
    monkeypatch.setattr(dropin.time, "sleep", clock.sleep)
    return clock


def grid_of(clock: Clock, *devices: PlainDevice) -> ScriptedGrid:
    return ScriptedGrid(clock, dict(enumerate(devices, start=500)))  # type: ignore[arg-type]


def test_arrays_become_an_adapter_and_arrays_again_in_the_same_order() -> None:
    given = arrays(0.25)
    adapter = adapter_of(given)
    assert set(adapter.lora) == {"layer.weight"} and set(adapter.dense) == {HEAD}
    again = arrays_of(adapter, list(given))
    assert list(again) == [B, A, HEAD]
    assert all(np.array_equal(again[name].numpy(), given[name].numpy()) for name in given)


def test_a_factor_without_its_partner_is_kept_whole() -> None:
    record = ArrayRecord({A: Array(np.zeros((2, 3), np.float32))})
    assert set(adapter_of(record).dense) == {A}


def test_an_array_of_integers_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match="steps"):
        adapter_of(ArrayRecord({"steps": Array(np.zeros(3, np.int64))}))


def test_a_synchronous_app_trains_asynchronously(clock: Clock) -> None:
    fast, slow = PlainDevice(takes_s=1.0), PlainDevice(takes_s=7.0)
    grid = grid_of(clock, fast, fast, slow)
    strategy = AsyncFedAvg(buffer_size=2, min_available_nodes=3)
    seen: dict[int, float] = {}

    def evaluate(version: int, found: ArrayRecord) -> MetricRecord:
        seen[version] = float(found[HEAD].numpy()[0])
        return MetricRecord({"bias": seen[version]})

    result = strategy.start(
        grid, arrays(), num_rounds=6, train_config=ConfigRecord({"lr": 0.5}), evaluate_fn=evaluate
    )
    assert list(result.arrays) == list(arrays())
    assert sorted(result.evaluate_metrics_serverapp) == list(range(7))
    assert sorted(result.train_metrics_clientapp) == list(range(1, 7))
    assert result.train_metrics_clientapp[1] == {"num-examples": 8.0, "train_loss": 2.0}
    assert seen[6] > seen[1] > seen[0] == 0.0
    # Nobody waits for the slow one: the others are versions ahead when it answers.
    assert len(fast.rounds) > 2 * len(slow.rounds) and max(fast.rounds) > max(slow.rounds[:1]) + 1


def test_a_fault_of_one_app_is_refused_and_the_others_go_on(clock: Clock) -> None:
    def wrong_names(content: RecordDict) -> RecordDict:
        reply = PlainDevice.honest(content)
        record = reply.array_records["arrays"]
        record["other"] = record.pop(HEAD)
        return reply

    def no_metrics(content: RecordDict) -> RecordDict:
        return RecordDict({"arrays": PlainDevice.honest(content)["arrays"]})

    def pickled(content: RecordDict) -> RecordDict:
        reply = PlainDevice.honest(content)
        record = reply.array_records["arrays"]
        record[HEAD] = Array("float32", (5,), "numpy.ndarray", b"\x80\x05K\x01.")
        return reply

    broken = [
        PlainDevice(answer=one)
        for one in (wrong_names, no_metrics, pickled, lambda content: Error(2, "raised"))
    ]
    honest = PlainDevice()
    grid = grid_of(clock, honest, honest, *broken)
    strategy = AsyncFedAvg(buffer_size=2, min_available_nodes=6)
    result = strategy.start(grid, arrays(), num_rounds=5, train_config=ConfigRecord({"lr": 0.5}))
    final = adapter_of(result.arrays)
    assert all(torch.isfinite(buffer).all() for buffer in final.buffers.values())
    assert float(result.arrays[HEAD].numpy()[0]) > 0
    assert len(honest.rounds) >= 10


@pytest.mark.parametrize("lora", ["ffa", "fedsa", "fedex", "flora", "flexlora", "hetlora"])
def test_a_rule_that_needs_our_own_client_app_is_refused(lora: str) -> None:
    with pytest.raises(RuleError, match="factor, product, fedrot"):
        AsyncFedAvg(lora=lora)


def test_a_rule_that_assigns_local_steps_is_refused() -> None:
    with pytest.raises(RuleError, match="fedcompass"):
        AsyncFedAvg(rule="fedcompass")


def test_products_are_combined_without_knowing_alpha(clock: Clock) -> None:
    start = adapter_of(arrays())
    assert isinstance(start, Adapter)
    grid = grid_of(clock, PlainDevice(), PlainDevice())
    strategy = AsyncFedAvg(lora="product", buffer_size=2)
    result = strategy.start(grid, arrays(1.0), num_rounds=2, train_config=ConfigRecord({"lr": 0.5}))
    product = result.arrays[B].numpy() @ result.arrays[A].numpy()
    assert np.isfinite(product).all() and float(product.mean()) > 2.0
