"""A study's directory: what is where, whose it is, and which results in it still count."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.config import Recipe
from alignfed.errors import JournalError
from alignfed.journal import write_summary, write_text_atomically
from alignfed.journal.lock import DirectoryLock
from alignfed.version import __version__

FORMAT = 1
"""Version of the directory's layout."""


@dataclass(frozen=True, slots=True)
class StudyDirectory:
    """Names of what a study's directory holds.

    Attributes:
        root: the directory itself.
    """

    root: Path

    @property
    def identity(self) -> Path:
        """What the study is (JSON)."""
        return self.root / "study.json"

    @property
    def recipe(self) -> Path:
        """The recipe as resolved (TOML)."""
        return self.root / "recipe.toml"

    @property
    def lock(self) -> Path:
        """The file that carries the running process's lock."""
        return self.root / "study.lock"

    def environment(self, key: str) -> Path:
        """Folder of an environment: device trace and facts."""
        return self.root / "environments" / key

    def run(self, key: str) -> Path:
        """Folder of a run, an ordinary one."""
        return self.root / "runs" / key


def open_study(root: Path, kind: str, recipe: Recipe) -> tuple[StudyDirectory, DirectoryLock]:
    """Begin a study in a directory, or go on with it; return the directory, and its lock, held.

    Strategies and seeds may differ from the earlier part's: what is there already counts.

    Raises:
        JournalError: the directory holds something else, is in use, or cannot be written.
    """
    place = StudyDirectory(root)
    wanted = _identity(kind, recipe)
    if root.exists() and not root.is_dir():
        raise JournalError(f"{root} is a file; name a folder with --out", path=str(root))
    known = {place.lock.name, f"{place.identity.name}.tmp", f"{place.recipe.name}.tmp"}
    if not place.identity.exists():
        other = [one.name for one in root.iterdir()] if root.exists() else []
        strange = sorted(set(other) - known - {place.recipe.name})
        if strange or (place.recipe.name in other and not place.lock.exists()):
            raise JournalError(
                f"{root} holds something that is no study ({', '.join(strange[:3] or other)});"
                " choose another folder with --out",
                path=str(root),
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(
            f"the study's folder {root} cannot be made: {error}; choose another with --out",
            path=str(root),
        ) from error
    lock = DirectoryLock(place.lock)
    try:
        if place.identity.exists():
            _require_same(place, wanted)
        else:
            write_text_atomically(place.recipe, recipe.to_toml())
            write_summary(place.identity, wanted)
    except BaseException:
        lock.release()
        raise
    return place, lock


def digest_of(*parts: str) -> str:
    """Return the SHA-256 of texts and of this version, which may compute otherwise than another."""
    found = hashlib.sha256()
    for part in (__version__, *parts):
        found.update(hashlib.sha256(part.encode()).digest())
    return found.hexdigest()


def _identity(kind: str, recipe: Recipe) -> dict[str, Any]:
    # Which seeds are reported is no part of what any run is.
    section = recipe.compare.model_copy(update={"seeds": ()})
    text = recipe.model_copy(update={"compare": section}).to_toml()
    return {
        "format": FORMAT,
        "kind": kind,
        "alignfed_version": __version__,
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _require_same(place: StudyDirectory, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(place.identity.read_text(encoding="utf-8"))
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise JournalError(
            f"{place.identity} cannot be read: {error}; choose another folder with --out",
            path=str(place.identity),
        ) from error
    if differing:
        words = {
            "format": "of another layout",
            "kind": f"made by `alignfed {found.get('kind')}`",
            "alignfed_version": f"made by AlignFed {found.get('alignfed_version')}",
            "recipe": f"of recipe {found.get('recipe')!r}",
            "recipe_sha256": f"of other settings of recipe {found.get('recipe')!r}, see"
            f" {place.recipe}",
        }
        raise JournalError(
            f"{place.root} holds another study, {words[differing[0]]}; choose another folder with"
            " --out, or delete it",
            path=str(place.root),
        )
