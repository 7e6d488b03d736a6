"""From pydantic's errors to sentences: the key's path, the value, what is allowed, what is near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from alignfed.config.recipe import Recipe
from alignfed.config.section import SUGGESTED, Section, UnfitError
from alignfed.config.words import allowed_words, joined, table_of, toml_text
from alignfed.errors import RecipeError
from alignfed.training.naming import nearest_name


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        path: the key, dotted; empty for the recipe as a whole.
        sentence: what is wrong and what would be right.
    """

    path: str
    sentence: str

    def __str__(self) -> str:
        """Return both on one line."""
        if not self.path:
            return self.sentence
        # A sentence about a value reads on from the key: `lora.rank = 0: must be ...`.
        glue = " " if self.sentence.startswith("= ") else ": "
        return f"{self.path}{glue}{self.sentence}"


def refusal(source: str, problems: Sequence[Problem]) -> RecipeError:
    """Return the error that lists every problem at once."""
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return RecipeError(f"{source} has {count}:{lines}", source=source, problems=tuple(problems))


def problems_of(error: ValidationError, root: type[Section] = Recipe) -> list[Problem]:
    """Return a validation's problems in the order of the keys of ``root``, each once."""
    # A value that fits no member of a union is reported once a member, always in the same words.
    entries = error.errors(include_url=False)
    every = (problem for entry in entries for problem in _translated(entry, root))
    return list(dict.fromkeys(every))


def known_paths(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key a recipe may have."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = table_of(field.annotation)
        if inner is not None and issubclass(inner, Section):
            yield from known_paths(inner, f"{prefix}{name}.")


def _translated(entry: Any, root: type[Section]) -> Iterator[Problem]:
    location = entry["loc"]
    path, field = _field_at(location, root)
    kind, value = entry["type"], entry["input"]
    unfit = entry.get("ctx", {}).get("error")
    if isinstance(unfit, UnfitError):
        for inner, sentence in unfit.problems:
            yield Problem(".".join(part for part in (path, inner) if part), sentence)
    elif kind == "extra_forbidden":
        yield Problem(_dotted(location), f"unknown key{_nearest(_dotted(location), root)}")
    elif kind == "missing" and field is not None:
        example = (field.json_schema_extra or {}).get(SUGGESTED)  # type: ignore[union-attr]
        shown = f", for example {toml_text(example)}" if example is not None else ""
        yield Problem(path, f"is missing; it must be {allowed_words(field)}{shown}")
    elif field is None:
        yield Problem(path, f"must be a table of sections, not {toml_text(value)}")
    elif table_of(field.annotation) is not None:
        yield Problem(path, f"= {toml_text(value)}: must be a table, [{path}]")
    else:
        near = ""
        if isinstance(value, str):
            near = nearest_name(value, _options(field))
        yield Problem(path, f"= {toml_text(value)}: must be {allowed_words(field)}{near}")


def _field_at(location: Sequence[int | str], root: type[Section]) -> tuple[str, FieldInfo | None]:
    """Return the longest prefix of a location that is a key, and its field.

    What follows are places inside a value or names of a union's members.
    """
    section: type[Section] | None = root
    names: list[str] = []
    field: FieldInfo | None = None
    for part in location:
        if section is None or part not in section.model_fields:
            break
        field = section.model_fields[str(part)]
        names.append(str(part))
        inner = table_of(field.annotation)
        section = inner if inner is not None and issubclass(inner, Section) else None
    return ".".join(names), field


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location)


def _nearest(path: str, root: type[Section]) -> str:
    """Return what the writer of an unknown key may have meant."""
    parent, _, name = path.rpartition(".")
    every = list(known_paths(root))
    siblings = [one for one in every if one.rpartition(".")[0] == parent]
    near = nearest_name(name, [one.rpartition(".")[2] for one in siblings])
    if near:
        prefix = f"{parent}." if parent else ""
        return near.replace("'", f"'{prefix}", 1)
    # The right name in the wrong section is the next likely slip.
    elsewhere = [one for one in every if one.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {joined([repr(one) for one in elsewhere])}?"
    near = nearest_name(path, every)
    if near:
        return near
    return f"; known here: {joined([one.rpartition('.')[2] for one in siblings], 'and')}"


def _options(field: FieldInfo) -> list[str]:
    words = allowed_words(field)
    return [part.strip('"') for part in words.removeprefix("one of ").split(", ")]
