import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.errors import AlignFedError
from alignfed.report import RunFacts, UploadFact, jain_index, summarise, worst_tenth_mean


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_jain_lies_between_one_over_n_and_one(shares):
    assert 1 / len(shares) - 1e-9 <= jain_index(shares) <= 1 + 1e-9


def test_jain_of_equal_shares_is_one_and_of_a_single_user_is_one_over_n():
    assert jain_index([3, 3, 3]) == pytest.approx(1.0)
    assert jain_index([0, 0]) == 1.0
    assert jain_index([5, 0, 0, 0]) == 0.25


@pytest.mark.parametrize("shares", [[], [1, -1]])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(AlignFedError):
        jain_index(shares)


def test_the_worst_tenth_is_at_least_one_client():
    assert worst_tenth_mean([1.0, 4.0, 2.0]) == 4.0
    assert worst_tenth_mean([float(i) for i in range(20)]) == 18.5
    with pytest.raises(AlignFedError):
        worst_tenth_mean([])


def test_a_summary_counts_clients_that_never_took_part():
    facts = RunFacts(
        strategy="fedbuff",
        seed=1,
        client_ids=range(4),
        applied=[UploadFact(0, 0), UploadFact(0, 3), UploadFact(1, 1), UploadFact(1, 0)],
        rejections={"not_finite": 2},
        scorer="exact_match",
        base_loss=2.0,
        final_loss=1.0,
        base_score=0.1,
        final_score=0.9,
        client_losses={0: 1.0, 1: 3.0},
        virtual_time_s=10.0,
        synchronous_time_s=25.0,
        server_version=2,
        wall_time_s=1.0,
        extra={"checksum": "ab"},
    )
    summary = summarise(facts)
    assert summary["clients_participating"] == 2
    assert summary["participation_jain"] == 0.5
    assert summary["staleness_mean"] == 1.0
    assert summary["staleness_max"] == 3
    assert summary["speedup_over_synchronous"] == 2.5
    assert summary["rejected"] == 2
    assert summary["client_loss_worst10"] == 3.0
    assert summary["checksum"] == "ab"
