"""What all tests share: one torch thread a process, no network, no colours in captured output."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Undo what a run before may have set: with more threads, sums round differently."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_thread_for_shared_runs():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plain_output(monkeypatch):
    """Fix what rich and typer take from the environment."""
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
