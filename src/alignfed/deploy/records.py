"""What processes of a deployment leave for others to read: lines of JSON, and small JSON files."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _to_standard_error(line: bytes) -> None:
    sys.stderr.buffer.write(line)
    sys.stderr.flush()


class _Sink:
    """Where this process's lines go; a supervisor keeps those on standard error."""

    write: Callable[[bytes], None] = staticmethod(_to_standard_error)


@contextmanager
def records_to(write: Callable[[bytes], None]) -> Iterator[None]:
    """Have this process's lines go elsewhere for a while.

    Args:
        write: takes one line, its end included.
    """
    before, _Sink.write = _Sink.write, staticmethod(write)
    try:
        yield
    finally:
        _Sink.write = staticmethod(before)


def log_record(event: str, **values: Any) -> None:
    """Write one line of JSON to standard error, or where ``records_to`` says.

    Args:
        event: what happened, in one word or two joined by an underscore.
        **values: what belongs to it; None is left out.
    """
    kept = {name: value for name, value in values.items() if value is not None}
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": stamp, "event": event, **kept}, default=str)
    _Sink.write(line.encode("utf-8") + b"\n")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a small JSON file in one step. It need not outlive a power cut, so it is not synced.

    A full disk must not stop the process that reports it, so a failure to write is ignored; the
    reader sees the file's age.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document, default=str), "utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object; None where there is none to read."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
