from dataclasses import fields, is_dataclass, replace

import pytest

from alignfed.core.events import ClientJoined, ClientLeft
from alignfed.core.instructions import SetTimer
from alignfed.core.update import Task


def test_values_compare_and_hash_by_what_they_hold():
    assert Task(1, 2, 3, 4) == Task(1, 2, 3, 4)
    assert hash(Task(1, 2, 3, 4)) == hash(Task(1, 2, 3, 4))
    assert Task(1, 2, 3, 4) != Task(1, 2, 3, 5)
    assert ClientJoined(0.0, 1) != ClientLeft(0.0, 1)


def test_values_are_dataclasses_that_can_be_replaced_and_listed():
    assert is_dataclass(Task)
    assert [field.name for field in fields(SetTimer)] == ["at_s"]
    assert replace(Task(1, 2, 3, 4), dispatch=9) == Task(1, 2, 3, 9)


def test_a_value_takes_no_field_it_does_not_declare():
    with pytest.raises(AttributeError):
        SetTimer(1.0).reason = "late"  # type: ignore[attr-defined]
