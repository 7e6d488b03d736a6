"""What every journal test shares."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def forget_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing the system was handed: waiting for disks shows nothing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
