"""``alignfed init``: the built-in recipe with a comment at every key."""

from __future__ import annotations

from pathlib import Path

from alignfed.config import Recipe, default_recipe, write_commented
from alignfed.core.aggregation import RULES
from alignfed.errors import RecipeError

OPENING = """\
A recipe: everything a run depends on. Run it with: alignfed simulate THIS-FILE

It says what the built-in recipe says, with every key there is. A line that starts with # and no
space is a key that is unset: remove the # to set it. Relative paths are looked for beside this
file first, then in the current directory."""


def starting_recipe() -> str:
    """Return the text of a commented recipe; reading it gives the built-in recipe."""
    return commented(default_recipe())


def commented(recipe: Recipe) -> str:
    """Return a recipe as TOML in which every key and every setting of its rule is explained."""
    settings = {
        setting.name: (setting.default, f"{setting.meaning} ({setting.limits})")
        for setting in RULES[recipe.strategy.rule].settings
    }
    return write_commented(recipe, OPENING, settings)


def write_starting_recipe(path: Path) -> None:
    """Write a commented recipe to a new file.

    Raises:
        RecipeError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starting_recipe())
    except FileExistsError:
        raise RecipeError(
            f"{path} exists already and is not overwritten; choose another name", path=str(path)
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error}", path=str(path)) from error
