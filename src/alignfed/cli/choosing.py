"""What commands that take a recipe have in common: its arguments, reading it, where a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from alignfed.config import Recipe

RecipeArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE.toml", help="The recipe; the built-in one if none is given."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one key of the recipe, as in [b]lora.rank=4[/b]; "
        "[b]KEY=unset[/b] removes it. May be given again and again.",
    ),
]


def chosen_recipe(path: Path | None, overrides: Sequence[str] | None) -> Recipe:
    """Return the recipe in a file, or the built-in one, with some keys replaced.

    Raises:
        RecipeError: what the recipe or a replacement says does not hold.
    """
    from alignfed.config import default_recipe, load_recipe

    changes = list(overrides or [])
    return default_recipe(changes) if path is None else load_recipe(path, changes)


def new_directory(name: str) -> Path:
    """Return the first of ``runs/name``, ``runs/name-2``, ... that does not exist."""
    number, directory = 1, Path("runs") / name
    while directory.exists():
        number += 1
        directory = Path("runs") / f"{name}-{number}"
    return directory
