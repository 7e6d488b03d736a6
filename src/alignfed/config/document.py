"""Recipes as TOML text: bare for machines, commented for people. Reading gives the same recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import tomlkit
from pydantic.fields import FieldInfo

from alignfed.config.section import SUGGESTED, Section
from alignfed.config.words import allowed_words, table_of, toml_text

_WIDTH = 98


def write_recipe(recipe: Section) -> str:
    """Return every key that is set, as TOML."""
    return "\n".join(_table(recipe, (), commented=False)).strip() + "\n"


def write_commented(
    recipe: Section, opening: str, settings: Mapping[str, tuple[Any, str]] | None = None
) -> str:
    """Return a recipe with a comment at every key; what is unset stands commented out.

    Args:
        recipe: the recipe whose values are shown.
        opening: what to say on top.
        settings: for the table of the rule's settings, default and meaning by name.
    """
    head = [f"# {line}".rstrip() for line in opening.splitlines()]
    lines = [*head, "", *_table(recipe, (), commented=True, settings=settings or {})]
    return "\n".join(lines).strip() + "\n"


def _table(
    section: Section,
    path: tuple[str, ...],
    *,
    commented: bool,
    settings: Mapping[str, tuple[Any, str]] | None = None,
) -> Iterator[str]:
    fields = type(section).model_fields
    tables = [name for name in fields if _is_table(fields[name])]
    if path:
        yield f"[{'.'.join(path)}]"
    for name, field in fields.items():
        if name not in tables:
            yield from _line(name, field, getattr(section, name), commented=commented)
    yield ""
    for name in tables:
        value = getattr(section, name)
        if commented:
            yield from _comment(str(fields[name].description))
        if isinstance(value, Section):
            yield from _table(value, (*path, name), commented=commented, settings=settings)
        elif isinstance(value, dict):
            known = settings or {} if commented and name == "settings" else {}
            if commented and not (value or known):
                yield from (f"#[{'.'.join((*path, name))}]", "")
            yield from _free_table(value, (*path, name), known)
        elif commented:
            yield from _absent_table(fields[name], (*path, name))


def _line(name: str, field: FieldInfo, value: Any, *, commented: bool) -> Iterator[str]:
    if not commented:
        if value is not None:
            yield f"{name} = {_toml(value)}"
        return
    default = "unset" if field.is_required() else toml_text(field.default)
    yield from _comment(f"{field.description} ({allowed_words(field)}; default {default})")
    if value is None:
        shown = (field.json_schema_extra or {}).get(SUGGESTED)  # type: ignore[union-attr]
        yield f"#{name} = {_toml(shown)}"
    else:
        yield f"{name} = {_toml(value)}"


def _free_table(
    values: Mapping[str, Any], path: tuple[str, ...], known: Mapping[str, tuple[Any, str]]
) -> Iterator[str]:
    if not (values or known):
        return
    yield f"[{'.'.join(path)}]"
    for name, (default, meaning) in known.items():
        yield from _comment(f"{meaning}; default {toml_text(default)}")
        if name not in values:
            yield f"#{name} = {_toml(default)}"
        else:
            yield f"{name} = {_toml(values[name])}"
    for name, value in values.items():
        if name not in known:
            yield f"{name} = {_toml(value)}"
    yield ""


def _absent_table(field: FieldInfo, path: tuple[str, ...]) -> Iterator[str]:
    section = table_of(field.annotation)
    if section is None:
        return
    yield f"#[{'.'.join(path)}]"
    for name, inner in section.model_fields.items():
        suggested = (inner.json_schema_extra or {}).get(SUGGESTED)  # type: ignore[union-attr]
        shown = inner.default if suggested is None else suggested
        yield from _comment(f"{inner.description} ({allowed_words(inner)})")
        yield f"#{name} = {_toml(shown)}"
    yield ""


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False):
        yield f"# {line}"


def _is_table(field: FieldInfo) -> bool:
    return table_of(field.annotation) is not None or "dict" in str(field.annotation)


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return toml_text(value)
    return str(tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string())
