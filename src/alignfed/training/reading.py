"""Files and hub names to records, through ``datasets``. Nothing here splits or formats.

Local files never touch the network and leave nothing in a cache. ``sources.py`` imports this module
where there is something to read: ``datasets`` brings pandas and an HTTP client along.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from pyarrow import csv

from alignfed.errors import DataError
from alignfed.training.naming import listed
from alignfed.training.sources import Record


def file_records(path: Path) -> list[Record]:
    """Return the records of one file that is there and of a known kind.

    Raises:
        DataError: the file is malformed, or holds no record.
    """
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


def hub_records(name: str, subset: str | None, split: str) -> list[Record]:
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
