"""What a field accepts, in words, read from its type: one source for errors, recipes and help."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ALLOWED = "allowed"
"""Key in a field's ``json_schema_extra`` for words that its type cannot give."""


def allowed_words(field: FieldInfo) -> str:
    """Return what a field accepts, for example ``a whole number from 1 to 1024``."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and ALLOWED in extra:
        return str(extra[ALLOWED])
    return _type_words(field.annotation, field.metadata)


def table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section a field holds, or None where it holds a value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def toml_text(value: Any) -> str:
    """Return a value as TOML spells it, cut where it is long."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return '"' + shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(one)}" for key, one in value.items()) + "}"
    return str(value)


def joined(names: Iterable[str], last: str = "or") -> str:
    """Return ``a, b or c``."""
    every = list(names)
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} {last} {every[-1]}"


def _shortest(value: float) -> str:
    """Return the shortest spelling that reads back as the same float: 2e10, 0.003, 16.0."""
    if not (math.isfinite(value) and (abs(value) >= 1e6 or 0 < abs(value) < 1e-4)):
        return repr(value)
    texts = (f"{value:.{digits}e}" for digits in range(17))
    mantissa, _, exponent = next(one for one in texts if float(one) == value).partition("e")
    return f"{mantissa}e{int(exponent)}"


def _type_words(annotation: Any, metadata: Sequence[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _type_words(inner, [*metadata, *_constraints(more)])
    if origin in (Union, types.UnionType):
        members = [one for one in get_args(annotation) if one is not type(None)]
        return joined([_type_words(one, metadata) for one in members])
    if origin is Literal:
        options = [toml_text(option) for option in get_args(annotation)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin is tuple:
        least = _limit(metadata, MinLen, "min_length")
        number = f" of at least {least}" if least else ""
        return f"a list{number} of {_plural(get_args(annotation)[0])}"
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return "a whole number" + _range(metadata)
    if annotation is float:
        return "a number" + _range(metadata)
    if annotation is str:
        return "text" if not _limit(metadata, MinLen, "min_length") else "text that is not empty"
    return "a table"


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for one in metadata:
        found.extend(one.metadata if isinstance(one, FieldInfo) else [one])
    return found


def _range(metadata: Sequence[Any]) -> str:
    low, above = _limit(metadata, Ge, "ge"), _limit(metadata, Gt, "gt")
    high, below = _limit(metadata, Le, "le"), _limit(metadata, Lt, "lt")
    if low is not None and high is not None:
        return f" from {_plain(low)} to {_plain(high)}"
    parts = []
    if low is not None:
        parts.append(f"of at least {_plain(low)}")
    if above is not None:
        parts.append(f"above {_plain(above)}")
    if high is not None:
        parts.append(f"of at most {_plain(high)}")
    if below is not None:
        parts.append(f"below {_plain(below)}")
    return " " + " and ".join(parts) if parts else ""


def _plain(limit: float) -> str:
    """Return a limit without an exponent where it is a whole number."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _limit(metadata: Sequence[Any], kind: type[Any], attribute: str) -> Any:
    for one in metadata:
        if isinstance(one, kind):
            return getattr(one, attribute)
    return None


def _plural(annotation: Any) -> str:
    return {str: "texts", int: "whole numbers", float: "numbers"}.get(annotation, "values")


__all__ = ["ALLOWED", "allowed_words", "joined", "table_of", "toml_text"]
