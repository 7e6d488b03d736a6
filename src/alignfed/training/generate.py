"""Greedy generation in big batches with a key-value cache. Nothing here samples.

Prompts are padded on the left, so that every row's next token comes at the same place; filler is
masked and does not count in the positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignfed.training.batches import length_batches
from alignfed.training.encoding import Integers, Sequences
from alignfed.training.models import BaseModel


def generate(
    base: BaseModel, prompts: Sequences, max_new_tokens: int, tokens_per_batch: int
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, without the token that ended it.

    Args:
        base: with the adapter installed.
        prompts: what to continue.
        max_new_tokens: longest continuation.
        tokens_per_batch: at most so many tokens, filler and continuation included, in a batch.
    """
    continued: list[list[int]] = [[] for _ in range(len(prompts))]
    for rows in length_batches(prompts.lengths + max_new_tokens, tokens_per_batch):
        for row, tokens in zip(
            rows, _generate_batch(base, prompts, rows, max_new_tokens), strict=True
        ):
            continued[int(row)] = tokens
    return continued


def _generate_batch(
    base: BaseModel, prompts: Sequences, rows: Integers, max_new_tokens: int
) -> list[list[int]]:
    model = base.peft_model.get_base_model()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    ids, mask = _left_padded(prompts, rows, base.pad_id)
    ids, mask = ids.to(base.device), mask.to(base.device)
    stops = torch.tensor(sorted(base.stop_ids), device=base.device)
    running = torch.ones(len(rows), dtype=torch.bool, device=base.device)
    generated: list[Tensor] = []
    cache = None
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    base.tap.select = _last_position
    try:
        with torch.no_grad(), base.autocast():
            while len(generated) < max_new_tokens:
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    **({"position_ids": positions} if takes_positions else {}),
                )
                cache = output.past_key_values
                token = output.logits[:, -1].argmax(dim=-1)
                generated.append(token)
                running &= ~torch.isin(token, stops)
                if not running.any():
                    break
                ids = token.unsqueeze(1)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                positions = positions[:, -1:] + 1
    finally:
        base.tap.select = base.tap.features = None
    return [_until(row, base.stop_ids) for row in torch.stack(generated, dim=1).tolist()]


def _last_position(hidden: Tensor) -> Tensor:
    return hidden[:, -1:, :]


def _until(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


def _left_padded(prompts: Sequences, rows: Integers, pad_id: int) -> tuple[Tensor, Tensor]:
    length = int(prompts.lengths[rows].max())
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for place, row in enumerate(rows):
        tokens = prompts[int(row)]
        ids[place, length - len(tokens) :] = tokens
        mask[place, length - len(tokens) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
