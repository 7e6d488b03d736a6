"""Claims about the built-in corpus, text and tokenizer. Nothing here trains."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignfed.builtin import MODEL_PATH, corpus, text

LARGEST_MODEL_BYTES = 4_000_000
LARGEST_CHEAT_RATE = 0.10


@pytest.fixture(scope="module")
def evaluation() -> list[corpus.Record]:
    return corpus.evaluation_records(3000, seed=11)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def by_skill(records: list[corpus.Record]) -> dict[str, list[corpus.Record]]:
    grouped: dict[str, list[corpus.Record]] = {}
    for record in records:
        grouped.setdefault(record["skill"], []).append(record)
    return grouped


def slices(words: list[str]) -> Iterator[tuple[object, str]]:
    """Yield each contiguous or strided slice, named by its place from the start and the end."""
    n = len(words)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            for stride in (1, 2, 3):
                copied = " ".join(words[start:stop:stride])
                yield ("from start", start, stop, stride), copied
                yield ("from end", start - n, stop - n, stride), copied
                yield ("both", start, stop - n, stride), copied


def test_at_least_ten_skills_share_the_examples_equally() -> None:
    each = 100
    records = corpus.training_records(each * len(corpus.SKILLS), seed=3)
    assert len(corpus.SKILLS) >= 10
    assert Counter(r["skill"] for r in records) == dict.fromkeys(corpus.SKILLS, each)


@pytest.mark.parametrize(
    "make", [corpus.training_records, corpus.evaluation_records, corpus.calibration_records]
)
def test_same_seed_gives_same_records_and_another_seed_others(
    make: Callable[[int, int], list[corpus.Record]],
) -> None:
    assert make(240, 5) == make(240, 5)
    assert make(240, 5) != make(240, 6)
    assert make(240, 5)[:120] == make(120, 5)


def test_no_prompt_is_in_two_sets_or_twice_in_one() -> None:
    drawn = [
        [corpus.prompt(r) for r in make(2600, seed)]
        for seed, make in enumerate(
            (corpus.training_records, corpus.evaluation_records, corpus.calibration_records)
        )
    ]
    training, evaluation, calibration = map(set, drawn)
    assert [len(set(prompts)) for prompts in drawn] == [2600] * 3
    assert not training & evaluation
    assert not training & calibration
    assert not evaluation & calibration


def test_no_constant_answer_scores_above_ten_percent(evaluation: list[corpus.Record]) -> None:
    for skill, records in by_skill(evaluation).items():
        _, hits = Counter(r["response"] for r in records).most_common(1)[0]
        assert hits / len(records) <= LARGEST_CHEAT_RATE, skill


def test_no_copied_words_score_above_ten_percent(evaluation: list[corpus.Record]) -> None:
    for skill, records in by_skill(evaluation).items():
        hits: Counter[object] = Counter()
        for record in records:
            for source in ("input", "instruction", "prompt"):
                copied_from = corpus.prompt(record) if source == "prompt" else record[source]
                hits.update(
                    {
                        (source, where)
                        for where, copied in slices(copied_from.split())
                        if copied == record["response"]
                    }
                )
        for where, count in hits.items():
            assert count / len(records) <= LARGEST_CHEAT_RATE, (skill, where)


def test_every_response_differs_from_its_input(evaluation: list[corpus.Record]) -> None:
    assert all(r["response"] != r["input"] for r in evaluation)


def test_examples_are_short(
    evaluation: list[corpus.Record], tokenizer: PreTrainedTokenizerBase
) -> None:
    for record in evaluation:
        assert len(tokenizer(corpus.prompt(record))["input_ids"]) <= 16
        assert len(tokenizer(f"{corpus.prompt(record)} {record['response']}")["input_ids"]) <= 28


def test_more_examples_than_the_language_holds_are_refused() -> None:
    with pytest.raises(corpus.DataError, match="calibration"):
        corpus.calibration_records(1_000_000, seed=0)


def test_text_holds_no_instruction_and_no_template() -> None:
    instructions = {r["instruction"] for r in corpus.training_records(1200, seed=3)}
    for document in islice(text.documents(random.Random(7)), 5000):
        assert "=" not in document
        assert not any(instruction in document for instruction in instructions)


def test_tokenizer_gives_corpus_and_text_back(
    evaluation: list[corpus.Record], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [f"{corpus.prompt(r)} {r['response']}" for r in evaluation[:600]]
    texts += islice(text.documents(random.Random(8)), 600)
    for one in texts:
        assert tokenizer.decode(tokenizer(one)["input_ids"]) == one


def test_each_word_of_the_corpus_is_one_token(
    evaluation: list[corpus.Record], tokenizer: PreTrainedTokenizerBase
) -> None:
    for word in {word for r in evaluation for word in (r["input"] + " " + r["response"]).split()}:
        assert len(tokenizer(word)["input_ids"]) == 1


@pytest.mark.parametrize("unknown", ["Grüße, 東京!", "x\ty\n", "emoji 😀", "Zebra 123"])
def test_tokenizer_spells_unknown_text_in_bytes(
    unknown: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(unknown)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == unknown


def test_prompt_and_response_tokenize_apart_as_together(
    evaluation: list[corpus.Record], tokenizer: PreTrainedTokenizerBase
) -> None:
    for record in evaluation[:600]:
        prompt = corpus.prompt(record)
        apart = tokenizer(prompt)["input_ids"] + tokenizer(record["response"])["input_ids"]
        assert apart == tokenizer(f"{prompt} {record['response']}")["input_ids"]


def test_model_folder_fits_in_four_megabytes() -> None:
    assert sum(f.stat().st_size for f in MODEL_PATH.rglob("*")) <= LARGEST_MODEL_BYTES
