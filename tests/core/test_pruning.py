"""Pruning by activations: what is zeroed, what is spared, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.pruning import prune_by_activations, prune_by_gradients, scores
from alignfed.errors import AdapterError
from tests.core.adapters import make_adapter


def inputs(adapter, seed, positions=20):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(positions, factors.a.shape[1], generator=generator)
        for name, factors in adapter.lora.items()
    }


def power(seen):
    return seen.square().mean(dim=0)


def lost(pruned, adapter, name, part):
    new, old = getattr(pruned.adapter.lora[name], part), getattr(adapter.lora[name], part)
    assert torch.equal(new[new != 0], old[new != 0])
    return (new == 0) & (old != 0)


def test_a_score_is_the_weight_times_the_root_mean_square_of_its_input():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    seen = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    expected = torch.tensor([[12.5**0.5, 8**0.5], [0.5 * 12.5**0.5, 0.0]])
    assert torch.allclose(scores(weight, power(seen)), expected)


def test_each_row_loses_its_highest_scores_and_nothing_else_changes():
    adapter = make_adapter(rank=3)
    harmful = inputs(adapter, 1)
    pruned = prune_by_activations(adapter, harmful, fraction=0.34)
    assert pruned.adapter.layout == adapter.layout
    for name, factors in adapter.lora.items():
        seen = {"a": harmful[name], "b": harmful[name] @ factors.a.T}
        for part, weight in (("a", factors.a), ("b", factors.b)):
            gone = lost(pruned, adapter, name, part)
            count = round(0.34 * weight.shape[1])
            assert gone.sum(dim=1).tolist() == [count] * weight.shape[0]
            for row, mask in zip(scores(weight, power(seen[part])), gone, strict=True):
                assert row[mask].min() >= row[~mask].max()
    total = sum(
        int(lost(pruned, adapter, name, part).sum()) for name in adapter.lora for part in "ab"
    )
    assert pruned.zeroed == total
    assert torch.equal(pruned.adapter.dense["score.weight"], adapter.dense["score.weight"])


def test_what_useful_inputs_need_most_is_left_alone():
    adapter = make_adapter(rank=3)
    harmful, useful = inputs(adapter, 1), inputs(adapter, 2)
    pruned = prune_by_activations(adapter, harmful, useful, fraction=0.34, protected=0.34)
    for name, factors in adapter.lora.items():
        gone = lost(pruned, adapter, name, "a")
        needed = scores(factors.a, power(useful[name]))
        count = round(0.34 * factors.a.shape[1])
        for row, mask in zip(needed, gone, strict=True):
            assert not mask[row.topk(count).indices].any()
        assert gone.sum(dim=1).tolist() == [count] * 3


def test_an_input_that_useful_examples_excite_as_much_is_the_last_to_go():
    adapter = make_adapter(rank=3)
    useful = inputs(adapter, 1)
    harmful = {name: seen.clone() for name, seen in useful.items()}
    for seen in harmful.values():
        seen[:, 2] *= 10.0
    pruned = prune_by_activations(adapter, harmful, useful, fraction=0.1)
    for name in adapter.lora:
        gone = lost(pruned, adapter, name, "a")
        assert gone[:, 2].all() and gone.sum() == 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), less=st.floats(0.05, 0.4), more=st.floats(0.41, 0.9))
def test_a_larger_share_zeroes_all_that_a_smaller_one_does(seed, less, more):
    adapter = make_adapter(seed)
    harmful = inputs(adapter, seed + 1)
    few = prune_by_activations(adapter, harmful, fraction=less).adapter
    many = prune_by_activations(adapter, harmful, fraction=more).adapter
    for name in adapter.lora:
        assert not ((few.lora[name].a == 0) & (many.lora[name].a != 0)).any()


def test_pruning_again_with_nothing_protected_changes_only_what_is_left():
    adapter = make_adapter()
    harmful = inputs(adapter, 1)
    assert (
        prune_by_activations(adapter, harmful, fraction=0.3).adapter.checksum
        == prune_by_activations(adapter, harmful, fraction=0.3).adapter.checksum
        != adapter.checksum
    )


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    adapter = make_adapter()
    with pytest.raises(AdapterError, match="fraction is"):
        prune_by_activations(adapter, inputs(adapter, 1), fraction=share)
    if share != 0.0:
        with pytest.raises(AdapterError, match="protected is"):
            prune_by_activations(adapter, inputs(adapter, 1), fraction=0.1, protected=share)


def test_inputs_that_do_not_fit_are_refused_by_the_module_s_name():
    adapter = make_adapter()
    wrong = inputs(adapter, 1)
    wrong["layers.0.q_proj"] = torch.ones(4, 7)
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj.*expected \(positions, 6\)"):
        prune_by_activations(adapter, wrong, fraction=0.1)
    with pytest.raises(AdapterError, match="missing"):
        prune_by_activations(adapter, {}, fraction=0.1)


def test_by_gradients_the_weights_whose_absence_raises_the_harmful_loss_most_go():
    adapter, harmful, useful = make_adapter(), make_adapter(1), make_adapter(2, scale=0.1)
    size = sum(f.a.numel() + f.b.numel() for f in adapter.lora.values())
    pruned = prune_by_gradients(adapter, harmful, useful, fraction=5 / size)
    rises = torch.cat(
        [
            (-weight * bad - (weight * good).abs()).flatten()
            for name, factors in adapter.lora.items()
            for weight, bad, good in (
                (factors.a, harmful.lora[name].a, useful.lora[name].a),
                (factors.b, harmful.lora[name].b, useful.lora[name].b),
            )
        ]
    )
    gone = torch.cat(
        [lost(pruned, adapter, name, part).flatten() for name in adapter.lora for part in "ab"]
    )
    assert pruned.zeroed == gone.sum() == 5
    assert rises[gone].min() >= rises[~gone].max()
    assert torch.equal(pruned.adapter.dense["score.weight"], adapter.dense["score.weight"])


def test_by_gradients_no_weight_goes_whose_absence_would_help_the_harm():
    adapter = make_adapter()
    pruned = prune_by_gradients(adapter, adapter, fraction=0.5)  # -W dL/dW = -W^2 everywhere
    assert pruned.zeroed == 0
    assert pruned.adapter.checksum == adapter.checksum


def test_gradients_of_another_layout_are_refused():
    with pytest.raises(AdapterError, match="do not fit"):
        prune_by_gradients(make_adapter(), make_adapter(rank=3), fraction=0.1)
    with pytest.raises(AdapterError, match="fraction is 0"):
        prune_by_gradients(make_adapter(), make_adapter(), fraction=0)
