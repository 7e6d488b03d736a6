"""Adapters and tensors on disk: one safetensors file each, named by the checksum of its content.

A file under its final name is complete, unless a power cut came before ``sync``; it is written
once and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignfed.core.adapter import DTYPES, Adapter, AdapterLayout, DenseShape, LoraShape, dtype_name
from alignfed.errors import AdapterError
from alignfed.journal.atomic import TEMPORARY_SUFFIX, disk_errors, sync, write_atomically
from alignfed.journal.database import DamagedError
from alignfed.journal.encoder import tensor_checksum

_SUFFIX = ".safetensors"
_T = TypeVar("_T")


class BlobStore:
    """The folder of files that a run's checkpoints refer to."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, made if missing.

        Raises:
            JournalError: it cannot be made.
        """
        with disk_errors(folder):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync(folder.parent)
        self._folder = folder
        # Only what this process wrote or verified is trusted; the rest is written again.
        self._intact: set[str] = set()
        self._unsynced: set[str] = set()
        self._layouts: dict[str, AdapterLayout] = {}

    def write(self, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
        """Put adapters and tensors on disk under their checksums; those there are skipped.

        Raises:
            JournalError: the disk is full or not writable.
        """
        for checksum, adapter in adapters.items():
            self.put_adapter(checksum, adapter)
        for checksum, tensor in tensors.items():
            self.put_tensor(checksum, tensor)
        self.sync({*adapters, *tensors})

    def put_adapter(self, checksum: str, adapter: Adapter) -> None:
        """Write an adapter that is not there; a power cut may undo it until ``sync``.

        Raises:
            JournalError: the disk is full or not writable.
            AdapterError: a dtype outside those an adapter may hold.
        """
        if checksum not in self._intact:
            buffers = {dtype_name(dtype): data for dtype, data in adapter.buffers.items()}
            self._write(checksum, buffers, {"layout": _layout_text(adapter.layout)})

    def put_tensor(self, checksum: str, tensor: Tensor) -> None:
        """Write a tensor that is not there; a power cut may undo it until ``sync``.

        Raises:
            JournalError: the disk is full or not writable.
        """
        if checksum not in self._intact:
            self._write(checksum, {"tensor": tensor}, {})

    def sync(self, checksums: Iterable[str] | None = None) -> None:
        """Force what was put to disk; all of it, or what is named.

        Raises:
            JournalError: the disk is full or fails.
        """
        wanted = self._unsynced if checksums is None else self._unsynced.intersection(checksums)
        if not wanted:
            return
        with disk_errors(self._folder):
            for checksum in wanted:
                sync(self._path(checksum))
            sync(self._folder)
        self._unsynced = self._unsynced - wanted

    def adapter(self, checksum: str) -> Adapter:
        """Read one adapter; adapters of equal layout share one layout object.

        Raises:
            DamagedError: the file is missing, truncated or altered.
        """

        def build(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
            text = metadata["layout"]
            layout = self._layouts.get(text) or _parse_layout(text)
            buffers = {DTYPES[name]: tensors[name] for name in tensors}
            adapter = Adapter(self._layouts.setdefault(text, layout), buffers)
            if adapter.checksum != checksum:
                raise ValueError(f"its content has checksum {adapter.checksum}")
            return adapter

        return self._read(checksum, build)

    def tensor(self, checksum: str) -> Tensor:
        """Read one tensor.

        Raises:
            DamagedError: the file is missing, truncated or altered.
        """

        def build(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Tensor:
            if (found := tensor_checksum(tensors["tensor"])) != checksum:
                raise ValueError(f"its content has checksum {found}")
            return tensors["tensor"]

        return self._read(checksum, build)

    def size_bytes(self, checksum: str) -> int:
        """Return the size of a file; 0 where it is missing."""
        try:
            return self._path(checksum).stat().st_size
        except OSError:
            return 0

    def collect(self, keep: Iterable[str]) -> None:
        """Delete every file that is not in ``keep``, unfinished ones included.

        Raises:
            JournalError: a file cannot be deleted.
        """
        kept = set(keep)
        with disk_errors(self._folder):
            for path in list(self._folder.iterdir()):
                finished = path.name.endswith(_SUFFIX)
                if (finished and path.stem not in kept) or path.name.endswith(TEMPORARY_SUFFIX):
                    path.unlink(missing_ok=True)
        self._intact &= kept
        self._unsynced &= kept

    def _path(self, checksum: str) -> Path:
        return self._folder / f"{checksum}{_SUFFIX}"

    def _write(self, checksum: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

        def save(path: Path) -> None:
            try:
                save_file(tensors, path, metadata)
            except SafetensorError as error:
                raise OSError(str(error)) from error

        write_atomically(self._path(checksum), save, synced=False)
        self._intact.add(checksum)
        self._unsynced.add(checksum)

    def _read(
        self, checksum: str, build: Callable[[dict[str, Tensor], Mapping[str, str]], _T]
    ) -> _T:
        path = self._path(checksum)
        try:
            with safe_open(path, framework="pt") as file:
                # Cloned, because the reader may map the file, and the file may be deleted.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                value = build(tensors, file.metadata() or {})
        except (
            OSError, SafetensorError, AdapterError, ValueError, KeyError, TypeError, RuntimeError
        ) as error:  # fmt: skip
            raise DamagedError(
                f"{path} is missing or damaged: {error}; restore it from a backup", path=str(path)
            ) from error
        self._intact.add(checksum)
        return value


def _layout_text(layout: AdapterLayout) -> str:
    return json.dumps(
        {
            "lora": [[name, *astuple(shape)] for name, shape in layout.lora],
            "dense": [[name, shape.shape, shape.dtype] for name, shape in layout.dense],
        },
        separators=(",", ":"),
    )


def _parse_layout(text: str) -> AdapterLayout:
    saved = json.loads(text)
    return AdapterLayout(
        lora=tuple((name, LoraShape(*sizes)) for name, *sizes in saved["lora"]),
        dense=tuple((name, DenseShape(tuple(s), dtype)) for name, s, dtype in saved["dense"]),
    )
