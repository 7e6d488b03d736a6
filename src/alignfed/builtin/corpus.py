"""The built-in instruction corpus: thirteen skills. Randomness comes from the given seed alone.

Which set a prompt belongs to is decided by its own SHA-256 digest, so training, evaluation and
calibration prompts are disjoint whatever the seeds and sizes.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Final, Literal, TypedDict

from alignfed.builtin.lexicon import (
    ANIMAL_SOUNDS,
    KIND_OF,
    NEXT_OF,
    NOUNS,
    NUMBERS,
    OPPOSITE_OF,
    PASTS,
    PLURALS,
)
from alignfed.errors import DataError

PROMPT_TEMPLATE: Final = "{instruction}: {input} ="
TRAINING_PERCENT: Final = 80
EVALUATION_PERCENT: Final = 10
MAX_DRAWS: Final = 2000

Split = Literal["training", "evaluation", "calibration"]


class Record(TypedDict):
    """One example: what is asked, about which words, the one right answer, and the skill."""

    instruction: str
    input: str
    response: str
    skill: str


Example = tuple[str, Sequence[str], Sequence[str]]
"""Instruction, input words, response words."""


def prompt(record: Record) -> str:
    """Return the text a model sees before the response."""
    return PROMPT_TEMPLATE.format(instruction=record["instruction"], input=record["input"])


def split_of(prompt_text: str) -> Split:
    """Return the only set in which a prompt may appear."""
    percent = int.from_bytes(hashlib.sha256(prompt_text.encode()).digest()[:8]) % 100
    if percent < TRAINING_PERCENT:
        return "training"
    return "evaluation" if percent < TRAINING_PERCENT + EVALUATION_PERCENT else "calibration"


def _reverse(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, rng.choice((3, 4)))
    return "reverse the words", words, words[::-1]


def _swap(rng: random.Random) -> Example:
    # Four words: with three, exchanging the ends would be the same as reversing.
    words = rng.sample(NOUNS, 4)
    return "swap first and last", words, [words[3], words[1], words[2], words[0]]


def _double(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, rng.choice((2, 3)))
    return "say each word twice", words, [word for word in words for _ in range(2)]


def _replace(rng: random.Random) -> Example:
    *words, new = rng.sample(NOUNS, 4)
    old = rng.choice(words)
    response = [new if word == old else word for word in words]
    return f"replace {old} with {new}", words, response


def _drop(rng: random.Random) -> Example:
    # Never the first or the last word: what is left would be a plain slice of the input.
    words = rng.sample(NOUNS, 4)
    dropped = words[rng.choice((1, 2))]
    return f"leave out {dropped}", words, [word for word in words if word != dropped]


def _between(rng: random.Random) -> Example:
    new, *words = rng.sample(NOUNS, 4)
    return f"put {new} between", words, [words[0], new, words[1], new, words[2]]


def _sort(rng: random.Random) -> Example:
    places = rng.sample(range(len(NUMBERS)), 3)
    while places == sorted(places):  # an answer must differ from its input
        rng.shuffle(places)
    response = [NUMBERS[place] for place in sorted(places)]
    return "sort the numbers", [NUMBERS[place] for place in places], response


def _mapping(instruction: str, table: Mapping[str, str]) -> Callable[[random.Random], Example]:
    words_of_table = tuple(table)

    def draw(rng: random.Random) -> Example:
        words = rng.sample(words_of_table, 3)
        return instruction, words, [table[word] for word in words]

    return draw


_DRAWS: Final[Mapping[str, Callable[[random.Random], Example]]] = MappingProxyType(
    {
        "reverse": _reverse,
        "swap": _swap,
        "double": _double,
        "replace": _replace,
        "drop": _drop,
        "between": _between,
        "sort": _sort,
        "opposite": _mapping("give the opposites", OPPOSITE_OF),
        "plural": _mapping("give the plurals", PLURALS),
        "past": _mapping("put in the past", PASTS),
        "next": _mapping("what comes next", NEXT_OF),
        "sound": _mapping("name the sounds", ANIMAL_SOUNDS),
        "kind": _mapping("name the kinds", KIND_OF),
    }
)

SKILLS: Final[tuple[str, ...]] = tuple(_DRAWS)


def training_records(num_examples: int, seed: int) -> list[Record]:
    """Return training examples, balanced over skills (see :func:`records`)."""
    return records("training", num_examples, seed)


def evaluation_records(num_examples: int, seed: int) -> list[Record]:
    """Return evaluation examples, balanced over skills (see :func:`records`)."""
    return records("evaluation", num_examples, seed)


def calibration_records(num_examples: int, seed: int) -> list[Record]:
    """Return calibration examples, balanced over skills (see :func:`records`)."""
    return records("calibration", num_examples, seed)


def records(split: Split, num_examples: int, seed: int) -> list[Record]:
    """Return examples of one set, the skills taking turns, no prompt twice.

    A skill's generator depends on the seed, the set and the skill alone, so that asking for more
    examples of the same seed only appends to the list.

    Raises:
        DataError: a skill has too few different prompts for so many examples.
    """
    rngs = [random.Random(f"{seed}/{split}/{skill}") for skill in SKILLS]
    seen: set[str] = set()
    drawn: list[Record] = []
    while len(drawn) < num_examples:
        turn = len(drawn) % len(SKILLS)
        record = _unseen_record(split, SKILLS[turn], rngs[turn], seen)
        if record is None:
            raise DataError(
                f"num_examples={num_examples} {split} examples are more than the built-in corpus "
                f"holds: after {len(drawn)} no new prompt of skill {SKILLS[turn]!r} was found in "
                f"{MAX_DRAWS} draws; ask for at most {len(drawn)}",
                split=split,
                num_examples=num_examples,
                num_available=len(drawn),
                skill=SKILLS[turn],
            )
        seen.add(prompt(record))
        drawn.append(record)
    return drawn


def _unseen_record(split: Split, skill: str, rng: random.Random, seen: Set[str]) -> Record | None:
    """Draw until a prompt belongs to the set and is new; None after ``MAX_DRAWS`` draws."""
    for _ in range(MAX_DRAWS):
        instruction, words, response = _DRAWS[skill](rng)
        record = Record(
            instruction=instruction,
            input=" ".join(words),
            response=" ".join(response),
            skill=skill,
        )
        text = prompt(record)
        if text not in seen and split_of(text) == split:
            return record
    return None
