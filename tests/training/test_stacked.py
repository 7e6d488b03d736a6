"""Adapters as rows of one buffer: in and out again, to the bit."""

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.training.stacked import StackedAdapters
from alignfed.training.transfer import to_cpu

CPU = torch.device("cpu")


def made(seed: int, ranks: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float32) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn).to(dtype)

    lora = {
        name: LoraFactors(numbers(rank, 5), numbers(4, rank), alpha=8.0 + seed)
        for name, rank in zip(("first", "second"), ranks, strict=True)
    }
    return Adapter.pack(lora, {"head": numbers(2, 7)})


SAME = made(1)
COHORTS = {
    "one": [made(1)],
    "alike": [made(1), made(2), made(3)],
    "the same several times": [SAME, made(2), SAME, SAME],
    "ranks differ": [made(1), made(2, (1, 6)), made(3, (4, 2))],
    "one in bf16": [made(1), made(2, dtype=torch.bfloat16)],
}


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_what_goes_in_comes_out_and_shares_no_memory(cohort):
    stack = StackedAdapters(cohort, CPU)
    read = stack.read()
    assert [one.checksum for one in read] == [one.checksum for one in cohort]
    assert [one.layout for one in read] == [one.layout for one in cohort]
    before = [one.checksum for one in cohort]
    stack.values.zero_()
    stack.gradients.zero_()
    for buffer in read[0].buffers.values():
        buffer.zero_()
    assert [one.checksum for one in cohort] == before
    assert [one.checksum for one in read[1:]] == before[1:]


def test_rows_are_the_same_whoever_stands_beside_them():
    # Equal ranks travel whole, unequal ones factor by factor; a wider row has room for both.
    alike = StackedAdapters([made(1), made(2)], CPU)
    mixed = StackedAdapters([made(1), made(2), made(3, (2, 2))], CPU)
    assert torch.equal(alike.values, mixed.values[:2])
    for mine, theirs in zip(alike.leaves(2).tensors, mixed.leaves(2).tensors, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_a_gpu_gives_back_what_it_was_given(cohort):
    stack = StackedAdapters(cohort, torch.device("cuda"))
    assert [one.checksum for one in stack.read()] == [one.checksum for one in cohort]


def test_copies_of_rows_are_memory_of_their_own():
    rows = torch.arange(6.0).view(2, 3)
    copies = to_cpu(rows)
    rows.zero_()
    assert [copy.tolist() for copy in copies] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
