"""Where records are, and what of them is wanted. Nothing here splits or formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from alignfed.errors import DataError
from alignfed.training.naming import listed, nearest_name

Record: TypeAlias = "dict[str, Any]"

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Suffixes a local file may have."""


def read_file(path: Path) -> list[Record]:
    """Return the records of one JSON, JSONL, CSV, TSV or Parquet file.

    Raises:
        DataError: the file is missing, of another kind, malformed, or holds no record.
    """
    if not path.is_file():
        siblings = [one.name for one in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(
            f"data file {path} does not exist{nearest_name(path.name, siblings)}", path=str(path)
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data file {path} has suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}",
            path=str(path),
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty", path=str(path))
    from alignfed.training.reading import file_records

    return file_records(path)


def read_hub(name: str, subset: str | None, split: str) -> list[Record]:
    """Return the records of one split of a data set on the Hugging Face hub.

    Class labels come back as their names.

    Raises:
        DataError: the data set cannot be loaded, or has no such split.
    """
    from alignfed.training.reading import hub_records

    return hub_records(name, subset, split)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that match a glob pattern, numbers in their names in order.

    Raises:
        DataError: nothing matches.
    """
    found = sorted(
        (path for path in folder.glob(pattern) if path.is_file()), key=lambda path: _natural(path)
    )
    if not found:
        present = sorted(path.name for path in folder.glob("*") if path.is_file())
        raise DataError(
            f"no file in {folder} matches {pattern!r}; it holds {listed(present)}"
            f"{nearest_name(pattern, present)}",
            path=str(folder),
            pattern=pattern,
        )
    return found


def looks_local(path: str) -> bool:
    """Return whether a path that does not exist was surely meant for a local file or folder."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "\\" in path
        or Path(path).suffix.lower() in SUFFIXES
    )


def column_values(records: Sequence[Record], column: str, source: str) -> list[Any]:
    """Return one column of the records.

    Raises:
        DataError: there is no such column, or a record has no value in it.
    """
    if records and column not in records[0]:
        raise DataError(
            f"{source} has no column {column!r}; it has {listed(records[0])}"
            f"{nearest_name(column, records[0])}",
            column=column,
            columns=tuple(records[0]),
        )
    values = [record[column] for record in records]
    for row, value in enumerate(values):
        if value is None:
            raise DataError(
                f"column {column!r} of {source} has no value in row {row}", column=column, row=row
            )
    return values


def explode(records: Sequence[Record], column: str, source: str) -> list[Record]:
    """Return one record for each item of a column of lists; other columns are repeated.

    Raises:
        DataError: the column is missing or does not hold lists.
    """
    exploded = []
    for record, items in zip(records, column_values(records, column, source), strict=True):
        if not isinstance(items, list):
            raise DataError(
                f"column {column!r} of {source} holds {type(items).__name__}, not lists;"
                " it cannot be exploded",
                column=column,
            )
        exploded += [{**record, column: item} for item in items]
    return exploded


def _natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    pieces: list[str] = [""]
    for char in str(path):
        if pieces[-1] and char.isdigit() == pieces[-1][-1].isdigit():
            pieces[-1] += char
        else:
            pieces.append(char)
    return tuple((0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces if piece)
