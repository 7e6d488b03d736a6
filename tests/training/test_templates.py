import pytest

from alignfed.errors import DataError
from alignfed.training.templates import TemplateSettings

ALPACA = TemplateSettings("{instruction}[[\nContext: {context}]]\nAnswer:", " {response}")


def test_optional_part_stays_where_its_column_has_text():
    record = {"instruction": "Sum up.", "context": "A long text.", "response": "Short."}
    assert ALPACA.render_prompt(record) == "Sum up.\nContext: A long text.\nAnswer:"
    assert ALPACA.render_response(record) == " Short."


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_optional_part_goes_where_its_column_is_empty(nothing):
    record = {"instruction": "Sum up.", "context": nothing, "response": "Short."}
    assert ALPACA.render_prompt(record) == "Sum up.\nAnswer:"


def test_optional_part_stays_while_any_of_its_columns_has_text():
    template = TemplateSettings("[[{a}/{b}]]x")
    assert template.render_prompt({"a": "", "b": "1"}) == "/1x"
    assert template.render_prompt({"a": "", "b": ""}) == "x"


def test_text_inside_the_data_is_never_parsed():
    record = {"instruction": "{context} [[x]]", "context": "{{y}}", "response": "]]"}
    assert ALPACA.render_prompt(record) == "{context} [[x]]\nContext: {{y}}\nAnswer:"
    assert ALPACA.render_response(record) == " ]]"


def test_numbers_are_written_and_braces_escaped():
    template = TemplateSettings("{{{n}}} {x} {flag}")
    assert template.render_prompt({"n": 3, "x": 0.5, "flag": True}) == "{3} 0.5 True"


def test_columns_are_listed_once_in_order():
    assert TemplateSettings("{a}[[{b}{a}]]", "{c}").columns == ("a", "b", "c")


@pytest.mark.parametrize(
    "text",
    ["{a", "a}", "{}", "{a!r}", "{a:3}", "{a[0]}", "[[{a}", "{a}]]", "[[x]]", "[[{a}[[{b}]]]]"],
)
def test_malformed_template_is_refused(text):
    with pytest.raises(DataError):
        TemplateSettings(text)


def test_missing_column_names_the_nearest_one():
    with pytest.raises(DataError, match=r"'instuction'.*did you mean 'instruction'") as caught:
        TemplateSettings("{instuction}").render_prompt({"instruction": "x", "response": "y"})
    assert caught.value.column == "instuction"


def test_column_of_lists_is_refused_and_explode_named():
    with pytest.raises(DataError, match="explode"):
        TemplateSettings("{lines}").render_prompt({"lines": ["a", "b"]})
