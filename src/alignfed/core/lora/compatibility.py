"""Which timing rule may meet which LoRA rule: one table of reasons, asked when a recipe is loaded.

What is not refused here is in the contract tests, pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignfed.core.ports import AggregationRule

WITHOUT_MEMORY = frozenset(
    {"alignfed", "fedasync", "fedavg", "fedbuff", "fedcompass", "fedprox", "port"}
)
"""Rules that hand clients' models and their bases on, and keep no vectors between flushes."""

KEEPS_VECTORS = (
    "keeps vectors between flushes, and they must mean the same thing in every version: factors of"
    ' one rank that only ever add up ("factor", "ffa", "fedsa")'
)

KEEPS_MOMENTS = frozenset({"delayed_nesterov", "fadas", "fedadam", "fedyogi"})
"""Rules with moments of the elements of A and B, or of their sum over all versions so far."""

NO_ELEMENTS = (
    "keeps moments of the elements of A and B; a sum of products has no such elements, and its rank"
    ' would grow with every version: choose "factor", "ffa" or "fedsa"'
)

LINEAR = frozenset({"factor", "ffa", "fedsa"})
"""LoRA rules whose sums are ``factor.FactorSum``: elements of one rank that only ever add up."""

_Check = Callable[[Any], str | None]


def incompatibility(rule: AggregationRule, lora: str) -> str | None:
    """Return why a timing rule, with its settings, cannot work with a LoRA rule; None: it can.

    Args:
        rule: the timing rule.
        lora: name of the LoRA rule.
    """
    if rule.name not in WITHOUT_MEMORY and lora not in LINEAR and lora != "product":
        return KEEPS_VECTORS
    if rule.name in KEEPS_MOMENTS and lora == "product":
        return NO_ELEMENTS
    check = _ALIGNFED.get(lora) if rule.name == "alignfed" else None
    return check(rule) if check is not None else None


def _fits_ffa(rule: Any) -> str | None:
    if _fits_inputs(rule):
        return (
            "the activation map moves A, and FFA-LoRA's is frozen; set alignment_map = "
            '"rank" or alignment = false'
        )
    return None


def _fits_fedsa(rule: Any) -> str | None:
    if rule.guard and rule.variant == "default":
        return (
            "the guard measures the server's model, whose B never arrives: no step would change"
            " its loss; set guard = false"
        )
    if rule.alignment and (rule.variant == "paper" or rule.alignment_map != "rank"):
        return "alignment by calibration data sees the server's B alone, which is not the clients'"
    if rule.agreement_space == "product":
        return 'no product exists on the server, for B never arrives; set agreement_space = "auto"'
    return None


def _fits_fedrot(rule: Any) -> str | None:
    if rule.alignment:
        return (
            "both turn stale updates to the current factors, and twice is wrong; set"
            " alignment = false"
        )
    return None


def _fits_folding(rule: Any) -> str | None:
    if rule.agreement_space == "factor":
        return 'factors of two versions have unequal ranks; set agreement_space = "auto"'
    if rule.alignment and (rule.variant == "paper" or rule.alignment_map != "rank"):
        return (
            "alignment by calibration data would bend the base update along with the factors; set"
            ' alignment_map = "rank" (variant = "paper": alignment = false)'
        )
    return None


def _fits_mixed(rule: Any) -> str | None:
    if rule.agreement_space == "factor":
        return 'factors of unequal ranks have no angles; set agreement_space = "auto"'
    if rule.alignment and rule.variant == "paper":
        return "block scales are fitted on one rank; set alignment = false"
    return None


def _fits_inputs(rule: Any) -> bool:
    return bool(
        rule.variant == "default"
        and rule.alignment
        and rule.alignment_map in ("activation", "both")
    )


_ALIGNFED: dict[str, _Check] = {
    "ffa": _fits_ffa,
    "fedsa": _fits_fedsa,
    "fedrot": _fits_fedrot,
    "fedex": _fits_folding,
    "flora": _fits_folding,
    "flexlora": _fits_mixed,
}
