import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.errors import DataError
from alignfed.training.batches import (
    Amount,
    ClientBatches,
    collate,
    length_batches,
    padded_length,
    plan_batches,
)
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from tests.training.samples import TEMPLATE, federated, sums

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40).map(np.array)


def rng(seed=0):
    return np.random.default_rng(seed)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 9))
def test_with_steps_every_batch_is_full_and_examples_take_turns(lengths, steps, size):
    plan = plan_batches(lengths, Amount(size, steps=steps), 64, rng())
    assert [len(rows) for rows in plan.steps] == [size] * steps
    counts = np.bincount(np.concatenate(plan.steps), minlength=len(lengths))
    assert counts.max() - counts.min() <= 1
    assert plan.num_examples == min(len(lengths), steps * size)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 9))
def test_with_epochs_every_example_is_seen_as_often_as_asked(lengths, epochs, size):
    plan = plan_batches(lengths, Amount(size, epochs=epochs), 64, rng())
    counts = np.bincount(np.concatenate(plan.steps), minlength=len(lengths))
    assert set(counts) == {epochs}


def test_part_of_an_epoch_is_at_least_one_step():
    lengths = np.full(40, 5)
    assert len(plan_batches(lengths, Amount(4, epochs=0.5), 64, rng()).steps) == 5
    assert len(plan_batches(lengths, Amount(4, epochs=0.001), 64, rng()).steps) == 1


@settings(deadline=None)
@given(LENGTHS, st.integers(60, 64))
def test_padding_reaches_the_longest_and_goes_to_the_next_multiple_of_eight(lengths, limit):
    padded = padded_length(int(lengths.max()), limit)
    assert lengths.max() <= padded <= limit
    assert padded % 8 == 0 or padded == limit
    assert padded - lengths.max() < 8


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 300))
def test_length_batches_hold_every_row_once_within_the_limit(lengths, limit):
    groups = length_batches(lengths, limit)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    for rows in groups:
        assert len(rows) == 1 or len(rows) * padded_length(int(lengths[rows].max()), 64) <= limit


@pytest.fixture
def encoder(base):
    return Encoder(base, TEMPLATE, 64)


def test_targets_are_the_tokens_after_their_positions_and_never_filler(base, encoder):
    sequences = encoder.encode(sums(0, 6))
    rows = [4, 0, 5]
    batch = collate(sequences, rows, pad_id=base.pad_id, length=16, classify=False)
    flat = batch.input_ids.reshape(-1)
    assert torch.equal(flat[batch.positions + 1], batch.targets)
    assert torch.equal(batch.positions // 16, batch.rows)
    assert batch.attention_mask.reshape(-1)[batch.positions + 1].all()
    for place, row in enumerate(rows):
        count = int(sequences.lengths[row])
        assert batch.input_ids[place, :count].tolist() == sequences[row].tolist()
        assert batch.input_ids[place, count:].eq(base.pad_id).all()
        assert int(batch.attention_mask[place].sum()) == count
        scored = int(sequences.lengths[row] - sequences.prompt_lengths[row])
        assert int((batch.rows == place).sum()) == scored


def make(encoder, clients, seed=0):
    return ClientBatches(encoder, clients, Amount(4, steps=3), seed)


def drawn(data, client_id, dispatch):
    return [rows.tolist() for rows in data.plan(client_id, dispatch).steps]


def test_batches_depend_on_seed_client_and_dispatch(encoder):
    clients = federated().clients
    data = make(encoder, clients)
    assert drawn(data, 1, 0) == drawn(make(encoder, clients), 1, 0)
    others = [drawn(data, 1, 1), drawn(data, 2, 0), drawn(make(encoder, clients, 1), 1, 0)]
    assert all(drawn(data, 1, 0) != other for other in others)


def test_a_client_more_shifts_nobody_else_s_batches(encoder):
    few, many = federated(clients=2).clients, federated(clients=5).clients
    for client_id in few:
        for dispatch in range(3):
            assert drawn(make(encoder, few), client_id, dispatch) == drawn(
                make(encoder, many), client_id, dispatch
            )


def test_order_of_asking_shifts_no_batches(encoder):
    clients = federated().clients
    first, second = make(encoder, clients), make(encoder, clients)
    drawn(second, 2, 7)
    drawn(second, 0, 3)
    assert drawn(first, 1, 1) == drawn(second, 1, 1)


def test_planned_tokens_are_those_of_the_batches(encoder):
    data = make(encoder, federated().clients)
    plan = data.plan(0, 0)
    assert plan.tokens == sum(batch.num_tokens for batch in data.batches(0, plan))


def test_a_client_smaller_than_a_batch_comes_around_again(encoder):
    data = make(encoder, {0: ClientData("one", sums(0, 1), ())})
    assert drawn(data, 0, 0) == [[0, 0, 0, 0]] * 3


def test_an_unknown_client_is_refused(encoder):
    with pytest.raises(DataError, match="client 9 holds no data"):
        make(encoder, federated().clients).plan(9, 0)
