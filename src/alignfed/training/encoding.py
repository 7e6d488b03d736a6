"""Text to tokens, in flat arrays. Nothing here pads or batches.

A language model's sequence is [opening token] + prompt + response + [end token]. Prompt and
response are tokenised apart, so that the prompt's tokens are the same whether or not a response
follows; only response and end token are scored. A sequence over ``max_length`` loses tokens from
the left of its prompt (the opening token stays); if the response alone is too long, it loses its
right end. A classifier's text is tokenised with the tokenizer's own special tokens and cut as the
tokenizer cuts. Examples are never packed into one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignfed.errors import DataError, ModelError
from alignfed.training.models import BaseModel
from alignfed.training.templates import Example, TemplateSettings

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """Token sequences of any lengths, end to end.

    Attributes:
        tokens: all tokens, shape ``(total,)``, 32 bits each.
        starts: where each sequence begins, and the end, shape ``(n + 1,)``.
        prompt_lengths: tokens of each that are not scored, shape ``(n,)``.
        labels: class of each, -1 where there are none, shape ``(n,)``.
    """

    tokens: npt.NDArray[np.int32]
    starts: Integers
    prompt_lengths: Integers
    labels: Integers

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.labels)

    @property
    def lengths(self) -> Integers:
        """Tokens in each sequence."""
        return np.diff(self.starts)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Return the tokens of one sequence."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def join(parts: Sequence[Sequences]) -> Sequences:
    """Return all sequences of several collections, in order."""
    starts = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum()
    return Sequences(
        np.concatenate([part.tokens for part in parts]),
        starts,
        np.concatenate([part.prompt_lengths for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


class Encoder:
    """Tokenises examples for one base model."""

    def __init__(self, base: BaseModel, template: TemplateSettings, max_length: int) -> None:
        """Check that the template and the length fit the model.

        Raises:
            ModelError: no chat template where one is asked for, or a length the model lacks.
        """
        positions = base.architecture.max_positions
        if max_length < 2:
            raise ModelError(f"max_length is {max_length}, must be at least 2")
        if positions is not None and max_length > positions:
            raise ModelError(
                f"max_length is {max_length}, but {base.settings.path} has {positions} positions",
                max_length=max_length,
                limit=positions,
            )
        if template.chat and not getattr(base.tokenizer, "chat_template", None):
            raise ModelError(
                f"chat is on, but the tokenizer of {base.settings.path} has no chat template;"
                " set chat to false and write the turns into the prompt template",
                path=base.settings.path,
            )
        if not base.is_classifier and not template.response:
            raise DataError("a language model needs a response template; there is nothing to score")
        self.base = base
        self.template = template
        self.max_length = max_length

    def encode(self, examples: Sequence[Example]) -> Sequences:
        """Return the sequences to train or score on.

        Raises:
            DataError: an example gives no token.
        """
        if self.base.is_classifier:
            return self._classified(examples)
        prompts, responses = self._texts(examples)
        pairs = zip(self._tokens(prompts), self._tokens(responses), strict=True)
        return self._pack(
            [self._cut(prompt, response) for prompt, response in pairs],
            [example.label for example in examples],
        )

    def encode_prompts(self, examples: Sequence[Example], room: int) -> Sequences:
        """Return prompts alone, cut from the left so that ``room`` tokens may follow.

        Raises:
            ModelError: ``room`` leaves no place for a prompt.
        """
        limit = self.max_length - room
        if limit < 1:
            raise ModelError(
                f"max_new_tokens {room} leaves no place for a prompt in max_length"
                f" {self.max_length}"
            )
        prompts, _ = self._texts(examples)
        cut = [self._left_cut(tokens, limit) for tokens in self._tokens(prompts)]
        return self._pack([(tokens, []) for tokens in cut], [one.label for one in examples])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return generated tokens as text, without special tokens."""
        text = self.base.tokenizer.decode(tokens, skip_special_tokens=True)
        return str(text)

    def _classified(self, examples: Sequence[Example]) -> Sequences:
        encoded = self.base.tokenizer(
            [example.prompt for example in examples],
            truncation=True,
            max_length=self.max_length,
            padding=False,
        ).input_ids
        return self._pack([(ids, []) for ids in encoded], [one.label for one in examples])

    def _texts(self, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
        if not self.template.chat:
            return [one.prompt for one in examples], [one.response for one in examples]
        prompts, responses = [], []
        for example in examples:
            turns = [{"role": "user", "content": example.prompt}]
            prompt = self._chat(turns, add_generation_prompt=True)
            turns.append({"role": "assistant", "content": example.response})
            whole = self._chat(turns, add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise ModelError(
                    f"the chat template of {self.base.settings.path} does not continue its own"
                    " generation prompt; set chat to false and write the turns into the template"
                )
            # What follows the end token (a line feed, often) is never generated.
            response = whole[len(prompt) :]
            end = self.base.tokenizer.eos_token
            prompts.append(prompt)
            responses.append(response.rpartition(end)[0] if end in response else response)
        return prompts, responses

    def _chat(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        rendered = self.base.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(rendered)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self.base.tokenizer(texts, add_special_tokens=False, padding=False)
        return list(encoded.input_ids)

    def _cut(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        end = [] if self.base.eos_id is None else [self.base.eos_id]
        # One unscored token must stay in front, or the first scored one has nothing before it.
        scored = (response + end)[: self.max_length - 1]
        return self._left_cut(prompt, self.max_length - len(scored)), scored

    def _left_cut(self, prompt: list[int], room: int) -> list[int]:
        """Return the opening token and the right end of a prompt, in at most ``room`` tokens."""
        bos = self.base.bos_id
        if self.template.chat:  # a chat template writes its own opening
            opening = prompt[:1] if prompt[:1] == [bos] else []
            prompt = prompt[len(opening) :]
        else:
            opening = [] if bos is None else [bos]
        kept = max(0, room - len(opening))
        return opening + prompt[max(0, len(prompt) - kept) :]

    def _pack(self, pairs: list[tuple[list[int], list[int]]], labels: list[int]) -> Sequences:
        lengths = np.array([len(first) + len(then) for first, then in pairs], dtype=np.int64)
        for row, (first, then) in enumerate(pairs):
            if not first:
                raise DataError(
                    f"example {row} gives no token before its response ({len(then)} tokens), and"
                    " the tokenizer adds none; write something into the prompt template",
                    row=row,
                )
        flat = [token for pair in pairs for part in pair for token in part]
        return Sequences(
            np.array(flat, dtype=np.int32),
            np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            np.array([len(first) for first, _ in pairs], dtype=np.int64),
            np.array(labels, dtype=np.int64),
        )
