"""The writing half of the codec, and the grammar of its JSON tree.

Null, booleans, whole numbers, finite floats, text and lists stand for themselves. Everything else
is an object with one key::

    f  float that is not finite   b  bytes, hexadecimal         t  tuple
    m  dict with text keys only   d  other dict: [keys, values] c  Counter: [keys, values]
    q  deque: [maxlen, items]     s  set, sorted                z  frozenset, sorted
    e  enumeration: [class, name] o  dataclass: [class, values] r  object seen before: number
    a  adapter: checksum          x  tensor: checksum

Objects that have an identity worth keeping (lists, dicts, counters, deques, sets, dataclasses,
tensors) are numbered from 0 in the order in which they begin; ``r`` refers to that number.
Adapters never change, so equal adapters may become one. Tensors may: each stays its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.errors import JournalError

_PLAIN = frozenset({type(None), bool, int, str})


def field_names(cls: type) -> tuple[str, ...]:
    """Names of the fields a dataclass is made from, in order; none for an enumeration."""
    return tuple(field.name for field in fields(cls) if field.init) if is_dataclass(cls) else ()


@lru_cache(maxsize=256)
def derives_fields(cls: type) -> bool:
    """Whether a dataclass works out fields of its own from those it is made from."""
    return is_dataclass(cls) and not all(field.init for field in fields(cls))


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and the exact bits, as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Encoder:
    """Takes one state apart; used once.

    Attributes:
        adapters: adapters met, by checksum.
        tensors: other tensors met, by checksum.
        fields: field names of each class met, by its registered name.
    """

    def __init__(self, names: Mapping[type, str]) -> None:
        """Know which classes may be written, and by what names."""
        self.adapters: dict[str, Adapter] = {}
        self.tensors: dict[str, Tensor] = {}
        self.fields: dict[str, list[str]] = {}
        self._names = names
        self._numbers: dict[int, int] = {}
        self._unfinished: set[int] = set()
        self._path: list[str] = []
        self._cached: dict[type, frozenset[str]] = {}
        self._writers: dict[type, Callable[[Any], Any]] = {
            bytes: lambda value: {"b": value.hex()},
            tuple: lambda value: {"t": self._items(value)},
            frozenset: lambda value: {"z": self._items(_ordered(value))},
            Adapter: self._adapter,
        }
        self._shared: dict[type, Callable[[Any], Any]] = {
            list: self._items,
            dict: self._dict,
            Counter: lambda value: {"c": self._columns(value)},
            deque: lambda value: {"q": [value.maxlen, self._items(value)]},
            set: lambda value: {"s": self._items(_ordered(value))},
            Tensor: self._tensor,
        }
        for cls in names:
            if issubclass(cls, Enum):
                self._writers[cls] = self._enum
            else:
                self._shared[cls] = self._dataclass

    def encode(self, value: Any) -> Any:
        """Return the JSON tree of a value.

        Raises:
            JournalError: an object of unknown type, or one that contains itself.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"f": repr(value)}
        write = self._writers.get(kind)
        if write is not None:
            return write(value)
        write = self._shared.get(kind)
        if write is None:
            raise self._error(
                f"is a {kind.__module__}.{kind.__qualname__}, which is not registered"
            )
        number = self._numbers.get(id(value))
        if number is not None:
            if number in self._unfinished:
                raise self._error("contains itself")
            return {"r": number}
        number = self._numbers[id(value)] = len(self._numbers)
        self._unfinished.add(number)
        tree = write(value)
        self._unfinished.discard(number)
        return tree

    def _items(self, values: Iterable[Any], labels: Iterable[str] | None = None) -> list[Any]:
        items = list(values)
        if set(map(type, items)) <= _PLAIN:
            return items
        trees = []
        for label, item in zip(labels or _indices(), items, strict=False):
            self._path.append(label)
            trees.append(self.encode(item))
            self._path.pop()
        return trees

    def _dict(self, value: dict[Any, Any]) -> dict[str, Any]:
        if set(map(type, value)) <= {str}:
            return {"m": dict(zip(value, self._items(value.values(), _keys(value)), strict=True))}
        return {"d": self._columns(value)}

    def _columns(self, value: Mapping[Any, Any]) -> list[list[Any]]:
        return [self._items(value), self._items(value.values(), _keys(value))]

    def _enum(self, value: Enum) -> dict[str, Any]:
        name = self._names[type(value)]
        self.fields.setdefault(name, [])
        return {"e": [name, value.name]}

    def _dataclass(self, value: Any) -> dict[str, Any]:
        cls = type(value)
        name = self._names[cls]
        names = self.fields.get(name)
        if names is None:
            names = self.fields[name] = list(field_names(cls))
            self._cached[cls] = _cached_names(cls)
        # What is not a field would be lost: only a cached property can be made again.
        if extra := getattr(value, "__dict__", {}).keys() - names - self._cached[cls]:
            raise self._error(f"({name}) keeps {sorted(extra)[0]!r}, which is not a field")
        values = [getattr(value, field) for field in names]
        return {"o": [name, self._items(values, (f".{field}" for field in names))]}

    def _adapter(self, value: Adapter) -> dict[str, str]:
        self.adapters.setdefault(value.checksum, value)
        return {"a": value.checksum}

    def _tensor(self, value: Tensor) -> dict[str, str]:
        if value.requires_grad or value.layout is not torch.strided:
            raise self._error("is a tensor with a gradient or a sparse layout; detach it")
        checksum = tensor_checksum(value)
        self.tensors.setdefault(checksum, value)
        return {"x": checksum}

    def _error(self, problem: str) -> JournalError:
        path = "state" + "".join(self._path)
        return JournalError(
            f"{path} {problem}; saved state holds plain containers, numbers, text, tensors,"
            " adapters and registered classes",
            path=path,
        )


def _indices() -> Iterable[str]:
    return (f"[{index}]" for index in count())


def _keys(value: Mapping[Any, Any]) -> Iterable[str]:
    return (f"[{key!r}]" for key in value)


def _ordered(values: Iterable[Any]) -> list[Any]:
    """Sets have no order of their own to keep, but equal states must give equal text."""
    items = list(values)
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=lambda item: (type(item).__name__, repr(item)))


def _cached_names(cls: type) -> frozenset[str]:
    return frozenset(
        name
        for base in cls.__mro__
        for name, member in vars(base).items()
        if isinstance(member, cached_property)
    )
