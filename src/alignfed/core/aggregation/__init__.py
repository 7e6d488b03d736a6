"""Aggregation rules: one file a rule, one table, one contract: ``init``, ``receive``, ``apply``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignfed.core.aggregation.alignfed import AlignFed
from alignfed.core.aggregation.fedasync import FedAsync
from alignfed.core.aggregation.fedavg import FedAvg
from alignfed.core.aggregation.fedbuff import FedBuff
from alignfed.core.aggregation.settings import Setting, describe_settings
from alignfed.core.ports import AggregationRule
from alignfed.errors import RuleError


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """One row of the table.

    Attributes:
        make: the rule's class; called with settings by name.
        synchronous: whether a flush waits for the whole cohort.
        description: one line.
        source: where it was published.
    """

    make: Callable[..., AggregationRule]
    synchronous: bool
    description: str
    source: str

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting with its default, range and meaning."""
        return describe_settings(self.make)


RULES: Mapping[str, RuleEntry] = {
    "alignfed": RuleEntry(
        AlignFed,
        synchronous=False,
        description="grouping by version, cross-version alignment, fairness, agreement, guard",
        source="after Wang, Gao and Wang 2026, arXiv 2606.08197",
    ),
    "fedasync": RuleEntry(
        FedAsync,
        synchronous=False,
        description="mixes each client's model into the server's, discounted by staleness",
        source="Xie, Koyejo and Gupta 2019, arXiv 1903.03934",
    ),
    "fedavg": RuleEntry(
        FedAvg,
        synchronous=True,
        description="mean of the cohort's models, once every member has reported",
        source="McMahan et al. 2017, arXiv 1602.05629",
    ),
    "fedbuff": RuleEntry(
        FedBuff,
        synchronous=False,
        description="mean of a buffer of updates, each discounted by staleness",
        source="Nguyen et al. 2022, arXiv 2106.06639",
    ),
}
"""Every aggregation rule by the name that recipes use."""


def make_rule(name: str, **settings: Any) -> AggregationRule:
    """Return the rule of that name with these settings.

    Raises:
        RuleError: no such rule, no such setting, or a value outside its range.
    """
    if name not in RULES:
        raise RuleError(f"no rule is called {name!r}; choose one of {', '.join(RULES)}", name=name)
    known = [setting.name for setting in RULES[name].settings]
    for key in settings:
        if key not in known:
            raise RuleError(
                f"{name} has no setting {key!r}; it has {', '.join(known)}", rule=name, setting=key
            )
    return RULES[name].make(**settings)


__all__ = [
    "RULES",
    "AlignFed",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "RuleEntry",
    "Setting",
    "describe_settings",
    "make_rule",
]
