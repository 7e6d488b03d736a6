"""A calibrator's answers on record, so that a replay needs neither the model nor its data.

A loss is a number and always recorded. Inputs and features are tensors, as many as the model has
layers: they are recorded where all payloads are kept, else only that they were asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.core.ports import Calibrator
from alignfed.errors import JournalError

ANSWERS_NOTE = "CalibratorAnswered"
"""Name of the journal's note of what a calibrator answered during one event."""

Answer: TypeAlias = "list[Any]"
"""``[question, checksum of the adapter asked about, answer]``. A loss is the text of a float;
features are a tensor's checksum, inputs one for each module; None was not kept."""

Keep: TypeAlias = Callable[[Tensor], str]
"""Stores a tensor and returns its checksum."""


class OtherQuestionError(JournalError):
    """A replay asked the calibrator something else than the recorded run did."""


class RecordingCalibrator:
    """Asks a calibrator and notes what it answers."""

    def __init__(self, real: Calibrator, keep: Keep | None) -> None:
        """Ask ``real``; store its tensors with ``keep``, or (None) do not store them."""
        self.real = real
        self._keep = keep
        self._answers: list[Answer] = []

    @property
    def tokens(self) -> int:
        """Tokens (padding included) in the calibration mini-batch."""
        return self.real.tokens

    def loss(self, adapter: Adapter) -> float:
        """Return the mean loss on the calibration mini-batch, in nats."""
        found = self.real.loss(adapter)
        self._answers.append(["loss", adapter.checksum, repr(float(found))])
        return found

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        """Return the inputs of each adapted module, by name, shape ``(positions, in_dim)``."""
        found = self.real.inputs(adapter)
        keep = self._keep
        kept = None if keep is None else {name: keep(tensor) for name, tensor in found.items()}
        self._answers.append(["inputs", adapter.checksum, kept])
        return found

    def features(self, adapter: Adapter) -> Tensor:
        """Return penultimate features, shape ``(positions, hidden_dim)``."""
        found = self.real.features(adapter)
        kept = None if self._keep is None else self._keep(found)
        self._answers.append(["features", adapter.checksum, kept])
        return found

    def take(self) -> list[Answer]:
        """Return the answers since this was last called."""
        answers, self._answers = self._answers, []
        return answers


class RecordedCalibrator:
    """Gives the answers on record, in their order."""

    def __init__(
        self,
        tokens: int,
        read: Callable[[str], Tensor],
        real: Callable[[], Calibrator],
        *,
        exact: bool,
    ) -> None:
        """Answer as the record does.

        Args:
            tokens: tokens of the calibration mini-batch.
            read: reads a stored tensor by its checksum.
            real: returns a calibrator for what was not stored.
            exact: whether an adapter must be the recorded one to the bit; else its place in the
                order of questions is enough.
        """
        self.tokens = tokens
        self.exact = exact
        self._read = read
        self._real = real
        self._answers: deque[Answer] = deque()

    def expect(self, answers: Iterable[Answer]) -> None:
        """Take the answers of the next event."""
        self._answers = deque(answers)

    def refuse_rest(self) -> None:
        """Refuse to go on while answers are left that nobody asked for.

        Raises:
            OtherQuestionError: some are.
        """
        if self._answers:
            question, checksum, _ = self._answers[0]
            raise OtherQuestionError(
                f"the record asks the calibrator for the {question} of adapter {checksum[:12]};"
                " the replay did not"
            )

    def loss(self, adapter: Adapter) -> float:
        """Return the recorded loss.

        Raises:
            OtherQuestionError: the record asks something else here.
        """
        return float(self._next("loss", adapter))

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        """Return the recorded inputs, or those of the real calibrator.

        Raises:
            OtherQuestionError: the record asks something else here.
        """
        kept = self._next("inputs", adapter)
        if kept is None:
            return self._real().inputs(adapter)
        return {name: self._read(checksum) for name, checksum in kept.items()}

    def features(self, adapter: Adapter) -> Tensor:
        """Return the recorded features, or those of the real calibrator.

        Raises:
            OtherQuestionError: the record asks something else here.
        """
        kept = self._next("features", adapter)
        return self._real().features(adapter) if kept is None else self._read(kept)

    def _next(self, question: str, adapter: Adapter) -> Any:
        asked = f"asks the calibrator for the {question} of adapter {adapter.checksum[:12]}"
        if not self._answers:
            raise OtherQuestionError(f"the replay {asked}; the record asks nothing more here")
        recorded, checksum, answer = self._answers.popleft()
        if recorded != question or (self.exact and checksum != adapter.checksum):
            raise OtherQuestionError(
                f"the replay {asked}; the record asks for the {recorded} of {checksum[:12]}"
            )
        return answer


def named_tensors(body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the checksums that a note of answers names."""
    answers: Sequence[Answer] = body["answers"]
    for question, _, answer in answers:
        if answer is not None and question == "inputs":
            yield from answer.values()
        elif answer is not None and question == "features":
            yield answer
