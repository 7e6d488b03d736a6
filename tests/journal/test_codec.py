"""State survives the codec to the last bit, or is refused with its path."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter
from alignfed.core.instructions import Reject, RejectReason
from alignfed.core.update import Task, Update
from alignfed.errors import JournalError
from alignfed.journal import Codec, Encoded
from tests.core.adapters import make_adapter


class Colour(Enum):
    RED = 1
    GREEN = 2


@dataclass(slots=True)
class Node:
    name: str
    children: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Circle:
    radius: float

    def __post_init__(self) -> None:
        if self.radius > 100:
            raise ValueError("too large")

    @cached_property
    def area(self) -> float:
        return math.pi * self.radius**2


@dataclass(frozen=True, slots=True)
class Key:
    number: int
    text: str


def codec() -> Codec:
    return Codec(Node, Circle, Key, Colour)


def round_trip(value: Any) -> Any:
    return codec().decode(codec().encode(value))


def same(first: Any, other: Any) -> bool:
    """Equality that also tells types, order, NaN and signed zero."""
    if type(first) is not type(other):
        return False
    if isinstance(first, float):
        return first.hex() == other.hex()
    if isinstance(first, torch.Tensor):
        return first.dtype == other.dtype and torch.equal(first, other)
    if isinstance(first, Adapter):
        return first.checksum == other.checksum
    if isinstance(first, dict):
        return same(list(first.items()), list(other.items()))
    if isinstance(first, list | tuple | deque):
        return len(first) == len(other) and all(map(same, first, other))
    if isinstance(first, Node):
        return same([first.name, first.children], [other.name, other.children])
    return bool(first == other)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from([*Colour, *RejectReason])
)
keys = (
    st.integers()
    | st.text()
    | st.tuples(st.integers(), st.text())
    | st.builds(Key, st.integers(), st.text())
)
tensors = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.integers(0, 100), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
)
adapters = st.builds(
    make_adapter, st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.lists(inner, max_size=4).map(lambda items: deque(items, maxlen=7))
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.tuples(st.integers(), st.text()), max_size=4)
        | st.dictionaries(keys, st.integers(), max_size=4).map(Counter)
        | st.builds(Node, st.text(), st.lists(inner, max_size=3))
    )


@given(st.recursive(scalars | tensors | adapters, containers, max_leaves=12))
def test_any_state_comes_back_as_it_was(value: Any) -> None:
    assert same(round_trip(value), value)


@given(st.recursive(scalars | tensors, containers, max_leaves=12))
def test_equal_states_give_equal_text(value: Any) -> None:
    assert codec().encode(value).text == codec().encode(round_trip(value)).text


def test_one_adapter_referred_to_twice_is_stored_once_and_stays_one_object() -> None:
    adapter = make_adapter(1, dtype=torch.bfloat16)
    encoded = codec().encode({"current": adapter, "snapshots": [adapter, make_adapter(2)]})
    assert len(encoded.adapters) == 2
    found = codec().decode(encoded)
    assert found["current"] is found["snapshots"][0]
    assert found["current"] is not found["snapshots"][1]


def test_an_update_in_state_keeps_its_adapter() -> None:
    update = Update(3, 1, 0, make_adapter(1), 5, {"loss": math.inf})
    found = round_trip([update, update])
    assert found[0] is found[1]
    assert found[0].adapter.checksum == update.adapter.checksum
    assert found[0].metrics == {"loss": math.inf}
    assert round_trip(Task(1, 2, 3, 4)).deadline_s == math.inf


def test_shared_mutable_objects_stay_shared_and_equal_ones_stay_apart() -> None:
    shared: list[int] = [1]
    moments = torch.zeros(3)
    state = {"a": shared, "b": shared, "c": [1], "m": moments, "n": moments, "o": torch.zeros(3)}
    encoded = codec().encode(state)
    assert len(encoded.tensors) == 1
    found = codec().decode(encoded)
    found["a"].append(2)
    found["m"][0] = 5.0
    assert found["b"] == [1, 2] and found["c"] == [1]
    assert found["n"][0] == 5.0 and found["o"][0] == 0.0


def test_decoding_runs_no_constructor_and_keeps_cached_properties_working() -> None:
    circle = Circle(2.0)
    assert circle.area > 0
    found = round_trip(circle)
    assert found == circle and found.area == circle.area
    huge = codec().encode(circle)
    text = huge.text.replace("2.0", "200.0")
    assert codec().decode(Encoded(text, {}, {})).radius == 200.0


def test_empty_and_odd_tensors_come_back() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for tensor in (torch.zeros(0), torch.tensor(3.5), base[:, 1:3], base.t(), torch.zeros(2, 0)):
        found = round_trip(tensor)
        assert found.shape == tensor.shape and torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"rule": [1, {"memory": object()}]}, "state['rule'][1]['memory']"),
        (Node("root", [Node("leaf", [lambda: None])]), "state.children[0].children[0]"),
        ([OrderedDict(a=1)], "state[0]"),
        ({(1, "x"): deque([complex(1, 2)])}, "state[(1, 'x')][0]"),
        ([torch.nn.Parameter(torch.zeros(1))], "state[0]"),
        ((torch.zeros(2, requires_grad=True),), "state[0]"),
        ([torch.zeros(2, 2).to_sparse()], "state[0]"),
    ],
)
def test_an_unknown_type_is_refused_with_its_path(value: Any, path: str) -> None:
    with pytest.raises(JournalError) as refusal:
        codec().encode(value)
    assert refusal.value.values["path"] == path
    assert str(refusal.value).startswith(path)


def test_a_state_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append({"again": loop})
    with pytest.raises(JournalError, match=r"state\[0\]\['again'\] contains itself"):
        codec().encode(loop)


def test_an_attribute_that_is_no_field_is_refused_rather_than_lost() -> None:
    circle = Circle(1.0)
    object.__setattr__(circle, "colour", "red")
    with pytest.raises(JournalError, match="keeps 'colour', which is not a field"):
        codec().encode([circle])


def test_registering_refuses_other_classes_and_two_of_one_name() -> None:
    class Colour(StrEnum):
        BLUE = "blue"

    known = codec()
    known.register(Node, Node)
    with pytest.raises(JournalError, match="two classes are called Colour"):
        known.register(Colour)
    for cls in (int, Adapter, torch.Tensor):
        with pytest.raises(JournalError, match="cannot be registered"):
            known.register(cls)


def test_state_of_other_classes_or_fields_is_refused_before_anything_is_made() -> None:
    encoded = codec().encode(Node("a"))
    with pytest.raises(JournalError, match="needs the class Node"):
        Codec().decode(encoded)
    tree = json.loads(encoded.text)
    tree["classes"]["Node"] = ["name"]
    with pytest.raises(JournalError, match="saved Node has fields"):
        codec().decode(Encoded(json.dumps(tree), {}, {}))
    tree = json.loads(encoded.text) | {"format": 99}
    with pytest.raises(JournalError, match="format 99"):
        codec().decode(Encoded(json.dumps(tree), {}, {}))


@pytest.mark.parametrize(
    "root",
    [
        {"a": "0" * 64},
        {"x": "0" * 64},
        {"o": ["Node", ["only one"]]},
        {"o": ["Popen", []]},
        {"e": ["Node", "RED"]},
        {"e": ["Colour", "BLUE"]},
        {"r": 3},
        {"r": -1},
        {"m": {"self": {"r": 0}}},
        {"d": [[1, 2], [3]]},
        {"d": [[[1]], [3]]},
        {"q": [3]},
        {"f": "many"},
        {"b": "zz"},
        {"t": None},
        {"unknown": 1},
        {},
        {"f": "inf", "t": []},
    ],
)
def test_a_malformed_tree_is_refused(root: Any) -> None:
    tree = {"format": 1, "classes": {"Node": ["name", "children"], "Colour": []}, "root": root}
    with pytest.raises(JournalError, match="malformed"):
        codec().decode(Encoded(json.dumps(tree), {}, {}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format":1}', "[" * 100_000])
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(JournalError, match="malformed"):
        codec().decode(Encoded(text, {}, {}))


def test_the_text_is_strict_json() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    value = [math.inf, -math.inf, math.nan, -0.0, 1e-320, Reject(1, 2, RejectReason.NOT_FINITE, "")]
    json.loads(codec().encode(value).text, parse_constant=refuse)
    assert same(round_trip(value[:5]), value[:5])


def test_what_a_layout_works_out_of_itself_is_worked_out_again():
    layout = make_adapter(rank=3).layout
    encoded = Codec().encode(layout)
    assert "float32" in encoded.text and "slices" not in encoded.text
    again = Codec().decode(encoded)
    assert again == layout
    assert (again.slices, again.sizes) == (layout.slices, layout.sizes)
    assert (again.size_bytes, again.folded) == (layout.size_bytes, False)
