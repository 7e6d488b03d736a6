"""Aggregation rules: one file a rule, one table, one contract: ``init``, ``receive``, ``apply``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignfed.core.aggregation.ace import Ace
from alignfed.core.aggregation.alignfed import AlignFed
from alignfed.core.aggregation.ca2fl import Ca2fl
from alignfed.core.aggregation.delayed_nesterov import DelayedNesterov
from alignfed.core.aggregation.fadas import Fadas
from alignfed.core.aggregation.fedadam import FedAdam
from alignfed.core.aggregation.fedasync import FedAsync
from alignfed.core.aggregation.fedavg import FedAvg
from alignfed.core.aggregation.fedbuff import FedBuff
from alignfed.core.aggregation.fedcompass import FedCompass
from alignfed.core.aggregation.fedprox import FedProx
from alignfed.core.aggregation.fedyogi import FedYogi
from alignfed.core.aggregation.port import Port
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
        step_grid: values of its effective server step worth trying, from small to large; most of
            the difference between rules is this one number.
        step_setting: the setting that holds it.
    """

    make: Callable[..., AggregationRule]
    synchronous: bool
    description: str
    source: str
    step_grid: tuple[float, ...]
    step_setting: str = "server_step"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting with its default, range and meaning."""
        return describe_settings(self.make)


RULES: Mapping[str, RuleEntry] = {
    "ace": RuleEntry(
        Ace,
        synchronous=False,
        description="steps by the mean of what all clients last sent",
        source="Chang et al. 2025, arXiv 2511.19066",
        step_grid=(0.03, 0.1, 0.3, 1.0),
    ),
    "alignfed": RuleEntry(
        AlignFed,
        synchronous=False,
        description="cross-version alignment, fairness, agreement, memory, a guard on the step",
        source="after Wang, Gao and Wang 2026, arXiv 2606.08197",
        step_grid=(0.3, 1.0, 2.0, 4.0),
    ),
    "ca2fl": RuleEntry(
        Ca2fl,
        synchronous=False,
        description="mean of a buffer, calibrated by what all clients last sent",
        source="Wang et al. 2024, ICLR",
        step_grid=(0.3, 1.0, 2.0, 4.0),
    ),
    "delayed_nesterov": RuleEntry(
        DelayedNesterov,
        synchronous=False,
        description="updates at once, Nesterov's momentum once per N of them",
        source="Liu et al. 2024, arXiv 2401.09135",
        step_grid=(0.1, 0.3, 0.7, 1.0),
    ),
    "fadas": RuleEntry(
        Fadas,
        synchronous=False,
        description="AMSGrad on the mean of a buffer, slower when updates are late",
        source="Wang et al. 2024, arXiv 2407.18365",
        step_grid=(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "fedadam": RuleEntry(
        FedAdam,
        synchronous=False,
        description="Adam on the mean of a buffer",
        source="Reddi et al. 2021, arXiv 2003.00295",
        step_grid=(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "fedasync": RuleEntry(
        FedAsync,
        synchronous=False,
        description="mixes each client's model into the server's, discounted by staleness",
        source="Xie, Koyejo and Gupta 2019, arXiv 1903.03934",
        step_grid=(0.1, 0.3, 0.6, 1.0),
        step_setting="mixing",
    ),
    "fedavg": RuleEntry(
        FedAvg,
        synchronous=True,
        description="mean of the cohort's models, once every member has reported",
        source="McMahan et al. 2017, arXiv 1602.05629",
        step_grid=(0.3, 1.0, 2.0, 4.0),
    ),
    "fedbuff": RuleEntry(
        FedBuff,
        synchronous=False,
        description="mean of a buffer of updates, each discounted by staleness",
        source="Nguyen et al. 2022, arXiv 2106.06639",
        step_grid=(1.0, 2.0, 4.0, 10.0),
    ),
    "fedcompass": RuleEntry(
        FedCompass,
        synchronous=False,
        description="local steps by measured speed, so that groups arrive together",
        source="Li et al. 2024, arXiv 2309.14675",
        step_grid=(1.0, 2.0, 4.0, 10.0),
    ),
    "fedprox": RuleEntry(
        FedProx,
        synchronous=True,
        description="FedAvg whose clients are held near the model they were given",
        source="Li et al. 2020, arXiv 1812.06127",
        step_grid=(0.3, 1.0, 2.0, 4.0),
    ),
    "fedyogi": RuleEntry(
        FedYogi,
        synchronous=False,
        description="Yogi on the mean of a buffer",
        source="Reddi et al. 2021, arXiv 2003.00295",
        step_grid=(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "port": RuleEntry(
        Port,
        synchronous=False,
        description="mean weighted by freshness and by agreement with the server's own way",
        source="Su and Li 2022, IWQoS",
        step_grid=(0.3, 1.0, 2.0, 4.0),
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
    "Ace",
    "AlignFed",
    "Ca2fl",
    "DelayedNesterov",
    "Fadas",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedCompass",
    "FedProx",
    "FedYogi",
    "Port",
    "RuleEntry",
    "Setting",
    "describe_settings",
    "make_rule",
]
