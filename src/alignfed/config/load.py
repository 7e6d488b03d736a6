"""Recipes from files: read, overridden, resolved and validated in one go, or refused in one go.

A relative path in a recipe is looked for beside the recipe first, then in the current directory;
one from ``--set`` the other way round. An evaluation file is looked for in ``data.path`` before
both. What exists is made absolute, so that a run can be resumed from anywhere; what does not is
left as it is: a name on the hub, or for the loader to refuse.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignfed.config.overrides import Override, apply_overrides, read_overrides
from alignfed.config.problems import Problem, problems_of, refusal
from alignfed.config.recipe import Recipe
from alignfed.config.section import BUILTIN, PATH, Section
from alignfed.config.words import table_of, toml_text
from alignfed.errors import RecipeError
from alignfed.training.naming import nearest_name

DEFAULT_NAME = "the built-in recipe"


def default_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """Return the built-in default, with overrides.

    Raises:
        RecipeError: an override that does not fit.
    """
    text = resources.files("alignfed").joinpath("recipes", "default.toml").read_text("utf-8")
    return _parse(text, DEFAULT_NAME, (Path.cwd(),), overrides)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, files_exist: bool = True
) -> Recipe:
    """Return the recipe in a TOML file, with overrides.

    Args:
        path: the file.
        overrides: ``key=value`` texts, applied in order.
        files_exist: refuse a recipe that names local files that are not there; who reads a recipe
            without running it may do without them.

    Raises:
        RecipeError: the file cannot be read, or the recipe has problems; all are listed.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        near = nearest_name(file.name, [one.name for one in file.parent.glob("*.toml")])
        raise RecipeError(f"recipe {file} does not exist{near}", path=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file} cannot be read: {error}", path=str(file)) from error
    folders = (file.resolve().parent, Path.cwd())
    return _parse(text, str(file), folders, overrides, files_exist=files_exist)


def make_recipe(document: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that nested mappings describe, as TOML would.

    Raises:
        RecipeError: the recipe has problems; all are listed.
    """
    return _build(document, "the recipe", (Path.cwd(),), overrides)


def _parse(
    text: str,
    source: str,
    folders: tuple[Path, ...],
    overrides: Sequence[str],
    *,
    files_exist: bool = True,
) -> Recipe:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not valid TOML: {error}", path=source) from error
    return _build(document, source, folders, overrides, files_exist=files_exist)


def _build(
    document: Mapping[str, Any],
    source: str,
    folders: tuple[Path, ...],
    overrides: Sequence[str],
    *,
    files_exist: bool = True,
) -> Recipe:
    changes, problems = read_overrides(overrides)
    merged, refused = apply_overrides(document, changes)
    problems += refused
    try:
        recipe = Recipe.model_validate(_resolved(merged, folders, changes))
    except ValidationError as error:
        problems += problems_of(error)
    else:
        problems += _missing_files(recipe) if files_exist else ()
    if problems:
        raise refusal(source, problems)
    return recipe


def _resolved(
    document: dict[str, Any], folders: tuple[Path, ...], changes: Sequence[Override]
) -> dict[str, Any]:
    from_command_line = {change.keys for change in changes}
    for keys in _path_keys():
        table: Any = document
        for name in keys[:-1]:
            table = table.get(name, {}) if isinstance(table, dict) else {}
        value = table.get(keys[-1]) if isinstance(table, dict) else None
        if isinstance(value, str) and value and value != BUILTIN:
            order = tuple(reversed(folders)) if keys in from_command_line else folders
            table[keys[-1]] = _found(value, order)
    data = document.get("data")
    if isinstance(data, dict):
        path, evaluation = data.get("path"), data.get("evaluation")
        if isinstance(path, str) and isinstance(evaluation, str) and evaluation:
            folder = Path(path).expanduser()
            order = (folder if folder.is_dir() else folder.parent, *folders)
            data["evaluation"] = _found(evaluation, order, files_only=True)
    return document


def _found(value: str, folders: Sequence[Path], *, files_only: bool = False) -> str:
    path = Path(value).expanduser()
    for folder in folders:
        candidate = folder / path
        if candidate.is_file() or (candidate.exists() and not files_only):
            return str(candidate.resolve())
    return value


def _missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Yield paths that were surely meant for something local that is not there."""
    for keys in _path_keys():
        value: Any = recipe
        for name in keys:
            value = getattr(value, name)
        if value is None or Path(value).expanduser().exists():
            continue
        if value.startswith((".", "/", "~")):
            yield Problem(
                ".".join(keys),
                f"= {toml_text(value)}: no such file or folder, neither beside the recipe nor in"
                " the current directory",
            )


def _path_keys(
    section: type[Section] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and PATH in extra:
            yield (*prefix, name)
        inner = table_of(field.annotation)
        if inner is not None and issubclass(inner, Section):
            yield from _path_keys(inner, (*prefix, name))
