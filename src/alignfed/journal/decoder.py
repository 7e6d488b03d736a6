"""The reading half of the codec; the grammar is described in ``encoder.py``.

Only classes that the registry knows are made. Of their code nothing is run but the
``__post_init__`` of those that work out fields of their own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.errors import JournalError
from alignfed.journal.encoder import derives_fields

_PLAIN = frozenset({type(None), bool, int, float, str})
_UNFINISHED = object()


class Decoder:
    """Puts one state together; used once."""

    def __init__(
        self,
        known: Mapping[str, tuple[type, tuple[str, ...]]],
        adapters: Mapping[str, Adapter],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Know the classes (with their fields), adapters and tensors that may be named."""
        self._known = known
        self._adapters = adapters
        self._tensors = tensors
        self._objects: list[Any] = []
        self._readers: dict[str, Callable[[Any], Any]] = {
            "f": float,
            "b": bytes.fromhex,
            "t": lambda body: tuple(self._items(body)),
            "z": lambda body: frozenset(self._items(body)),
            "e": self._enum,
            "a": lambda checksum: self._adapters[checksum],
            "r": self._reference,
        }
        self._shared: dict[str, Callable[[Any], Any]] = {
            "m": lambda body: dict(zip(body, self._items(list(body.values())), strict=True)),
            "d": self._dict,
            "c": lambda body: Counter(self._dict(body)),
            "q": lambda body: deque(self._items(body[1]), maxlen=body[0]),
            "s": lambda body: set(self._items(body)),
            "o": self._dataclass,
            "x": lambda checksum: self._tensors[checksum].clone(),
        }

    def decode_root(self, tree: Mapping[str, Any]) -> Any:
        """Return the value of a whole tree.

        Raises:
            JournalError: the tree is malformed, or names what is not there.
        """
        try:
            return self._decode(tree["root"])
        except (
            KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError
        ) as error:  # fmt: skip
            raise JournalError(
                f"saved state is malformed: {error!r}; resume from another checkpoint"
            ) from error

    def _decode(self, tree: Any) -> Any:
        kind = type(tree)
        if kind in _PLAIN:
            return tree
        if kind is list:
            return self._numbered(self._items, tree)
        ((tag, body),) = tree.items()
        read = self._readers.get(tag)
        if read is not None:
            return read(body)
        return self._numbered(self._shared[tag], body)

    def _numbered(self, read: Callable[[Any], Any], body: Any) -> Any:
        number = len(self._objects)
        self._objects.append(_UNFINISHED)
        value = self._objects[number] = read(body)
        return value

    def _items(self, trees: list[Any]) -> list[Any]:
        if set(map(type, trees)) <= _PLAIN:
            return list(trees)
        return [self._decode(tree) for tree in trees]

    def _dict(self, columns: list[list[Any]]) -> dict[Any, Any]:
        keys, values = columns
        return dict(zip(self._items(keys), self._items(values), strict=True))

    def _enum(self, body: list[str]) -> Enum:
        name, member = body
        cls = self._known[name][0]
        if not issubclass(cls, Enum):
            raise ValueError(f"{name} is not an enumeration")
        return cls[member]

    def _dataclass(self, body: list[Any]) -> Any:
        name, trees = body
        cls, names = self._known[name]
        # Fields are set as they were: a constructor could refuse or change them a second time.
        value: Any = object.__new__(cls)
        for field, item in zip(names, self._items(trees), strict=True):
            object.__setattr__(value, field, item)
        if derives_fields(cls):
            value.__post_init__()
        return value

    def _reference(self, number: int) -> Any:
        value = self._objects[number]
        if value is _UNFINISHED or number < 0:
            raise ValueError(f"object {number} refers to itself")
        return value
