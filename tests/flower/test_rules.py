"""Every rule behind the driver, over the wire, with devices that keep what is theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import RULES, make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.lora import LORA_RULES, Exchange, exchange_of, incompatibility, make_lora_rule
from alignfed.core.state import CoordinatorSettings, StopConditions, check_invariants
from alignfed.flower import wire
from alignfed.flower.messages import Encoding, TaskOrder
from tests.flower.grids import FakeDevice
from tests.flower.servers import serve

SETTINGS: dict[str, dict[str, Any]] = {
    "alignfed": {"alignment_map": "rank"},
    "alignfed_paper": {"alignment_map": "rank"},
}


@dataclass
class ExchangingDevice(FakeDevice):
    """A device that trains by an exchange: it sends what travels and keeps what is its own."""

    exchange: Exchange = field(default_factory=Exchange)
    kept: Adapter | None = None

    def train(self, order: TaskOrder, **changes: object) -> bytes:
        self.trained.append(order.task_id)
        sent = wire.decode_download(order.payload, max_bytes=1 << 30).adapter
        start = self.exchange.rejoin(sent, self.kept)
        buffers = {dtype: one + self.shift for dtype, one in start.buffers.items()}
        trained = Adapter(start.layout, buffers)
        self.kept = self.exchange.kept(trained)
        claims = wire.Claims(
            order.run, order.task_id, order.base_version, 8, order.encoding, {"tokens": 5.0}
        )
        base = self.exchange.upload(sent)
        return wire.encode_upload(claims, self.exchange.upload(trained), base)[0]


def run(root: Path, rule: str, lora: str, encoding: Encoding = "fp32") -> None:
    exchange = exchange_of(lora)
    if exchange.cut is not None:
        exchange = exchange.with_ranks({1: 1})
    coordinator = Coordinator(
        CoordinatorSettings(3, 2, flush_timeout_s=60.0, stop=StopConditions(max_uploads=9)),
        make_rule(rule, **SETTINGS.get(rule, {})),
        make_lora_rule(lora),
        exchange=exchange,
    )
    devices: dict[int, FakeDevice] = {
        100 + i: ExchangingDevice(takes_s=3.0 + 2 * i, exchange=exchange) for i in range(3)
    }
    server = serve(root, devices, coordinator, encoding=encoding)
    reader = server.run()
    state = server.driver.state
    check_invariants(state, coordinator.settings)
    with reader:
        rejections = reader.rejections()
        outcomes = reader.outcomes()
    assert set(rejections) <= {"run_stopped"}
    assert outcomes["applied"] == 9 and state.version >= 1
    assert all(one.isfinite().all() for one in state.adapter.buffers.values())


@pytest.mark.parametrize("rule", RULES)
def test_every_aggregation_rule_runs_on_devices(tmp_path: Path, rule: str) -> None:
    run(tmp_path, rule, "factor")


@pytest.mark.parametrize("lora", LORA_RULES)
def test_every_lora_rule_runs_on_devices(tmp_path: Path, lora: str) -> None:
    assert incompatibility(make_rule("fedbuff"), lora) is None
    run(tmp_path, "fedbuff", lora)


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "fp16", "int8"])
def test_every_encoding_reaches_the_rules(tmp_path: Path, encoding: Encoding) -> None:
    run(tmp_path, "fedbuff", "product", encoding)
