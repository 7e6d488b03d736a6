"""The plain text the built-in base model learns language from. It holds no instruction format.

Short documents of micro-English tell small stories and show what the language can do (lists said
backwards, opposites, plurals, yesterday's deeds, what comes after what), always in sentences. The
corpus' instructions, its prompt template and the sign ``=`` never occur here, so that following
instructions is left to fine-tuning. Randomness comes from the given generator alone.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from alignfed.builtin.lexicon import (
    ANIMAL_SOUNDS,
    COLOURS,
    DAYS,
    KIND_OF,
    MONTHS,
    NAMES,
    NEXT_OF,
    NOUNS,
    NUMBERS,
    OPPOSITE_OF,
    PASTS,
    PLACES,
    PLURALS,
)

Words = Sequence[str]


def _list(words: Words, style: str) -> str:
    """Join words as a list: bare, with commas, with ``and`` before the last, or with ``then``."""
    if style == "bare":
        return " ".join(words)
    if style == "then":
        return " then ".join(words)
    if style == "and" and len(words) > 1:
        return f"{', '.join(words[:-1])} and {words[-1]}"
    return ", ".join(words)


def _style(rng: random.Random) -> str:
    return rng.choice(("bare", "bare", "bare", "comma", "comma", "and", "then"))


def _shown(
    rng: random.Random, before: Words, after: Words, wordings: Sequence[str], **others: str
) -> str:
    """Tell in one of several wordings how one list became another, both in one style."""
    style = _style(rng)
    return rng.choice(wordings).format(
        name=rng.choice(NAMES), before=_list(before, style), after=_list(after, style), **others
    )


def _things(rng: random.Random) -> list[str]:
    return rng.sample(NOUNS, rng.choice((2, 3, 3, 4, 4)))


def _reversed(rng: random.Random) -> str:
    words = _things(rng)
    wordings = (
        "{name} wrote {before}. in reverse that is {after}.",
        "{before} is the list; the list in reverse is {after}.",
        "{name} said {before}, and ben the words in reverse, {after}.",
        "in reverse {before} turns into {after}.",
        "the words were {before}. backwards, in reverse, they were {after}.",
        "the reverse of the words {before} is {after}.",
    )
    return _shown(rng, words, words[::-1], wordings)


def _swapped(rng: random.Random) -> str:
    words = rng.sample(NOUNS, rng.choice((3, 4, 4, 4)))
    wordings = (
        "in a row stood {before}. the first and the last made a swap: {after}.",
        "{name} saw {before}. after a swap of the first and the last one there were {after}.",
        "the first and the last of {before} traded places, a swap, so now it is {after}.",
        "{before} with a swap of both ends is {after}.",
        "a swap of the first and the last of {before} gives {after}.",
    )
    return _shown(rng, words, [words[-1], *words[1:-1], words[0]], wordings)


def _doubled(rng: random.Random) -> str:
    words = _things(rng)[:3]
    wordings = (
        "{name} called {before} but each one was heard twice: {after}.",
        "with each thing twice {before} is {after}.",
        "{before}. the hill said each of them twice, {after}.",
        "{name} wrote each one of {before} twice, so we read {after}.",
        "when we say twice each word of {before} they hear {after}.",
    )
    return _shown(rng, words, [word for word in words for _ in range(2)], wordings)


def _replaced(rng: random.Random) -> str:
    """Tell of one replacement in one to three lists, so that the rule is seen at work."""
    old, new, *others = rng.sample(NOUNS, 11)
    style = _style(rng)
    told = []
    for i in range(rng.choice((1, 1, 2, 3))):
        before = [old, *others[3 * i : 3 * i + rng.choice((1, 2, 2, 3))]]
        rng.shuffle(before)
        after = [new if word == old else word for word in before]
        link = rng.choice(("became", "is now", "will be", "gave"))
        told.append(f"{_list(before, style)} {link} {_list(after, style)}")
    rule = rng.choice(
        (
            f"{new} has to replace {old}.",
            f"we replace the {old} by a {new}.",
            f"to replace {old} {rng.choice(NAMES)} chose {new}.",
            f"out goes {old}, in comes {new}.",
            f"they replace each {old} with a {new}.",
        )
    )
    return f"{rule} {'; '.join(told)}."


def _between(rng: random.Random) -> str:
    new, *words = rng.sample(NOUNS, rng.choice((3, 4, 4)))
    after = [words[0], *(word for other in words[1:] for word in (new, other))]
    wordings = (
        "{name} had {before} and put one {new} between any two: {after}.",
        "with {new} put between the words {before} turns into {after}.",
        "a {new} is between each two of {before}, so it is {after}.",
    )
    return _shown(rng, words, after, wordings, new=new)


def _dropped(rng: random.Random) -> str:
    words = rng.sample(NOUNS, rng.choice((3, 4, 4)))
    old = rng.choice(words)
    after = [word for word in words if word != old]
    wordings = (
        "{name} had {before}. without the {old} that is {after}.",
        "out of {before} they leave the {old}, so {after} stay.",
        "the {old} was left out of {before}, and {after} stayed.",
        "as {old} had to leave {name} did not say {before} but {after}.",
        "to leave the {old} out of {before} means {after}.",
    )
    return _shown(rng, words, after, wordings, old=old)


def _sorted(rng: random.Random) -> str:
    places = rng.sample(range(len(NUMBERS)), rng.choice((2, 3, 3, 4)))
    wordings = (
        "the numbers {before} will sort into {after}.",
        "{name} counts {before}. from small to big these numbers are {after}.",
        "{before} are out of order. a good sort of them is {after}.",
        "to sort is to turn {before} into {after}.",
        "a sort of the numbers {before} gives {after}.",
    )
    before = [NUMBERS[place] for place in places]
    return _shown(rng, before, [NUMBERS[place] for place in sorted(places)], wordings)


def _opposites(rng: random.Random) -> str:
    words = rng.sample(tuple(OPPOSITE_OF), rng.choice((1, 2, 3, 3)))
    if len(words) == 1:
        return f"the opposite of {words[0]} is {OPPOSITE_OF[words[0]]}."
    wordings = (
        "{name} was {before}, and felix was all the opposites, {after}.",
        "the opposites of {before} are {after}.",
        "it is not {before}. it is {after}, the opposites.",
    )
    return _shown(rng, words, [OPPOSITE_OF[word] for word in words], wordings)


def _plurals(rng: random.Random) -> str:
    words = rng.sample(NOUNS, rng.choice((1, 2, 3, 3)))
    if len(words) == 1:
        return f"one {words[0]}, many {PLURALS[words[0]]}."
    wordings = (
        "{name} had one each of {before}, but ida had many {after}.",
        "of {before} the plurals are {after}.",
        "in the shop for {before} there are lots of {after}, all in plurals.",
    )
    return _shown(rng, words, [PLURALS[word] for word in words], wordings)


def _pasts(rng: random.Random) -> str:
    words = rng.sample(tuple(PASTS), rng.choice((1, 2, 3, 3)))
    wordings = (
        "today we {before}; in the past we {after}.",
        "they {before} now. long past they {after}.",
        "{name} can {before}, and yesterday {name} {after}.",
    )
    return _shown(rng, words, [PASTS[word] for word in words], wordings)


def _nexts(rng: random.Random) -> str:
    words = rng.sample(tuple(NEXT_OF), rng.choice((1, 2, 3, 3)))
    after = [NEXT_OF[word] for word in words]
    if len(words) == 1:
        single = ("after {before} comes {after}.", "{after} comes next after {before}.")
        return _shown(rng, words, after, single)
    wordings = (
        "{name} called {before}, so clara called the next ones, {after}.",
        "next after {before} come {after}.",
        "{before} have passed and {after} come next.",
    )
    return _shown(rng, words, after, wordings)


def _sounds(rng: random.Random) -> str:
    words = rng.sample(tuple(ANIMAL_SOUNDS), rng.choice((1, 2, 3, 3)))
    after = [ANIMAL_SOUNDS[word] for word in words]
    if len(words) == 1:
        return f"the {words[0]} says {after[0]}."
    wordings = (
        "{name} saw {before} and heard their sounds, {after}.",
        "{before} make the sounds {after}.",
        "in the field were {before}: {after} they went.",
    )
    return _shown(rng, words, after, wordings)


def _kinds(rng: random.Random) -> str:
    words = rng.sample(tuple(KIND_OF), rng.choice((1, 2, 3, 3)))
    after = [KIND_OF[word] for word in words]
    if len(words) == 1:
        return f"a {words[0]} is a {after[0]}."
    wordings = (
        "{before} are of the kinds {after}.",
        "{name} bought {before}, the kinds of thing called {after}.",
        "for {before} go and look under {after}.",
    )
    return _shown(rng, words, after, wordings)


def _counting(rng: random.Random) -> str:
    names = rng.choice((NUMBERS, NUMBERS, DAYS, MONTHS))
    start = rng.randrange(len(names) - 2)
    words = names[start : start + rng.choice((3, 4, 5))]
    return f"{rng.choice(NAMES)} counts {_list(words, _style(rng))}."


def _echoed(rng: random.Random) -> str:
    words = _things(rng)
    return _shown(rng, words, words, ("{name} said {before}, and they all said {after}.",))


def _story(rng: random.Random) -> str:
    name, friend = rng.sample(NAMES, 2)
    first, second = rng.sample(NOUNS, 2)
    animal = rng.choice(tuple(ANIMAL_SOUNDS))
    verb = rng.choice(tuple(PASTS))
    mood = rng.choice(tuple(OPPOSITE_OF))
    colour = rng.choice(COLOURS)
    place = rng.choice(PLACES)
    sentences = (
        f"{name} lives in a {mood} {place} near the {rng.choice(PLACES)}.",
        f"{name} has a {colour} {first} and {friend} has a {mood} {second}.",
        f"on {rng.choice(DAYS)} {name} went to the {place} with {friend}.",
        f"there was a {colour} {animal}. it said {ANIMAL_SOUNDS[animal]}.",
        f"{friend} {PASTS[verb]}, and {name} {PASTS[verb]} too.",
        f"{name} gave {friend} the {first} for a {second}.",
        f"in {rng.choice(MONTHS)} it is {mood} in the {place}.",
    )
    return " ".join(rng.sample(sentences, rng.choice((1, 2, 3))))


_SENTENCES: Final[Mapping[Callable[[random.Random], str], int]] = MappingProxyType(
    {
        _reversed: 4,
        _swapped: 5,
        _doubled: 3,
        _replaced: 5,
        _between: 3,
        _dropped: 5,
        _sorted: 4,
        _opposites: 4,
        _plurals: 4,
        _pasts: 4,
        _nexts: 4,
        _sounds: 3,
        _kinds: 4,
        _counting: 1,
        _echoed: 2,
        _story: 3,
    }
)


def documents(rng: random.Random) -> Iterator[str]:
    """Yield documents of one to three parts, without end."""
    kinds, weights = tuple(_SENTENCES), tuple(_SENTENCES.values())
    while True:
        parts = rng.choices(kinds, weights, k=rng.choice((1, 2, 3)))
        yield " ".join(part(rng) for part in parts)
