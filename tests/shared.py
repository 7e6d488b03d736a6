"""Where the shared data sets and models are, for tests on real input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared(*parts: str) -> Path:
    """Return a path below ``ALIGNFED_SHARED``; skip where it is unset, fail where it is missing."""
    root = os.environ.get("ALIGNFED_SHARED")
    if not root:
        pytest.skip("ALIGNFED_SHARED is not set: no shared data to test on")
    path = Path(root, *parts)
    if not path.exists():
        pytest.fail(f"ALIGNFED_SHARED is {root}, but {path} does not exist")
    return path
