"""Who holds what: clients, the common evaluation set and the calibration set, disjoint by content.

Content is the prompt and response (for a classifier, the text) with case, Unicode form and white
space normalised. Where the same content would fall on two sides, evaluation keeps it before
calibration, calibration before a client's held-out slice, and that before anybody's training data;
what is removed is counted. The calibration set is drawn from the pool before it is dealt, or, where
the clients come as files of their own, from the evaluation set, whose examples it takes away.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alignfed.errors import DataError
from alignfed.training.templates import Example


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Where the records are and how much of them goes where.

    Attributes:
        path: a file, a folder, or a data set's name on the hub.
        train: in a folder, the name or glob of the files that make up the pool.
        clients: in a folder, the glob of the files that are one client each.
        evaluation: name or glob of the evaluation files in the folder, a path, or a hub split.
        subset: the hub data set's configuration.
        split: the hub split that makes up the pool.
        label_column: a classifier's label column.
        label_names: the classes in order; None takes all that occur, sorted.
        explode: a column of lists of which each item becomes an example.
        evaluation_fraction: share of the pool (or of each client's file) that is evaluated on,
            where ``evaluation`` names nothing.
        evaluation_examples: at most so many examples in the evaluation set.
        calibration_examples: examples in the server's calibration set; 0 for none.
        held_out_fraction: share of each client's examples kept for its own results.
        held_out_examples: at most so many in each of those slices.
        max_examples_per_client: at most so many a client, its held-out slice included.
        seed: seed of every choice made here (the deal has its own).

    Raises:
        DataError: a value outside its range.
    """

    path: str = ""
    train: str | None = None
    clients: str | None = None
    evaluation: str | None = None
    subset: str | None = None
    split: str = "train"
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    explode: str | None = None
    evaluation_fraction: float = 0.1
    evaluation_examples: int | None = None
    calibration_examples: int = 32
    held_out_fraction: float = 0.1
    held_out_examples: int | None = None
    max_examples_per_client: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check each value against its range."""
        for name in ("evaluation_fraction", "held_out_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"data {name} is {getattr(self, name)}, must be in [0, 1)")
        for name, least in (
            ("evaluation_examples", 1),
            ("calibration_examples", 0),
            ("held_out_examples", 1),
            ("max_examples_per_client", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"data {name} is {value}, must be at least {least}")
        if self.label_names is not None and len(set(self.label_names)) < 2:
            raise DataError(f"data label_names {self.label_names} must hold two different names")


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's examples: what it trains on, and the slice kept for its own results."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(frozen=True)
class FederatedData:
    """All examples of a run, by who holds them.

    Attributes:
        clients: by client id, 0 upwards.
        evaluation: the common evaluation set.
        calibration: the server's own examples, never trained on and never reported on.
        label_names: a classifier's classes in order; empty otherwise.
        removed: client examples removed because evaluation, calibration or a held-out slice
            holds the same content.
        evaluation_source: where the evaluation set came from, in words.
        calibration_source: where the calibration set came from, in words.
    """

    clients: Mapping[int, ClientData]
    evaluation: tuple[Example, ...]
    calibration: tuple[Example, ...]
    label_names: tuple[str, ...] = ()
    removed: int = 0
    evaluation_source: str = ""
    calibration_source: str = ""


def content_key(example: Example) -> bytes:
    """Return a digest of what an example says, whatever its case, Unicode form and spacing.

    For a classifier (a label is set) the text alone counts, for a language model prompt and
    response.
    """
    texts = (example.prompt,) if example.label >= 0 else (example.prompt, example.response)
    plain = "\x1f".join(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts
    )
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def check_disjoint(data: FederatedData) -> None:
    """Refuse data in which two sides that must not overlap share content.

    Raises:
        DataError: evaluation, calibration and the clients' examples are not disjoint, or
            something in a held-out slice is trained on.
    """
    evaluation, calibration = content_keys(data.evaluation), content_keys(data.calibration)
    held_out = {key for client in data.clients.values() for key in content_keys(client.held_out)}
    _refuse_overlap("the evaluation set", evaluation, "the calibration set", calibration)
    for client_id, client in data.clients.items():
        name = f"client {client_id} ({client.name})"
        train = content_keys(client.train)
        for kept, keys in (
            ("the evaluation set", evaluation),
            ("the calibration set", calibration),
        ):
            _refuse_overlap(kept, keys, f"{name}", train | content_keys(client.held_out))
        _refuse_overlap("a held-out slice", held_out, f"the training data of {name}", train)


def content_keys(examples: Iterable[Example]) -> set[bytes]:
    """Return the digests of what examples say (see :func:`content_key`)."""
    return {content_key(example) for example in examples}


def _refuse_overlap(first: str, keys: set[bytes], other: str, others: set[bytes]) -> None:
    if shared := len(keys & others):
        raise DataError(f"{first} and {other} share {shared} examples", shared=shared)
