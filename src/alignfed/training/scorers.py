"""Whether a generated text answers the reference. Pure functions of two texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import TypeAlias

from alignfed.errors import DataError

TextScorer: TypeAlias = Callable[[str, str], bool]
"""``(generated, reference) -> right``."""

# Cobbe et al. 2021: the final answer follows four number signs.
_FINAL_ANSWER = re.compile(r"####\s*(?P<answer>\S[^\n]*)")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact_match(generated: str, reference: str) -> bool:
    """Return whether two texts are equal, runs of white space counting as one space."""
    return " ".join(generated.split()) == " ".join(reference.split())


def gsm8k(generated: str, reference: str) -> bool:
    """Return whether the generated final answer equals the reference's, as numbers.

    A text without ``#### number`` has no final answer and is wrong. Currency signs, thousands
    commas, a closing full stop and trailing zeros do not matter.

    Raises:
        DataError: the reference has no final answer.
    """
    expected = final_answer(reference)
    if expected is None:
        raise DataError(
            f"the gsm8k scorer needs references that end in '#### number', not {reference[-60:]!r}"
        )
    return final_answer(generated) == expected


def final_answer(text: str) -> Decimal | None:
    """Return the number after the first ``####``, or None where there is none."""
    marked = _FINAL_ANSWER.search(text)
    if marked is None:
        return None
    number = _NUMBER.search(marked["answer"].replace("$", "").replace(" ", ""))
    if number is None:
        return None
    try:
        return Decimal(number[0].replace(",", "")).normalize()
    except InvalidOperation:
        return None


TEXT_SCORERS: Mapping[str, TextScorer] = MappingProxyType(
    {"exact_match": exact_match, "gsm8k": gsm8k}
)
"""Scorers of generated text, by the name a recipe uses."""
