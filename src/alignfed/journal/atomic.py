"""A file is its old self or its new self, never half of either, whenever the process dies."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignfed.errors import JournalError

TEMPORARY_SUFFIX = ".tmp"
"""Ending of a file that is still being written; whoever finds one may delete it."""


def write_atomically(path: Path, write: Callable[[Path], None], *, synced: bool = True) -> None:
    """Let ``write`` fill a temporary file, then give it its name.

    Args:
        path: the file.
        write: fills the file at the path it is given.
        synced: force contents and name to disk; whoever writes many files may do that at the end,
            with ``sync`` for each and for their folder. Until then a power cut, though not the
            death of the process, may leave half a file.

    Raises:
        JournalError: the disk is full, or the folder is missing or not writable.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with disk_errors(path):
        write(temporary)
        if synced:
            sync(temporary)
        temporary.replace(path)
        if synced:
            sync(path.parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"{path} could not be written: {error}; free disk space or make the folder writable,"
            " then resume",
            path=str(path),
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step.

    Raises:
        JournalError: the disk is full, or the folder is missing or not writable.
    """
    write_atomically(path, lambda temporary: _fill(temporary, text.encode()))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; a float that is not finite is written as null.

    Raises:
        JournalError: a value JSON cannot hold, or the file cannot be written.
    """
    try:
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JournalError(
            f"{path.name} holds numbers, text, lists and mappings only: {error}", path=str(path)
        ) from error
    write_text_atomically(path, text + "\n")


def sync(path: Path) -> None:
    """Force a file's contents, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value
