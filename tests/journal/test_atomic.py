"""A file is replaced whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from alignfed.errors import JournalError
from alignfed.journal import write_summary, write_text_atomically
from alignfed.journal.metrics import MetricsLog


def test_a_summary_is_strict_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(
        path, {"loss": math.nan, "worst": [math.inf, 1.5], "by": {"a": -math.inf}, "n": 3}
    )
    assert json.loads(path.read_text()) == {
        "loss": None, "worst": [None, 1.5], "by": {"a": None}, "n": 3
    }  # fmt: skip
    with pytest.raises(JournalError, match="numbers, text, lists and mappings"):
        write_summary(path, {"model": object()})
    assert json.loads(path.read_text())["n"] == 3


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_text_atomically(path, "old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignfed.journal.atomic.sync", full)
    with pytest.raises(JournalError, match=r"No space left on device.*free disk space"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="could not be written"):
        write_text_atomically(tmp_path / "no" / "file", "text")
    with pytest.raises(JournalError, match="could not be written"):
        MetricsLog(tmp_path / "no" / "metrics.jsonl").append(["{}"])


def test_metrics_are_appended_and_rewritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append([])
    assert not path.exists()
    log.append(["1", "2"])
    assert path.read_text() == "1\n2\n"
    log.rewrite(["1"])
    log.append(["3"])
    log.close()
    assert path.read_text() == "1\n3\n"
