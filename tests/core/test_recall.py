"""AlignFed's memory of absent clients."""

import pytest
import torch

from alignfed.core.adapter import Adapter, difference, linear_combination
from alignfed.core.aggregation.recall import Recall, absent_mean, remember
from tests.core.adapters import make_adapter, moved

torch.set_num_threads(1)

BASE = make_adapter(1)


def delta(seed: int) -> Adapter:
    return difference(moved(BASE, seed), BASE)


def filled(*clients: int, capacity: int = 100, dtype: torch.dtype = torch.float32) -> Recall:
    recall = Recall()
    for client_id in clients:
        recall = remember(recall, {client_id: delta(client_id)}, capacity, dtype)
    return recall


def assert_near(found: Adapter | None, *terms: tuple[float, int], tolerance: float = 1e-5) -> None:
    assert found is not None
    expected = linear_combination([(c, delta(seed)) for c, seed in terms])
    for dtype, buffer in expected.buffers.items():
        assert float((found.buffers[dtype] - buffer).abs().max()) < tolerance


def test_the_mean_is_over_all_clients_and_leaves_out_who_is_present():
    recall = filled(1, 2, 3)
    assert_near(absent_mean(recall, {2}, 10, BASE), (0.1, 1), (0.1, 3))
    assert_near(absent_mean(recall, set(), 4, BASE), (0.25, 1), (0.25, 2), (0.25, 3))
    assert absent_mean(recall, {1, 2, 3}, 10, BASE) is None
    assert absent_mean(Recall(), set(), 10, BASE) is None


def test_a_clients_new_update_takes_the_place_of_its_old_one():
    recall = remember(filled(1, 2), {1: delta(9)}, 100, torch.float32)
    assert_near(absent_mean(recall, set(), 1, BASE), (1.0, 9), (1.0, 2))


def test_beyond_its_capacity_it_forgets_who_reported_longest_ago():
    recall = filled(1, 2, 3, 1, 4, capacity=3)
    assert list(recall.latest) == [3, 1, 4]
    assert_near(absent_mean(recall, set(), 1, BASE), (1.0, 3), (1.0, 1), (1.0, 4))


def test_it_does_not_change_what_it_was_given():
    recall = filled(1, 2)
    before = absent_mean(recall, set(), 1, BASE)
    remember(recall, {1: delta(9)}, 1, torch.float32)
    after = absent_mean(recall, set(), 1, BASE)
    assert before is not None and after is not None
    assert before.checksum == after.checksum


def test_half_the_bytes_cost_a_hundredth_of_the_length():
    full, half = filled(1, 2), filled(1, 2, dtype=torch.bfloat16)
    assert half.size_bytes == full.size_bytes * 2 // 3  # the sum stays in fp32
    found = absent_mean(half, set(), 1, BASE)
    exact = absent_mean(full, set(), 1, BASE)
    assert found is not None and exact is not None
    gap = sum(float((found.buffers[d] - exact.buffers[d]).norm()) for d in exact.buffers)
    assert gap < 0.01 * sum(float(buffer.norm()) for buffer in exact.buffers.values())


def test_what_was_rounded_is_taken_back_to_the_digit():
    recall = filled(1, dtype=torch.bfloat16)
    for client_id in range(2, 30):
        recall = remember(recall, {client_id: delta(client_id)}, 2, torch.bfloat16)
    left = sum(part.float() for part in (recall.latest[28][0], recall.latest[29][0]))
    assert float((recall.total[0] - left).abs().max()) == pytest.approx(0.0, abs=1e-5)


def test_another_layout_is_forgotten():
    recall = filled(1, 2)
    other = make_adapter(1, rank=3)
    assert absent_mean(recall, set(), 4, other) is None
