"""Every rule drives quadratic clients under staleness to near the optimum they share.

Losses are above the least possible; the start is at 46.7. Thresholds leave a factor of two or more
to what was seen with seed 0, the one that is run.
"""

import dataclasses
import math

import pytest
import torch

from alignfed.core.adapter import Adapter, difference, linear_combination
from alignfed.core.aggregation import RULES as TABLE
from alignfed.core.aggregation import make_rule
from alignfed.core.lora import incompatibility, make_lora_rule
from alignfed.study.poisoning import ATTACKS
from tests.convergence.fleet import make_problem, run, start

torch.set_num_threads(1)

# The clients here know whole adapters of one rank; rules that send or train less have whole runs.
every_lora = pytest.mark.parametrize("lora", ["factor", "product"])
RULES = [
    ("fedavg", {}, 25, 12),
    ("fedasync", {}, 300, 1),
    ("fedasync", {"discount": "constant", "mixing": 0.3}, 300, 1),
    ("fedasync", {"discount": "hinge"}, 300, 1),
    ("fedbuff", {}, 150, 3),
    ("alignfed", {}, 100, 3),
    ("fedprox", {}, 25, 12),
    ("fedasync", {}, 100, 3),
    ("ca2fl", {"server_step": 0.3}, 150, 3),
    ("ace", {"server_step": 0.1}, 150, 3),
    ("port", {"server_step": 0.3}, 150, 3),
    ("fedcompass", {"server_step": 2.0}, 150, 3),
    ("fedadam", {"server_step": 0.005}, 500, 3),
    ("fedyogi", {"server_step": 0.01}, 300, 3),
    ("fadas", {"server_step": 0.1}, 300, 3),
    ("delayed_nesterov", {"server_step": 0.05}, 250, 3),
]
EVERY = [
    (*row, lora)
    for row in RULES
    for lora in ("factor", "product")
    if incompatibility(make_rule(row[0]), lora) is None
]
every_rule = pytest.mark.parametrize(("name", "settings", "flushes", "buffer_size", "lora"), EVERY)


def last(losses: list[float]) -> float:
    return sum(losses[-5:]) / 5


def test_every_rule_is_among_them():
    assert {row[0] for row in RULES} == set(TABLE)


@pytest.mark.parametrize(
    ("name", "settings", "flushes", "buffer_size", "lora", "calibrated"),
    # Only alignfed looks at the calibration set.
    [(*row, calibrated) for row in EVERY for calibrated in {False, row[0] == "alignfed"}],
)
def test_clients_that_agree_bring_every_rule_to_their_optimum(
    name, settings, flushes, buffer_size, lora, calibrated
):
    losses, staleness = run(
        make_rule(name, **settings),
        make_lora_rule(lora),
        make_problem(disagreement=0.0),
        buffer_size=buffer_size,
        flushes=flushes,
        calibrated=calibrated,
    )
    assert last(losses) < 0.005 * losses[0]
    # Staleness is (in flight - 1) / buffer on average once the fleet runs.
    if not TABLE[name].synchronous:
        assert sum(staleness) / len(staleness) > 3.0


@every_rule
def test_clients_that_disagree_bring_every_rule_near_their_common_optimum(
    name, settings, flushes, buffer_size, lora
):
    losses, _ = run(
        make_rule(name, **settings),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=buffer_size,
        flushes=flushes,
    )
    assert last(losses) < 0.05 * losses[0]


@every_lora
def test_the_default_comes_to_rest_at_the_common_optimum(lora):
    losses, _ = run(
        make_rule("alignfed"),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=3,
        flushes=100,
        calibrated=True,
    )
    assert last(losses) < 0.001 * losses[0]


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *[(name, lora) for name in ("alignfed", "fedbuff") for lora in ("flexlora", "hetlora")],
        ("fedbuff", "fedrot"),
    ],
)
def test_lora_rules_that_send_whole_adapters_come_near_the_optimum(name, lora):
    losses, _ = run(
        make_rule(name),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=3,
        flushes=100,
    )
    assert last(losses) < 0.02 * losses[0]


@pytest.mark.parametrize("name", ["alignfed", "fedbuff"])
def test_with_a_frozen_the_best_b_is_found(name):
    problem = make_problem(disagreement=0.3)
    losses, _ = run(
        make_rule(name),
        make_lora_rule("ffa"),
        problem,
        buffer_size=3,
        flushes=100,
        trains_a=False,
    )
    least = problem.least_with(start().lora["q"].a)
    assert last(losses) - least < 0.02 * (losses[0] - least)


@every_lora
@pytest.mark.parametrize("floor", [5.0, 50.0])
def test_the_default_comes_to_rest_where_most_of_the_loss_cannot_be_taken_away(lora, floor):
    # The guard's tolerance is a share of the whole loss: at a standstill its ceiling comes down.
    losses, _ = run(
        make_rule("alignfed"),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=3,
        flushes=250,
        calibrated=True,
        floor=floor,
    )
    assert last(losses) < 0.02 * floor


