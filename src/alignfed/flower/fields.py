"""The fields beside a payload's tensors: their names, types and ranges, strictly.

Whether a value is true (a task that was given, a version that exists) is not asked here.
"""

from __future__ import annotations

import math
import re
from dataclasses import astuple
from typing import Any

from alignfed.core.adapter import DTYPES, AdapterLayout, DenseShape, LoraShape
from alignfed.core.reasons import RejectReason
from alignfed.errors import AdapterError
from alignfed.flower.blob import WireError
from alignfed.flower.messages import ENCODINGS

FORMAT = 1
"""Version of the wire's grammar."""

_RUN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METRIC = re.compile(r"[A-Za-z0-9_./-]{1,64}")
_MOST_METRICS = 64
_MOST = 2**53
_COMMON = {"format", "kind", "run", "base_version", "encoding", "checksum"}
_NAMES = {
    "download": frozenset({*_COMMON, "layout"}),
    "upload": frozenset({*_COMMON, "task_id", "num_examples", "metrics"}),
}


def require_run(run: str) -> str:
    """Return the name of a run that can travel.

    Raises:
        AdapterError: it is empty, too long, or has other letters.
    """
    if not _RUN.fullmatch(run):
        raise AdapterError(
            f"run {run!r} cannot travel: use 1 to 128 letters, digits, dots, dashes and underscores"
        )
    return run


def check_fields(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the fields of a download or an upload; layout and metrics come parsed.

    Raises:
        WireError: a field is missing, unknown, or of another type than it must be.
    """
    if set(fields) != _NAMES[kind]:
        raise WireError(
            f"the payload's metadata has the fields {', '.join(sorted(fields))[:200]}; a {kind} has"
            f" {', '.join(sorted(_NAMES[kind]))}",
            RejectReason.MALFORMED,
        )
    for name, wanted in (("format", FORMAT), ("kind", kind)):
        if fields[name] != wanted or isinstance(fields[name], bool):
            raise bad_field(name, fields[name], f"must be {wanted!r}")
    if not isinstance(fields["run"], str) or not _RUN.fullmatch(fields["run"]):
        raise bad_field("run", fields["run"], "must be 1 to 128 letters, digits, '.', '-' or '_'")
    if fields["encoding"] not in ENCODINGS:
        raise bad_field("encoding", fields["encoding"], f"must be one of {', '.join(ENCODINGS)}")
    for name in _NAMES[kind] & {"task_id", "base_version", "num_examples"}:
        value = fields[name]
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST:
            raise bad_field(name, value, f"must be a whole number up to {_MOST}")
    if kind == "upload":
        return {**fields, "metrics": _metrics(fields["metrics"])}
    return {**fields, "layout": _parse_layout(fields["layout"])}


def bad_field(name: str, value: object, wanted: str) -> WireError:
    """Return the error that names a field, its value and what it must be."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return WireError(f"the payload's {name} is {shown}, {wanted}", RejectReason.MALFORMED)


def layout_value(layout: AdapterLayout) -> dict[str, Any]:
    """Return a layout as plain JSON values."""
    return {
        "lora": [[name, *astuple(shape)] for name, shape in layout.lora],
        "dense": [[name, list(shape.shape), shape.dtype] for name, shape in layout.dense],
    }


def _parse_layout(value: Any) -> AdapterLayout:
    try:
        lora = tuple((name, LoraShape(*sizes)) for name, *sizes in value["lora"])
        dense = tuple((name, DenseShape(tuple(s), dtype)) for name, s, dtype in value["dense"])
        for name, one in lora:
            _require_counts(one.in_dim, one.out_dim, one.rank)
            if isinstance(one.frozen, bool) or not 0 <= one.frozen < one.rank:
                raise ValueError(f"{one.frozen!r} of {one.rank} directions of {name!r} are frozen")
            if not (isinstance(one.alpha, int | float) and 0 < one.alpha < math.inf):
                raise ValueError(f"alpha of {name!r} is {one.alpha!r}")
        for _, whole in dense:
            _require_counts(*whole.shape)
        for named in (lora, dense):
            names = [name for name, _ in named]
            if not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
                raise ValueError("names are not text in ascending order")
            for name, shape in named:
                if shape.dtype not in DTYPES:
                    raise ValueError(f"dtype of {name!r} is {shape.dtype!r}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise bad_field("layout", str(error), "must be names and sizes of an adapter") from error
    return AdapterLayout(lora, dense)


def _require_counts(*sizes: object) -> None:
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
            raise ValueError(f"a size is {size!r}")


def _metrics(value: object) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > _MOST_METRICS:
        raise bad_field("metrics", value, f"must be an object of at most {_MOST_METRICS} numbers")
    found = {}
    for name, number in value.items():
        if not _METRIC.fullmatch(name):
            raise bad_field("metrics", name, "has a name of other than 1 to 64 plain letters")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise bad_field(f"metric {name!r}", number, "must be a number")
        try:
            found[name] = float(number)
        except OverflowError as error:
            raise bad_field(f"metric {name!r}", "too long", "must be a number") from error
    return found
