import json

import pytest
from datasets import Dataset

from alignfed.errors import DataError
from alignfed.training.sources import explode, find_files, read_file

RECORDS = [{"question": "1+1", "answer": "2", "n": 1}, {"question": "2+2", "answer": "4", "n": 2}]


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    (tmp_path / "a.csv").write_text("question,answer,n\n1+1,2,1\n2+2,4,2\n")
    (tmp_path / "a.tsv").write_text("question\tanswer\tn\n1+1\t2\t1\n2+2\t4\t2\n")
    Dataset.from_list(RECORDS).to_parquet(tmp_path / "a.parquet")
    for suffix in ("json", "jsonl", "csv", "tsv", "parquet"):
        found = read_file(tmp_path / f"a.{suffix}")
        assert [{k: str(v) for k, v in one.items()} for one in found] == [
            {k: str(v) for k, v in one.items()} for one in RECORDS
        ]


def test_csv_keeps_texts_that_look_like_missing_values(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"two\nlines, quoted",NA\nnull,None\n')
    assert read_file(tmp_path / "a.csv") == [
        {"question": "two\nlines, quoted", "answer": "NA"},
        {"question": "null", "answer": "None"},
    ]


def test_files_leave_nothing_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    read_file(tmp_path / "a.json")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.json", '[{"a": 1}, {"a":'),
        ("cut.jsonl", '{"a": 1}\n{"a": \n'),
        ("number.json", "3"),
        ("ragged.csv", "a,b\n1,2\n3,4,5\n"),
        ("text.parquet", "this is no parquet file"),
        ("nothing.json", ""),
        ("nothing.csv", "a,b\n"),
        ("empty.json", "[]"),
    ],
)
def test_malformed_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_file(tmp_path / name)


def test_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"did you mean 'train.jsonl'"):
        read_file(tmp_path / "trian.jsonl")


def test_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"'.xlsx'.*\.parquet"):
        read_file(tmp_path / "data.xlsx")


def test_numbered_files_come_in_numeric_order(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"client_{number}.json").write_text("[]")
    found = [path.stem for path in find_files(tmp_path, "client_*.json")]
    assert found == ["client_1", "client_2", "client_10"]


def test_pattern_that_matches_nothing_lists_what_is_there(tmp_path):
    (tmp_path / "local_0.json").write_text("[]")
    with pytest.raises(DataError, match=r"client_.*local_0\.json"):
        find_files(tmp_path, "client_*.json")


def test_exploding_repeats_the_other_columns():
    records = [{"who": "A", "lines": ["x", "y"]}, {"who": "B", "lines": []}]
    assert explode(records, "lines", "play") == [
        {"who": "A", "lines": "x"},
        {"who": "A", "lines": "y"},
    ]
    with pytest.raises(DataError, match="not lists"):
        explode(records, "who", "play")
