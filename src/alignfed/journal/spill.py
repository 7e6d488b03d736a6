"""Uploads that wait on disk instead of in memory.

A buffer that a rule must hold whole may be larger than the server's memory. Its adapters are mapped
from files that have no name any more: the system reads pages as they are needed, drops them when
memory is short, and frees the space when nobody refers to the adapter, or when the process dies.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from alignfed.core.adapter import Adapter
from alignfed.journal.atomic import disk_errors


def spilled(adapter: Adapter, folder: Path) -> Adapter:
    """Return the same adapter, its buffers mapped from files in ``folder``; not to be written to.

    Raises:
        JournalError: the folder cannot be made or the disk is full.
    """
    buffers = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for dtype, buffer in adapter.buffers.items():
            count = buffer.numel()
            if count == 0:
                buffers[dtype] = buffer
                continue
            with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-") as file:
                # Written first and mapped then: a full disk is an error here, not a signal later.
                file.write(buffer.cpu().contiguous().view(torch.uint8).numpy().data)
                file.flush()
                buffers[dtype] = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    return Adapter(adapter.layout, buffers)
