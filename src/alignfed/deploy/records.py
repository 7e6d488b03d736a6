"""What processes of a deployment leave for others to read: lines of JSON, and small JSON files."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def log_record(event: str, **values: Any) -> None:
    """Write one line of JSON to standard error, which the supervisor keeps.

    Args:
        event: what happened, in one word or two joined by an underscore.
        **values: what belongs to it; None is left out.
    """
    kept = {name: value for name, value in values.items() if value is not None}
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": stamp, "event": event, **kept}, default=str)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


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
