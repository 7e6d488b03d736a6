"""Every error AlignFed raises on purpose; each carries the values that caused it as attributes."""

from __future__ import annotations

from typing import Any


class AlignFedError(Exception):
    """Base of all errors a user can meet.

    Args:
        message: what went wrong, with the value, the limit and the remedy.
        **values: the values named in the message; kept as attributes and in ``values``.
    """

    def __init__(self, message: str, **values: Any) -> None:
        """Keep the values as attributes, so that code need not parse the message."""
        super().__init__(message)
        self.values = values
        for name, value in values.items():
            setattr(self, name, value)


class RecipeError(AlignFedError):
    """A recipe has an unknown key, an impossible value, or asks for what does not fit together."""


class AdapterError(AlignFedError):
    """Adapters do not fit each other: names, shapes, ranks or dtypes differ."""


class FutureVersionError(AlignFedError):
    """An update claims a base version that the server has not reached."""


class CoordinatorError(AlignFedError):
    """An event or a setting that the coordinator cannot act on."""


class RuleError(AlignFedError):
    """An aggregation rule was given settings or updates outside its domain."""


class FleetError(AlignFedError):
    """A fleet of devices cannot be built, or a device cannot do the work asked of it."""


class TraceError(AlignFedError):
    """A device, bandwidth or availability trace file is missing, malformed or inconsistent."""


class DataError(AlignFedError):
    """A data set cannot be read, split or formatted as the recipe asks."""


class ModelError(AlignFedError):
    """A base model, tokenizer or PEFT adapter cannot be loaded or does not fit."""


class JournalError(AlignFedError):
    """A run's directory is missing, damaged, or belongs to another version or recipe."""


class DeploymentError(AlignFedError):
    """A deployment's directory, keys, devices or processes are not as they must be."""
