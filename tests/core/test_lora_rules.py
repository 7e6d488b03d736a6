"""Claims about the LoRA rules; what all of them owe to every timing rule is in tests/contract."""

import pytest
import torch

from alignfed.core.adapter import Adapter, linear_combination
from alignfed.core.algebra import innovation, product_norm, refactor, stack
from alignfed.core.lora import LORA_RULES, FactorMean, ProductSum, make_lora_rule, space_of
from alignfed.errors import AdapterError, RuleError
from tests.core.adapters import make_adapter, moved
from tests.core.test_algebra import assert_same_products, products, ranked, turned

torch.set_num_threads(1)


def test_the_factor_mean_adds_each_factor_by_itself():
    current, base = make_adapter(1), make_adapter(2)
    update = moved(base, 3)
    found = FactorMean().combine(current, [(0.25, update, base)])
    expected = linear_combination([(1.0, current), (0.25, update), (-0.25, base)])
    for dtype, buffer in found.buffers.items():
        torch.testing.assert_close(buffer, expected.buffers[dtype])


def test_many_small_bf16_updates_do_not_vanish_one_by_one():
    ones = Adapter.pack({}, {"w": torch.ones(4, dtype=torch.bfloat16)})
    more = Adapter.pack({}, {"w": torch.full((4,), 1.0625, dtype=torch.bfloat16)})
    # A bf16 sum of equal terms stands still after 256 of them.
    found = FactorMean().combine(ones, [(1 / 1024, more, ones)] * 1024)
    assert found.checksum == more.checksum


def test_the_factor_mean_refuses_unequal_ranks():
    with pytest.raises(AdapterError, match="q_proj"):
        FactorMean().combine(ranked(1, 2), [(1.0, ranked(2, 3), ranked(3, 3))])


def test_the_product_sum_is_the_exact_sum_where_the_rank_has_room():
    current = ranked(1, 5)
    base, update = ranked(2, 1), ranked(3, 1)
    current = refactor(ranked(4, 1), current)
    found = ProductSum().combine(current, [(0.5, update, base)])
    now, new, old = products(current), products(update), products(base)
    assert_same_products(found, {name: now[name] + 0.5 * (new[name] - old[name]) for name in now})


def test_clients_of_mixed_ranks_add_up_exactly():
    current = refactor(ranked(1, 1), ranked(0, 6))
    terms = [(0.5, ranked(2, 1), ranked(3, 1)), (0.25, ranked(4, 2), ranked(3, 1))]
    found = ProductSum().combine(current, terms)
    expected = dict(products(current))
    for coefficient, update, base in terms:
        for name, product in products(innovation(update, base)).items():
            expected[name] = expected[name] + coefficient * product
    nearest = {name: torch.linalg.svdvals(expected[name])[6:] for name in current.lora}
    assert all(float(left.abs().max()) < 1e-4 for left in nearest.values() if left.numel())
    assert_same_products(found, expected)


def test_the_product_sum_is_the_nearest_product_of_the_current_rank():
    current = ranked(1, 2)
    terms = [(0.5, ranked(2, 2), ranked(3, 2)), (0.5, ranked(4, 2), ranked(3, 2))]
    exact = stack([(1.0, current), *((c, innovation(u, b)) for c, u, b in terms)])
    assert_same_products(ProductSum().combine(current, terms), products(refactor(exact, 2)))


def test_the_product_sum_does_not_depend_on_how_anything_is_factored():
    current, base = ranked(1, 2), ranked(2, 2)
    update = moved(base, 3)
    plain = ProductSum().combine(current, [(0.7, update, base)])
    again = ProductSum().combine(turned(current, 4), [(0.7, turned(update, 5), turned(base, 6))])
    assert_same_products(again, products(plain))


def test_a_stale_base_costs_factor_replay_cross_terms_and_the_product_sum_none():
    base = ranked(1, 2)
    current, update = moved(base, 2, scale=0.5), moved(base, 3, scale=0.1)
    exact = innovation(update, base)
    errors = {}
    for rule in (FactorMean(), ProductSum()):
        # A current adapter with room for the innovation, so that truncation plays no part.
        room = current if rule.name == "factor" else refactor(current, 6)
        step = innovation(rule.combine(room, [(1.0, update, base)]), room)
        errors[rule.name] = product_norm(stack([(1.0, step), (-1.0, exact)]))
    assert errors["product"] < 1e-3 * product_norm(exact)
    assert errors["factor"] > 0.3 * product_norm(exact)


@pytest.mark.parametrize("name", LORA_RULES)
def test_no_innovation_leaves_the_same_bytes(name):
    current, base = make_adapter(1), make_adapter(2)
    found = make_lora_rule(name).combine(current, [(0.3, base, base), (0.6, current, current)])
    assert found.checksum == current.checksum


def test_whole_weight_on_one_fresh_update_gives_its_very_bytes_in_product_space():
    current = make_adapter(1)
    update = moved(current, 2)
    assert ProductSum().combine(current, [(1.0, update, current)]).checksum == update.checksum


def test_equal_copies_of_a_base_add_up_to_the_same_bytes_as_one_shared_object():
    current, base = make_adapter(1), make_adapter(2)
    updates = [moved(base, seed) for seed in (3, 4)]
    shared = ProductSum().combine(current, [(0.3, u, base) for u in updates])
    copied = ProductSum().combine(current, [(0.3, u, make_adapter(2)) for u in updates])
    assert shared.checksum == copied.checksum


def test_the_table_knows_each_rule_by_its_name_and_refuses_others():
    for name, entry in LORA_RULES.items():
        rule = make_lora_rule(name)
        assert rule.name == name
        assert space_of(rule) == entry.space
    with pytest.raises(RuleError, match="'fedit'; choose one of factor, product"):
        make_lora_rule("fedit")
