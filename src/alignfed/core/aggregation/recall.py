"""AlignFed's memory: what absent clients last said, as one direction in the space of factors.

A step that hears only the buffer pulls the model towards whoever reported last. The mean of the
other clients' last updates is what the fleet agreed on lately, and pulls it back (CA2FL and ACE
use the same cache, see ``memory.py``). Here it is bounded: the ``capacity`` clients heard from
most recently, one update each in bf16 unless the rule says otherwise, and their sum in fp32. An
update is kept as it was applied, carried to the version that applied it, and it is replayed on the
current factors, whatever the LoRA rule. Updates that were cut or damped are not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, difference, linear_combination, zeros_like
from alignfed.core.aggregation.held import Pair
from alignfed.core.lora import space_of
from alignfed.core.ports import Flush

Buffers = tuple[Tensor, ...]
"""A factor-wise difference: one flat buffer for each dtype of the adapter's layout, in order."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What is remembered of clients.

    Attributes:
        latest: by client, its last update; whoever reported longest ago comes first.
        total: their sum, fp32; empty while nothing is remembered.
    """

    latest: Mapping[int, Buffers] = field(default_factory=dict)
    total: Buffers = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all remembered updates and their sum."""
        kept = (*self.latest.values(), self.total)
        return sum(part.numel() * part.element_size() for buffers in kept for part in buffers)


def absent_mean(
    recall: Recall, present: Collection[int], clients: int, like: Adapter
) -> Adapter | None:
    """Return ``(1 / clients)`` times the sum of the last updates of remembered, absent clients.

    Args:
        recall: what is remembered.
        present: clients whose new updates are being applied.
        clients: what to divide by: the number of clients, remembered or not.
        like: an adapter of the layout wanted.

    Returns:
        None where no absent client is remembered, or only in another layout.
    """
    if not _fits(recall, like) or not recall.latest.keys() - present:
        return None
    buffers = {}
    for place, dtype in enumerate(like.layout.sizes):
        total = recall.total[place].clone()
        for client_id in sorted(recall.latest.keys() & set(present)):
            total.sub_(recall.latest[client_id][place])
        buffers[dtype] = total.div_(clients).to(dtype)
    return Adapter(like.layout, buffers)


def remember(
    recall: Recall, deltas: Mapping[int, Adapter], capacity: int, dtype: torch.dtype
) -> Recall:
    """Return a memory in which these updates have taken the place of their clients' earlier ones.

    Args:
        recall: what was remembered; not changed.
        deltas: by client, the update that was applied, of one layout.
        capacity: clients to remember at most; those heard from longest ago are forgotten.
        dtype: how updates are kept.
    """
    if not deltas:
        return recall
    first = next(iter(deltas.values()))
    if not _fits(recall, first):
        recall = Recall()
    sizes = first.layout.sizes
    latest = dict(recall.latest)
    total = [part.clone() for part in recall.total] or [
        torch.zeros(count, dtype=torch.float32) for count in sizes.values()
    ]

    def forget(client_id: int) -> None:
        for part, old in zip(total, latest.pop(client_id), strict=True):
            part.sub_(old)  # what was added, to the digit: it was rounded before

    for client_id in sorted(deltas):
        if client_id in latest:
            forget(client_id)
        kept = tuple(deltas[client_id].buffers[one].to(dtype) for one in sizes)
        for part, new in zip(total, kept, strict=True):
            part.add_(new)
        latest[client_id] = kept
        if len(latest) > capacity:
            forget(next(iter(latest)))
    return Recall(latest, tuple(total))


def absent_pair(recall: Recall, flush: Flush, space: str, origin: Adapter | None) -> Pair | None:
    """Return ``absent_mean`` as a pair to be added like an update's, replayed on the current.

    Args:
        recall: what is remembered.
        flush: says who is present.
        space: where angles are measured.
        origin: the zero adapter that is the base of differences in this flush, if there are any.
    """
    present = {entry.client_id for entry in flush.updates}
    mean = absent_mean(recall, present, flush.clients, flush.adapter)
    if mean is None:
        return None
    if space == "factor" and space_of(flush.lora) == "factor":
        return mean, origin or zeros_like(mean)
    return linear_combination([(1.0, flush.adapter), (1.0, mean)]), flush.adapter


def remember_flush(
    recall: Recall,
    flush: Flush,
    pairs: Sequence[Pair],
    cuts: Sequence[float],
    capacity: int,
    dtype: torch.dtype,
) -> Recall:
    """Return a memory with every update of a flush that was not cut, of each client the newest.

    Updates of another layout than the server's are not remembered.

    Args:
        recall: what was remembered; not changed.
        flush: says whose the updates are.
        pairs: the updates as they were applied, and their bases.
        cuts: what each was multiplied by.
        capacity: see ``remember``.
        dtype: see ``remember``.
    """
    layout, tasks, deltas = flush.adapter.layout, dict[int, int](), dict[int, Adapter]()
    for entry, (update, base), cut in zip(flush.updates, pairs, cuts, strict=True):
        fits = update.layout == layout and base.layout == layout
        if cut < 1.0 or not fits or tasks.get(entry.client_id, -1) > entry.task_id:
            continue
        tasks[entry.client_id] = entry.task_id
        deltas[entry.client_id] = difference(update, base)
    return remember(recall, deltas, capacity, dtype)


def _fits(recall: Recall, adapter: Adapter) -> bool:
    return [part.numel() for part in recall.total] == list(adapter.layout.sizes.values())
