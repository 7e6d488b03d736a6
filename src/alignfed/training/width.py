"""How many clients to train together: what memory allows, then what a short measurement prefers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alignfed.training.architecture import Architecture

GROWTH = 1.03
"""A wider cohort must be faster by this factor, or the narrower one is kept."""

SHARE_OF_FREE_MEMORY = 0.5
"""Of what is free, so much may be planned for: the estimate is one, and others compute too."""


@dataclass(frozen=True, slots=True)
class Width:
    """A width and how it came about.

    Attributes:
        width: clients to train together.
        limit: the widest that memory and the caller allowed.
        tokens_per_s: what was measured, by width; empty where nothing was to choose.
        notes: what somebody reading the run's record should know.
    """

    width: int
    limit: int
    tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fastest(measure: Callable[[int], float | None], limit: int) -> tuple[int, dict[int, float]]:
    """Return the width to use and the tokens per second of each width tried.

    Widths 1, 2, 4 ... and ``limit`` are tried in turn, until one is no longer faster than the best
    so far by more than 3 %.

    Args:
        measure: tokens per second at a width, None where it does not fit in memory.
        limit: widest to try.
    """
    best, found = 1, {}
    width = 1
    while True:
        speed = measure(width)
        if speed is None:
            break
        found[width] = speed
        if width > 1:
            if speed <= GROWTH * found[best]:
                break
            best = width
        if width >= limit:
            break
        width = min(2 * width, limit)
    return best, found


def bytes_per_client(
    architecture: Architecture,
    *,
    tokens: int,
    targets: int,
    outputs: int,
    adapter_parameters: int,
    activation_bytes: int,
    gradient_checkpointing: bool,
) -> int:
    """Estimate what one more client in a cohort holds at its peak.

    Kept for the backward pass, counted on a Llama layer: per token about 12 vectors of the hidden
    size (norms, rotated queries and keys, values, attention's output, residuals), 5 of the
    intermediate size (both projections, the activation and its product, the backward pass's own)
    and those of keys and values; logits three times in fp32 (as computed, in log-probabilities, and
    their gradient); parameters four times (values, gradients, two moments) and once more in
    gradients on their way.

    Args:
        architecture: of the base.
        tokens: of the client's largest batch, filler included.
        targets: scored in that batch.
        outputs: classes or entries of the vocabulary.
        adapter_parameters: elements of the adapter.
        activation_bytes: bytes of one activation.
        gradient_checkpointing: whether layers keep their inputs only.
    """
    layer = 12 * architecture.hidden_size + 5 * architecture.intermediate_size
    layers = architecture.num_layers
    if gradient_checkpointing:
        per_token = layers * architecture.hidden_size + layer
    else:
        per_token = layers * layer
    return (
        tokens * per_token * activation_bytes
        + 3 * targets * outputs * 4
        + 5 * adapter_parameters * 4
    )


def free_bytes(device: torch.device) -> int | None:
    """Return the memory a device has left, None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator keeps for reuse is free for whoever asks this process.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [one for one in (_available_bytes(), _container_bytes()) if one is not None]
    return min(found) if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text
    )


def _available_bytes() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        names = os.sysconf_names
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_bytes() -> int | None:
    """Return what a control group (version 2) leaves this process, None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
