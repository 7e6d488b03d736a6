"""What every section of a recipe has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alignfed.config.words import ALLOWED

PATH = "path"
"""Key in a field's ``json_schema_extra`` that marks a path to resolve."""

SUGGESTED = "suggested"
"""Key for a value to show in a commented recipe where the field has no default."""

BUILTIN = "builtin"
"""The path of the model and of the corpus that travel with the package."""


class Section(BaseModel):
    """A part of a recipe: frozen, every key known, no value converted to another type."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


class UnfitError(ValueError):
    """Values that are each allowed but do not fit together.

    Attributes:
        problems: ``(path, sentence)`` pairs; a path is relative to the section that found it.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        """Keep the problems; pydantic carries the exception to whoever reports it."""
        super().__init__("; ".join(f"{path}: {sentence}" for path, sentence in problems))
        self.problems = problems


def key(
    default: Any,
    description: str,
    *,
    allowed: str | None = None,
    path: bool = False,
    suggested: Any = None,
    **limits: Any,
) -> Any:
    """Return a field with its default, its meaning and its limits.

    Args:
        default: the value of a key that is left out; None means unset.
        description: one line, with the unit where there is one.
        allowed: what it accepts in words, where type and limits do not say it all.
        path: whether it names a file or folder, to be resolved.
        suggested: a value to show where the default is unset.
        **limits: ``ge``, ``gt``, ``le``, ``lt``, ``min_length``, ``pattern``.
    """
    extra: dict[str, Any] = {}
    if allowed is not None:
        extra[ALLOWED] = allowed
    if path:
        extra[PATH] = True
    if suggested is not None:
        extra[SUGGESTED] = suggested
    return Field(default, description=description, json_schema_extra=extra or None, **limits)


def table(section: type[Section], description: str) -> Any:
    """Return a field that holds a section, filled with defaults where it is left out."""
    return Field(default_factory=section, description=description)
