"""AlignFed's step by the paper's equations as reported (arXiv 2606.08197, Eq. 5 to 8), for study.

Its grouping drops each group's mean: a group of one becomes zero, equally weighted members cancel,
and the server hardly moves. That is kept here as it is. No reproduction of published results is
claimed.
"""

from __future__ import annotations

import math

from alignfed.core.adapter import linear_combination
from alignfed.core.aggregation.held import Pair
from alignfed.core.aggregation.sizes import combining_bytes, comparing_bytes
from alignfed.core.aggregation.transport import require_calibrator
from alignfed.core.agreement import factor_gram, lengths
from alignfed.core.algebra import innovation, product_gram
from alignfed.core.alignment import apply_block_scales, fit_block_scales
from alignfed.core.fairness import reported_weight, shares
from alignfed.core.grouping import drop_means, group_by_version
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import Flush, Step


def step(
    flush: Flush,
    pairs: list[Pair],
    *,
    space: str,
    grouping: bool,
    alignment: bool,
    fairness: bool,
    decay: float,
    ridge: float,
    server_step: float,
) -> Step:
    """Return ``theta + sum_i w_i T(delta_i - group mean)``.

    T is linear and one for a group, so the mean is taken out of the coefficients instead of the
    vectors, and T fitted on the group's mean update. ``pairs`` are the updates and their bases.

    Raises:
        RuleError: a stale group is to be aligned and the flush has no calibrator.
    """
    versions = [entry.base_version for entry in flush.updates]
    weights = (1.0 / len(pairs),) * len(pairs)
    if fairness:
        gram = (
            factor_gram([update for update, _ in pairs], [base for _, base in pairs])
            if space == "factor"
            else product_gram([innovation(*pair) for pair in pairs])
        )
        weights = shares(
            [
                reported_weight(entry.staleness, norm, entry.uploads, decay)
                for entry, norm in zip(flush.updates, lengths(gram), strict=True)
            ]
        )
    notes: dict[str, float] = {}
    forwards = 0
    if alignment:
        pairs, notes, forwards = _transformed(flush, pairs, ridge)
    coefficients = drop_means(weights, versions) if grouping else weights
    coefficients = tuple(server_step * coefficient for coefficient in coefficients)
    terms = [(c, update, base) for c, (update, base) in zip(coefficients, pairs, strict=True)]
    adapter = flush.lora.combine(flush.adapter, terms)
    tokens = flush.calibrator.tokens * forwards if flush.calibrator is not None else 0
    work = ServerWork(comparing_bytes(flush) + combining_bytes(flush), tokens)
    return Step(adapter, coefficients, notes, work)


def _transformed(
    flush: Flush, pairs: list[Pair], ridge: float
) -> tuple[list[Pair], dict[str, float], int]:
    groups = group_by_version([entry.base_version for entry in flush.updates])
    stale = [positions for version, positions in groups.items() if version != flush.version]
    if not stale:
        return pairs, {}, 0
    calibrator = require_calibrator(flush)
    features_now = calibrator.features(flush.adapter)
    forwards = 1
    without = aligned = 0.0
    moved = list(pairs)
    for positions in stale:
        base = pairs[positions[0]][1]
        share = 1.0 / len(positions)
        terms = [term for p in positions for term in ((share, pairs[p][0]), (-share, base))]
        features_base = calibrator.features(base)
        fit = fit_block_scales(
            linear_combination(terms), base, features_base, features_now, calibrator, ridge
        )
        forwards += 1 + fit.forwards
        without, aligned = without + fit.without, aligned + fit.aligned
        for position in positions:
            moved[position] = (apply_block_scales(fit, pairs[position][0], base), base)
    notes = {"alignment_gain": 1.0 - math.sqrt(aligned / without)} if without > 0 else {}
    return moved, notes, forwards
