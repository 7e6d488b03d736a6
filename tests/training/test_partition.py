import warnings
from collections import Counter

import pytest
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.errors import DataError
from alignfed.training.dealing import dirichlet_shares, equal_shares
from alignfed.training.partition import PartitionSettings, partition

COLOURS = [("red", "green", "blue", "grey")[i % 4] for i in range(200)]


def rows_of(shares):
    return sorted(row for share in shares for row in share.rows)


def test_iid_deals_every_row_once_in_equal_shares():
    shares = partition(203, None, PartitionSettings("iid", num_clients=8, seed=5))
    assert rows_of(shares) == list(range(203))
    assert {len(share.rows) for share in shares} == {25, 26}


def test_iid_shuffles():
    (first, *_) = partition(200, None, PartitionSettings("iid", num_clients=4))
    assert first.rows != tuple(range(50))


def test_dirichlet_deals_every_row_once_and_a_smaller_alpha_less_evenly():
    def purity(alpha):
        settings = PartitionSettings("dirichlet", 5, alpha=alpha, column="c", min_size=1, seed=1)
        shares = partition(200, COLOURS, settings)
        assert rows_of(shares) == list(range(200))
        return sum(
            Counter(COLOURS[row] for row in share.rows).most_common(1)[0][1] for share in shares
        )

    assert purity(0.1) > purity(100.0) + 40


def dealt_by_the_library(partitioner, values):
    partitioner.dataset = Dataset.from_dict({"row": range(len(values)), "value": values})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        count = partitioner.num_partitions
        return [list(partitioner.load_partition(client)["row"]) for client in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.data())
def test_equal_shares_are_the_librarys(clients, data):
    rows = data.draw(st.integers(clients, 300))
    expected = dealt_by_the_library(IidPartitioner(clients), [0] * rows)
    assert equal_shares(rows, clients) == expected


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 9), min_size=30, max_size=200),
    words=st.booleans(),
    clients=st.integers(1, 30),
    alpha=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    min_size=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_dirichlet_shares_are_the_librarys_draw_for_draw(
    values, words, clients, alpha, min_size, seed
):
    column = [f"skill {value}" for value in values] if words else values
    library = DirichletPartitioner(
        clients, "value", alpha, min_size, self_balancing=False, shuffle=True, seed=seed
    )
    try:
        expected = dealt_by_the_library(library, column)
    except ValueError:  # it gave up
        expected = None
    assert dirichlet_shares(column, clients, alpha, min_size, seed) == expected


def test_natural_makes_one_client_a_value():
    shares = partition(200, COLOURS, PartitionSettings("natural", column="c"))
    assert [share.name for share in shares] == ["blue", "green", "grey", "red"]
    for share in shares:
        assert {COLOURS[row] for row in share.rows} == {share.name}


def test_natural_keeps_the_largest_clients_and_leaves_small_ones_out():
    values = ["a"] * 5 + ["b"] * 1 + ["c"] * 9 + ["d"] * 7
    every = partition(22, values, PartitionSettings("natural", column="c", min_size=2))
    assert [share.name for share in every] == ["a", "c", "d"]
    two = partition(22, values, PartitionSettings("natural", 2, column="c", min_size=2))
    assert [share.name for share in two] == ["c", "d"]


def test_shard_gives_each_client_few_values():
    settings = PartitionSettings("shard", 10, column="c", shards_per_client=2, seed=2)
    shares = partition(200, COLOURS, settings)
    assert rows_of(shares) == list(range(200))
    assert all(len({COLOURS[row] for row in share.rows}) <= 2 for share in shares)


def test_clients_that_dirichlet_shares_leave_short_are_topped_up_and_stay_uneven():
    # Sixty clients and four colours at alpha 0.01: some draw nothing of any, however often.
    settings = PartitionSettings("dirichlet", 60, alpha=0.01, column="c", min_size=3)
    shares = partition(200, COLOURS, settings)
    assert rows_of(shares) == list(range(200))
    assert min(len(share.rows) for share in shares) == 3
    topped_up = [share for share in shares if len(share.rows) == 3]
    assert sum(len({COLOURS[row] for row in share.rows}) <= 2 for share in topped_up) > 40


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shard"])
def test_the_seed_alone_decides_the_deal(kind):
    def deal(seed):
        settings = PartitionSettings(kind, 5, column="c", alpha=0.5, seed=seed)
        return partition(200, COLOURS, settings)

    assert deal(3) == deal(3)
    assert deal(3) != deal(4)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "iid"},
        {"kind": "random", "num_clients": 2},
        {"kind": "iid", "num_clients": 0},
        {"kind": "dirichlet", "num_clients": 2},
        {"kind": "dirichlet", "num_clients": 2, "column": "c", "alpha": 0.0},
        {"kind": "shard", "num_clients": 2, "column": "c", "shards_per_client": 0},
        {"kind": "iid", "num_clients": 2, "seed": -1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DataError):
        PartitionSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        PartitionSettings("iid", 101),
        PartitionSettings("dirichlet", 70, alpha=0.01, column="c", min_size=3),
        PartitionSettings("natural", 5, column="c"),
        PartitionSettings("natural", column="c", min_size=51),
        PartitionSettings("shard", 90, column="c", shards_per_client=3),
    ],
    ids=lambda settings: settings.kind,
)
def test_too_few_rows_for_the_clients_asked_for_are_refused(settings):
    with pytest.raises(DataError):
        partition(200, COLOURS, settings)