@every_lora
@pytest.mark.parametrize(("name", "step"), [("ca2fl", 0.3), ("ace", 0.1)])
def test_memory_of_absent_clients_takes_away_the_pull_of_the_fast_ones(name, step, lora):
    # Fast clients report four times as often; without memory the model settles nearer to them.
    problem = make_problem(disagreement=0.3)

    def end(rule) -> float:
        losses, _ = run(rule, make_lora_rule(lora), problem, buffer_size=3, flushes=150)
        return last(losses)

    without = min(
        end(make_rule("fedbuff", discount="constant", server_step=eta)) for eta in (0.1, 0.2, 0.3)
    )
    assert end(make_rule(name, server_step=step)) < 0.25 * without


@every_lora
@pytest.mark.parametrize("disagreement", [0.3, 1.0])
def test_the_guard_brings_alignfed_closer_than_any_staleness_discount(lora, disagreement):
    problem = make_problem(disagreement=disagreement)

    def end(name: str, calibrated: bool) -> float:
        losses, _ = run(
            make_rule(name),
            make_lora_rule(lora),
            problem,
            buffer_size=3,
            flushes=100,
            calibrated=calibrated,
        )
        return last(losses)

    assert end("alignfed", True) < 0.5 * min(end("alignfed", False), end("fedbuff", False))


@every_lora
@pytest.mark.parametrize("calibrated", [False, True])
def test_alignfed_stays_alive_where_steps_overshoot(lora, calibrated):
    # FedBuff ends in NaN here in factors, and above half of its start in products.
    losses, _ = run(
        make_rule("alignfed"),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=3,
        flushes=100,
        rate=0.05,
        calibrated=calibrated,
    )
    assert last(losses) < 0.02 * losses[0]
    if calibrated:
        rule = make_rule("alignfed")
        for flush in range(1, len(losses)):
            highest = max(losses[max(0, flush - rule.harm_window) : flush])
            assert losses[flush] <= highest * (1 + rule.harm_tolerance) + 1e-6


@every_lora
@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize(
    ("settings", "against_limit"),
    [
        ({"deviation_keep": 0.5, "freshness_decay": 0.125, "participation_exponent": 0.25}, 0.25),
        # Without these, the default: 0.28 here (docs/adr/0034).
        ({}, 0.3),
    ],
    ids=["weighed", "default"],
)
def test_one_attacker_of_twelve_leaves_alignfed_near_the_optimum(
    lora, attack, settings, against_limit
):
    attacker, pulls = 3, {True: [], False: []}
    draw = torch.Generator().manual_seed(0)

    def send(client, trained, base):
        if client != attacker:
            return trained
        honest = difference(trained, base)
        noise = {
            dtype: torch.randn(part.shape, generator=draw) for dtype, part in honest.buffers.items()
        }
        made = ATTACKS[attack].make(honest, Adapter(honest.layout, noise))
        return linear_combination([(1.0, base), (1.0, made)])

    def watch(buffer, step):
        for arrival, weight in zip(buffer, step.weights, strict=True):
            pulls[arrival.update.client_id == attacker].append(abs(weight) * arrival.norm)

    losses, _ = run(
        make_rule("alignfed", **settings),
        make_lora_rule(lora),
        make_problem(disagreement=0.3),
        buffer_size=3,
        flushes=60,
        calibrated=True,
        send=send,
        watch=watch,
    )
    assert last(losses) < 0.01 * losses[0]
    attackers, honest = (sum(pulls[mine]) / len(pulls[mine]) for mine in (True, False))
    # Whoever pushes against the others hardly moves the server. Noise says nothing against them,
    # and a long update is cut to twice the usual length: these move it at most a few times as far.
    against = attack in ("sign_flipped", "conflicting")
    assert attackers < (against_limit if against else 6.0) * honest


def test_rank_space_alignment_keeps_factor_replay_alive():
    problem = make_problem(disagreement=0.0)
    ends = {}
    for alignment in (True, False):
        losses, _ = run(
            make_rule("alignfed", alignment=alignment),
            make_lora_rule("factor"),
            problem,
            buffer_size=3,
            flushes=100,
            rate=0.05,
        )
        ends[alignment] = last(losses)
    assert ends[True] < 0.01
    assert not math.isfinite(ends[False]) or ends[False] > 46.0


@every_lora
def test_the_papers_centring_does_not_move_clients_that_agree(lora):
    # Equal clients of one version deviate from their mean by nothing.
    problem = make_problem(disagreement=0.0)
    for flushes, buffer_size in ((100, 1), (60, 3)):
        rule = make_rule("alignfed", variant="paper", alignment=False, fairness=False)
        losses, _ = run(
            rule, make_lora_rule(lora), problem, buffer_size=buffer_size, flushes=flushes
        )
        assert losses[-1] == pytest.approx(losses[0], rel=0.02)
        # Its other half works: the same weights without the centring reach the optimum.
        kept = dataclasses.replace(rule, grouping=False, server_step=0.1)
        moved, _ = run(
            kept, make_lora_rule(lora), problem, buffer_size=buffer_size, flushes=flushes
        )
        assert moved[-1] < 0.2 * moved[0]
