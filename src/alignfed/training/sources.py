"""Files and hub names to records, through ``datasets``. Nothing here splits or formats.

Local files never touch the network and leave nothing in a cache.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from pyarrow import csv

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
    with _quiet(), tempfile.TemporaryDirectory(prefix="alignfed-data-") as cache:
        try:
            loaded = _load(path, cache)
        except Exception as error:
            # The readers raise whatever their parser raises, TypeError and StopIteration among
            # it; the first cause is the one that says where.
            raise DataError(
                f"data file {path} cannot be read: {_first_cause(error)}", path=str(path)
            ) from error
    return _records(loaded, str(path))


def read_hub(name: str, subset: str | None, split: str) -> list[Record]:
    """Return the records of one split of a data set on the Hugging Face hub.

    Class labels come back as their names.

    Raises:
        DataError: the data set cannot be loaded, or has no such split.
    """
    with _quiet():
        try:
            loaded = load_dataset(name, subset, split=split)
        except Exception as error:
            raise DataError(
                f"data set {name!r} (split {split!r}) is no local file or folder and cannot be"
                f" loaded from the hub: {_first_cause(error)}",
                path=name,
                split=split,
            ) from error
    if isinstance(loaded, DatasetDict) or not isinstance(loaded, Dataset):
        raise DataError(f"data set {name!r} has splits {listed(loaded)}; name one", path=name)
    for column, feature in loaded.features.items():
        if isinstance(feature, ClassLabel):
            names = feature.names
            texts = [None if value in (None, -1) else names[value] for value in loaded[column]]
            loaded = loaded.remove_columns(column).add_column(column, texts)
    return _records(loaded, name)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and the readers' own error lines: the raised error says it once."""
    were_on = datasets.is_progress_bar_enabled()
    logger = logging.getLogger("datasets")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        if were_on:
            datasets.enable_progress_bars()


def _load(path: Path, cache: str) -> Dataset:
    match path.suffix.lower():
        case ".json" | ".jsonl":
            return Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True)
        case ".parquet":
            return Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        case suffix:
            # Not Dataset.from_csv: it reads the texts "NA" and "null" as missing values.
            parsing = csv.ParseOptions(
                delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True
            )
            return Dataset(csv.read_csv(path, parse_options=parsing))


def _records(loaded: Dataset, source: str) -> list[Record]:
    if len(loaded) == 0:
        raise DataError(f"{source} holds no record", path=source)
    return list(loaded.to_list())


def _first_cause(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__


def _natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    pieces: list[str] = [""]
    for char in str(path):
        if pieces[-1] and char.isdigit() == pieces[-1][-1].isdigit():
            pieces[-1] += char
        else:
            pieces.append(char)
    return tuple((0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces if piece)
