"""Flower as the way to real devices: the words on the wire, and both ends of it.

``AsyncFedAvg`` takes the place of ``flwr.serverapp.strategy.FedAvg`` in an app that exists already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignfed.flower.dropin import AsyncFedAvg

__all__ = ["AsyncFedAvg"]


def __getattr__(name: str) -> Any:
    """Load the strategy when it is asked for: a device's client app must not import torch."""
    if name == "AsyncFedAvg":
        from alignfed.flower.dropin import AsyncFedAvg

        return AsyncFedAvg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
