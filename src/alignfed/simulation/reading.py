"""Reading what others wrote: JSON, JSON Lines and CSV, refused by file, place and value."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignfed.errors import TraceError


def as_number(value: Any, name: str) -> float:
    """Return a JSON number as a finite float; truth values and text are none.

    Raises:
        ValueError: it is not a finite number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ValueError(f"{name} holds {_shown(value)}, not a finite number")


def parse_line(line: str, number: int, path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """Return a line's JSON object, which has exactly these keys, each of its type.

    Raises:
        TraceError: with path and line.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(
            f"{path}, line {number} is not JSON: {error}", path=str(path), line=number
        ) from error

    def refused(what: str, field: str | None = None) -> TraceError:
        return TraceError(f"{path}, line {number} {what}", path=str(path), line=number, field=field)

    if not isinstance(value, dict):
        raise refused("is not a JSON object")
    if number == 1 and not keys.keys() & value.keys():
        raise refused("is not a device trace: it has none of a header's keys")
    for name in keys:
        if name not in value:
            raise refused(f"lacks {name!r}", name)
    for name in value:
        if name not in keys:
            raise refused(f"has the unknown key {name!r}", name)
    for name, kind in keys.items():
        if kind is float:
            try:
                value[name] = as_number(value[name], name)
            except ValueError as error:
                raise refused(str(error), name) from None
        elif type(value[name]) is not kind:
            raise refused(f"has {name} = {_shown(value[name])}, must be {kind.__name__}", name)
    return value


def read_json(path: Path, *kinds: type) -> Any:
    """Return the content of a JSON file, gzipped or not.

    Raises:
        TraceError: the file is missing, not JSON, or of another kind.
    """
    value = _read(path, json.load)
    if not isinstance(value, kinds):
        raise TraceError(
            f"{path} holds a {type(value).__name__}, must hold a"
            f" {' or '.join(kind.__name__ for kind in kinds)}",
            path=str(path),
        )
    return value


def read_csv(path: Path, numbers: Sequence[str], text: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a CSV file, gzipped or not, with these columns.

    Raises:
        TraceError: the file is missing or has no rows, or a value is missing or not a number.
    """
    rows = _read(path, lambda file: list(csv.DictReader(file)))
    found = []
    for place, row in enumerate(rows, start=2):
        one: dict[str, Any] = {}
        for name in (*numbers, *text):
            value = row.get(name)
            if value in (None, ""):
                what = f"column {name!r} is missing or empty"
                raise TraceError(
                    f"{path}, line {place}: {what}", path=str(path), line=place, field=name
                )
            one[name] = value
        for name in numbers:
            try:
                number = float(one[name])
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise TraceError(
                    f"{path}, line {place}: {name} is {_shown(one[name])}, not a finite number",
                    path=str(path),
                    line=place,
                    field=name,
                    value=one[name],
                )
            one[name] = number
        found.append(one)
    if not found:
        raise TraceError(f"{path} holds no rows", path=str(path))
    return found


def positive(entry: Any, name: str, path: Path, place: int) -> float:
    """Return a number above 0 of an entry; CSV and JSON both may hold it as text.

    Raises:
        TraceError: with path, entry, field and value.
    """
    value: Any = entry.get(name) if isinstance(entry, Mapping) else entry
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (isinstance(entry, Mapping) and 0 < number < math.inf):
        raise TraceError(
            f"{path}: entry {place} has no {name!r} above 0 (found {_shown(value)})",
            path=str(path),
            entry=place,
            field=name,
            value=value,
        )
    return number


def number_list(
    entry: Mapping[str, Any], name: str, path: Path, place: int, least: float, most: float
) -> list[float]:
    """Return a list of numbers of an entry, each within ``[least, most]``.

    Raises:
        TraceError: with path, entry, field and value.
    """

    def refused(what: str, value: Any) -> TraceError:
        return TraceError(
            f"{path}: entry {place}: {what}", path=str(path), entry=place, field=name, value=value
        )

    values = entry[name]
    if not isinstance(values, list):
        raise refused(f"{name} is {_shown(values)}, must be a list of numbers", values)
    found = []
    for value in values:
        try:
            number = as_number(value, name)
        except ValueError as error:
            raise refused(str(error), value) from None
        if not least <= number <= most:
            raise refused(f"{name} holds {number}, must be from {least:g} to {most:g}", value)
        found.append(number)
    return found


def _read(path: Path, parse: Callable[[io.TextIOBase], Any]) -> Any:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                return parse(file)
        with path.open(encoding="utf-8", newline="") as file:
            return parse(file)
    except FileNotFoundError:
        raise TraceError(
            f"trace file {path} does not exist; check the path", path=str(path)
        ) from None
    except (OSError, ValueError, csv.Error, EOFError, zlib.error, RecursionError) as error:
        raise TraceError(f"trace file {path} cannot be read: {error}", path=str(path)) from error


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."
