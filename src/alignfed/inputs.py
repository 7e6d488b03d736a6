"""What a run reads from outside: fingerprints, so that a change between kill and resume is seen.

A file up to 64 MiB is hashed whole; of a larger one 64 pieces of a MiB at even distances, with its
size, which tells any two checkpoints of a model apart without reading gigabytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from alignfed.build import Simulation
from alignfed.config import Recipe
from alignfed.config.section import BUILTIN
from alignfed.errors import JournalError
from alignfed.training.data import content_key

_PIECE = 1 << 20
_PIECES = 64


def fingerprint_files(recipe: Recipe) -> dict[str, str]:
    """Return a fingerprint of every local file that a recipe makes a run read, by its path."""
    found: dict[str, str] = {}
    for path in _named(recipe):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found.update((str(file), fingerprint(file)) for file in files if file.is_file())
    return found


CONTENT = "the examples"
"""Name under which the content of all examples is kept, wherever they came from."""


def fingerprint_examples(simulation: Simulation) -> str:
    """Return a digest of who holds what."""
    data, digest = simulation.data, hashlib.sha256()
    sides = [data.evaluation, data.calibration]
    sides += [side for client in data.clients.values() for side in (client.train, client.held_out)]
    for side in sides:
        digest.update(len(side).to_bytes(8, "little"))
        for example in side:
            digest.update(content_key(example))
            digest.update(str(example.label).encode())
    return digest.hexdigest()


def refuse_changes(before: str, now: Mapping[str, str], root: Path) -> None:
    """Refuse to go on where something differs from what the run began with.

    Args:
        before: what the run's metadata hold: JSON of fingerprints.
        now: fingerprints now; names that are not among them are not compared.
        root: the run's directory.

    Raises:
        JournalError: naming what changed, is missing, or is new.
    """
    known: dict[str, str] = json.loads(before)
    if not known:  # begun by something that kept none
        return
    # Files are compared before anything is loaded, and the examples once they are.
    expected = known if CONTENT in now else {k: v for k, v in known.items() if k != CONTENT}
    for name in sorted(now.keys() | expected.keys(), key=lambda name: (name == CONTENT, name)):
        if known.get(name) == now.get(name):
            continue
        what = "is missing" if name not in now else "is new"
        if name in now and name in known:
            what = "has changed"
        raise JournalError(
            f"{name} {what} since {root} was begun, and going on would give neither run; put it"
            " back as it was, or begin a new run in another directory",
            path=name,
        )


def _named(recipe: Recipe) -> list[Path]:
    data, fleet = recipe.data, recipe.fleet
    names = [fleet.file, fleet.bandwidth, fleet.replay, recipe.lora.warm_start]
    names += [recipe.model.path if recipe.model.path != BUILTIN else None]
    if data.path != BUILTIN:
        names.append(data.path)
        names.append(data.evaluation)
    names += [recipe.deploy.evaluation, recipe.deploy.calibration]
    paths = [Path(name).expanduser() for name in names if name]
    return [path for path in paths if path.exists()]


def fingerprint(path: Path) -> str:
    """Return a file's fingerprint: its size and a digest.

    Raises:
        JournalError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if size <= _PIECE * _PIECES:
                for piece in iter(lambda: file.read(_PIECE), b""):
                    digest.update(piece)
            else:
                for number in range(_PIECES):
                    file.seek(number * (size - _PIECE) // (_PIECES - 1))
                    digest.update(file.read(_PIECE))
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}", path=str(path)) from error
    return f"{size} {digest.hexdigest()}"
