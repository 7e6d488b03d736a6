"""The words of the built-in language. Nothing here draws or decides: tables only.

Every word is one token of the built-in tokenizer. Pairs are (word, what it maps to), and no word
maps to itself, so that copying the input is never a right answer.
"""

from itertools import pairwise
from types import MappingProxyType
from typing import Final

ANIMAL_SOUNDS: Final = MappingProxyType(
    {
        "cow": "moo",
        "dog": "woof",
        "cat": "meow",
        "duck": "quack",
        "sheep": "baa",
        "pig": "oink",
        "horse": "neigh",
        "frog": "croak",
        "bee": "buzz",
        "snake": "hiss",
        "lion": "roar",
        "mouse": "squeak",
        "owl": "hoot",
        "crow": "caw",
        "hen": "cluck",
        "bird": "tweet",
        "wolf": "howl",
        "bear": "growl",
    }
)

KINDS: Final = MappingProxyType(
    {
        "fruit": ("apple", "pear", "plum", "peach", "lemon", "grape"),
        "tool": ("hammer", "broom", "drill", "shovel", "rake", "axe"),
        "vehicle": ("car", "truck", "train", "boat", "bus", "ship"),
        "clothing": ("hat", "coat", "shirt", "sock", "scarf", "shoe"),
        "furniture": ("table", "chair", "bed", "desk", "lamp", "shelf"),
        "plant": ("tree", "rose", "bush", "flower", "weed", "vine"),
        "toy": ("ball", "doll", "kite", "puzzle", "drum", "balloon"),
        "dish": ("cup", "plate", "bowl", "fork", "spoon", "pot"),
    }
)

_IRREGULAR_PLURALS: Final = MappingProxyType(
    {
        "mouse": "mice",
        "wolf": "wolves",
        "shelf": "shelves",
        "scarf": "scarves",
        "bus": "buses",
        "bush": "bushes",
        "peach": "peaches",
    }
)
_NO_PLURAL: Final = ("sheep",)  # the plural would be the word itself
PLURALS: Final = MappingProxyType(
    {
        **{
            noun: f"{noun}s"
            for noun in (*ANIMAL_SOUNDS, *(thing for things in KINDS.values() for thing in things))
            if noun not in _IRREGULAR_PLURALS and noun not in _NO_PLURAL
        },
        **_IRREGULAR_PLURALS,
    }
)
NOUNS: Final = tuple(PLURALS)

OPPOSITES: Final = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("wet", "dry"),
    ("full", "empty"),
    ("hard", "soft"),
    ("high", "low"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("light", "dark"),
    ("strong", "weak"),
    ("happy", "sad"),
    ("clean", "dirty"),
    ("near", "far"),
    ("open", "shut"),
    ("thick", "thin"),
    ("early", "late"),
    ("good", "bad"),
    ("long", "short"),
)

PASTS: Final = MappingProxyType(
    {
        "walk": "walked",
        "jump": "jumped",
        "look": "looked",
        "play": "played",
        "work": "worked",
        "cook": "cooked",
        "dance": "danced",
        "laugh": "laughed",
        "call": "called",
        "wait": "waited",
        "go": "went",
        "see": "saw",
        "sing": "sang",
        "run": "ran",
        "eat": "ate",
        "drink": "drank",
        "sleep": "slept",
        "write": "wrote",
        "swim": "swam",
        "sit": "sat",
        "stand": "stood",
        "fall": "fell",
        "speak": "spoke",
        "come": "came",
    }
)

NUMBERS: Final = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
)
DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS: Final = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)

NAMES: Final = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo", "ida", "jonas")
PLACES: Final = ("house", "garden", "market", "river", "forest", "school", "field", "hill")
COLOURS: Final = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")

KIND_OF: Final = MappingProxyType({word: kind for kind, words in KINDS.items() for word in words})
OPPOSITE_OF: Final = MappingProxyType(
    {**dict(OPPOSITES), **{second: first for first, second in OPPOSITES}}
)
NEXT_OF: Final = MappingProxyType(
    {
        **dict(pairwise(NUMBERS)),
        **dict(zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)),
        **dict(zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)),
    }
)
