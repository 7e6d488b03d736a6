"""What travels between server and clients, and what the coordinator makes of it."""

from dataclasses import replace

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import ClientJoined, RunStarted, UpdateArrived
from alignfed.core.instructions import Dispatch, Publish, Reject, RejectReason
from alignfed.core.lora import LORA_RULES, exchange_of, make_lora_rule
from alignfed.core.lora.exchange import frozen_mask
from alignfed.core.state import CoordinatorSettings
from alignfed.core.update import Update
from alignfed.errors import RuleError
from tests.core.adapters import make_adapter, moved
from tests.core.test_algebra import assert_same_products, products

torch.set_num_threads(1)

MIXED = [name for name, row in LORA_RULES.items() if row.mixed_ranks]


def square(seed: int, size: int = 4) -> Adapter:
    """Return an adapter in which A, B and their rank all have the same shape."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, size, generator=draw) for _ in range(2))
    return Adapter.pack({"q": LoraFactors(a, b, 2.0 * size)})


def begun(adapter: Adapter) -> Adapter:
    """Return an adapter as PEFT begins it: B zero."""
    return Adapter.pack(
        {name: replace(one, b=torch.zeros_like(one.b)) for name, one in adapter.lora.items()},
        adapter.dense,
    )


@pytest.mark.parametrize(("name", "part"), [("ffa", "b"), ("fedsa", "a")])
def test_a_single_factor_travels_by_name_even_where_every_shape_is_equal(name, part):
    exchange, sent, trained = exchange_of(name), square(1), square(2)
    upload = exchange.upload(trained)
    assert upload.layout == exchange.upload_layout(sent.layout)
    assert upload.size_bytes * 2 == sent.size_bytes
    whole = exchange.complete(upload, sent).lora["q"]
    other = "a" if part == "b" else "b"
    assert torch.equal(getattr(whole, part), getattr(trained.lora["q"], part))
    assert torch.equal(getattr(whole, other), getattr(sent.lora["q"], other))


def test_a_frozen_a_is_downloaded_once_and_a_kept_b_never():
    layout = square(1).layout
    ffa, fedsa = exchange_of("ffa"), exchange_of("fedsa")
    assert ffa.transfer_bytes(layout, 0)[0] == layout.size_bytes
    assert ffa.transfer_bytes(layout, 1)[0] * 2 == layout.size_bytes
    assert fedsa.transfer_bytes(layout, 0)[0] * 2 == layout.size_bytes


def test_a_client_goes_on_with_the_b_it_kept_and_the_a_it_is_sent():
    exchange, trained, sent = exchange_of("fedsa"), make_adapter(1), make_adapter(2)
    joined = exchange.rejoin(sent, exchange.kept(trained))
    for name, factors in joined.lora.items():
        assert torch.equal(factors.b, trained.lora[name].b)
        assert torch.equal(factors.a, sent.lora[name].a)
    assert torch.equal(joined.dense["score.weight"], sent.dense["score.weight"])
    assert exchange_of("ffa").kept(trained) is None


@pytest.mark.parametrize("name", MIXED)
def test_every_rank_is_sent_the_same_alpha_over_rank_and_directions_that_can_learn(name):
    exchange = exchange_of(name).with_ranks({0: 1, 1: 2, 2: 3})
    for server in (begun(make_adapter(1, rank=4)), make_adapter(1, rank=4)):
        for client_id, rank in exchange.ranks.items():
            sent = exchange.sent(server, client_id)
            for module, factors in sent.lora.items():
                assert factors.rank - factors.frozen == rank
                assert factors.scale == pytest.approx(server.lora[module].scale)
                alive = factors.a[:rank].norm(dim=1) + factors.b[:, :rank].norm(dim=0)
                assert bool((alive > 0.1).all())


def test_flora_sends_every_client_the_whole_model_whatever_it_trains():
    server = make_adapter(1, rank=4)
    sent = exchange_of("flora").with_ranks({0: 1}).sent(server, 0)
    assert_same_products(sent, products(server))


def test_flexlora_sends_the_nearest_product_of_the_rank():
    server = make_adapter(1, rank=4)
    sent = exchange_of("flexlora").with_ranks({0: 2}).sent(server, 0)
    for name, product in products(server).items():
        if name not in sent.lora:
            continue
        lost = torch.linalg.matrix_norm(product - products(sent)[name])
        assert float(lost) == pytest.approx(
            float(torch.linalg.svdvals(product)[2:].norm()), rel=1e-4
        )


def test_rules_of_one_rank_refuse_others():
    with pytest.raises(RuleError, match="one rank"):
        exchange_of("factor").with_ranks({0: 2})
    with pytest.raises(RuleError, match="rank 0 of client 3"):
        exchange_of("hetlora").with_ranks({3: 0})


def test_a_mask_covers_frozen_directions_and_frozen_factors():
    factors = make_adapter(1, rank=3).lora["layers.0.q_proj"]
    adapter = Adapter.pack({"q": replace(factors, frozen=2)}, {"w": torch.ones(2)})
    mask = frozen_mask(adapter, "b")
    assert mask.layout == adapter.layout
    assert bool((mask.lora["q"].a == 1).all())
    assert mask.lora["q"].b.sum(0).tolist() == [0.0, 5.0, 5.0]
    assert not bool(mask.dense["w"].any())


def _started(name: str, ranks: dict[int, int]):
    exchange = exchange_of(name)
    coordinator = Coordinator(
        CoordinatorSettings(4, 2),
        make_rule("fedbuff"),
        make_lora_rule(name),
        exchange=exchange.with_ranks(ranks) if ranks else exchange,
    )
    state = coordinator.initial_state(begun(make_adapter(1, rank=4, alpha=8.0)))
    out = []
    for event in (ClientJoined(0.0, 0), ClientJoined(0.0, 1), RunStarted(0.0)):
        state, more = coordinator.handle(state, event)
        out += more
    return coordinator, state, [one for one in out if isinstance(one, Dispatch)]


def _answer(coordinator, given: Dispatch, adapter: Adapter) -> UpdateArrived:
    task = given.task
    update = Update(task.task_id, task.client_id, task.base_version, adapter, 8)
    return UpdateArrived(1.0, update)


@pytest.mark.parametrize("name", MIXED)
def test_clients_are_sent_their_rank_and_held_to_it(name):
    coordinator, state, given = _started(name, {0: 2})
    assert [d.adapter.layout.lora[0][1].rank for d in given] == [2, 4]
    honest = [coordinator.exchange.upload(moved(d.adapter, 3 + i)) for i, d in enumerate(given)]
    state, out = coordinator.handle(state, _answer(coordinator, given[0], honest[1]))
    (refusal,) = [one for one in out if isinstance(one, Reject)]
    assert refusal.reason is RejectReason.WRONG_SHAPE
    assert "rank=4" in refusal.detail and "rank=2" in refusal.detail


@pytest.mark.parametrize("name", LORA_RULES)
def test_uploads_become_versions_whatever_travels(name):
    coordinator, state, given = _started(name, {0: 2} if name in MIXED else {})
    seen = []
    for turn in range(6):
        task = given.pop(0)
        adapter = coordinator.exchange.upload(moved(task.adapter, 10 + turn))
        state, out = coordinator.handle(state, _answer(coordinator, task, adapter))
        assert not [one for one in out if isinstance(one, Reject)]
        given += [one for one in out if isinstance(one, Dispatch)]
        seen += [one.adapter.checksum for one in out if isinstance(one, Publish)]
    assert len(seen) == len(set(seen)) == 3
    assert state.adapter.is_finite()


def test_a_stays_bit_for_bit_under_ffa_lora():
    coordinator, state, given = _started("ffa", {})
    first = state.adapter
    for turn in range(8):
        task = given.pop(0)
        adapter = coordinator.exchange.upload(moved(task.adapter, 10 + turn))
        state, out = coordinator.handle(state, _answer(coordinator, task, adapter))
        given += [one for one in out if isinstance(one, Dispatch)]
    for name, factors in state.adapter.lora.items():
        assert torch.equal(factors.a, first.lora[name].a)
        assert not torch.equal(factors.b, first.lora[name].b)
