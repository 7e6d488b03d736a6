from decimal import Decimal

import pytest

from alignfed.errors import DataError
from alignfed.training.scorers import exact_match, final_answer, gsm8k

REFERENCE = "She has 70 + 2 = <<70+2=72>>72 dollars.\n#### 72"


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("#### 72", True),
        ("so it is 72\n####72", True),
        ("#### $72", True),
        ("#### 72.", True),
        ("#### 72.00", True),
        ("#### 72 dollars", True),
        ("#### 0072", True),
        ("#### -72", False),
        ("#### 7", False),
        ("#### 720", False),
        ("72", False),
        ("the answer is 72", False),
        ("####", False),
        ("#### none", False),
        ("", False),
        ("#### 71\n#### 72", False),
    ],
)
def test_gsm8k_compares_the_final_answer(generated, right):
    assert gsm8k(generated, REFERENCE) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234,567", "1234567"),
        ("#### $1,000.50", "1000.5"),
        ("#### -3", "-3"),
        ("#### - 3", "-3"),
        ("#### .5", "0.5"),
        ("#### 50%", "50"),
        ("#### €12", "12"),
        ("#### 5\n6", "5"),
    ],
)
def test_final_answer_reads_numbers_as_people_write_them(text, number):
    assert final_answer(text) == Decimal(number)


def test_gsm8k_refuses_a_reference_without_final_answer():
    with pytest.raises(DataError, match="####"):
        gsm8k("#### 1", "one")


def test_exact_match_ignores_spacing_only():
    assert exact_match("  red\tand  blue\n", "red and blue")
    assert not exact_match("red and blue", "Red and blue")
    assert not exact_match("red and", "red and blue")
