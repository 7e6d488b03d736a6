"""Settings of aggregation rules: defaults, ranges and meanings as data beside each field.

A rule is a frozen dataclass. Its fields are made by ``number``, ``whole``, ``switch`` and
``choice``, its ``__post_init__`` calls ``check_settings``, and ``describe_settings`` gives the same
facts to recipes and to people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from alignfed.errors import RuleError

_KEY = "setting"


@dataclass(frozen=True, slots=True)
class Setting:
    """What one setting accepts.

    Attributes:
        name: as in the rule and in recipes.
        kind: ``float``, ``int``, ``bool`` or ``str``.
        default: its value unless set.
        limits: the accepted values in words.
        meaning: one line.
        high: largest accepted number (infinity: none).
    """

    name: str
    kind: type
    default: float | int | bool | str
    limits: str
    meaning: str
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class _Range:
    kind: type
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_included: bool = True
    options: tuple[str, ...] = ()

    def words(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.options:
            return "one of " + ", ".join(self.options)
        low = f"{'at least' if self.low_included else 'above'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"

    def accepts(self, value: object) -> bool:
        if self.kind is bool:
            return isinstance(value, bool)
        if self.options:
            return value in self.options
        allowed = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
            return False
        above = value >= self.low if self.low_included else value > self.low
        return above and value <= self.high


def number(
    default: float, meaning: str, *, low: float, high: float = math.inf, low_included: bool = True
) -> Any:
    """Return a dataclass field for a finite number between ``low`` and ``high``."""
    return field(default=default, metadata={_KEY: _Range(float, meaning, low, high, low_included)})


def whole(default: int, meaning: str, *, low: int, high: float = math.inf) -> Any:
    """Return a dataclass field for a whole number between ``low`` and ``high``."""
    return field(default=default, metadata={_KEY: _Range(int, meaning, low, high)})


def switch(default: bool, meaning: str) -> Any:
    """Return a dataclass field for true or false."""
    return field(default=default, metadata={_KEY: _Range(bool, meaning)})


def choice(default: str, options: Sequence[str], meaning: str) -> Any:
    """Return a dataclass field for one of several words."""
    return field(default=default, metadata={_KEY: _Range(str, meaning, options=tuple(options))})


def check_settings(rule: Any) -> None:
    """Refuse settings outside their ranges.

    Raises:
        RuleError: with the rule, the setting, its value and the accepted values.
    """
    for entry in fields(rule):
        limits: _Range = entry.metadata[_KEY]
        value = getattr(rule, entry.name)
        if not limits.accepts(value):
            raise RuleError(
                f"{rule.name}: {entry.name}={value!r}, must be {limits.words()}"
                f" (default {entry.default!r}: {limits.meaning})",
                rule=rule.name,
                setting=entry.name,
                value=value,
                limits=limits.words(),
            )


def describe_settings(rule_type: Any) -> tuple[Setting, ...]:
    """Return every setting of a rule's class, in order."""
    found = []
    for entry in fields(rule_type):
        limits: _Range = entry.metadata[_KEY]
        default: Any = entry.default
        found.append(
            Setting(entry.name, limits.kind, default, limits.words(), limits.meaning, limits.high)
        )
    return tuple(found)
