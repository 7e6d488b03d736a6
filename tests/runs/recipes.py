"""Small versions of the built-in recipe: the real model and corpus, a few uploads."""

from __future__ import annotations

SMALL = [
    "data.num_examples=600",
    "data.evaluation_examples=60",
    "data.partition.num_clients=6",
    "data.partition.min_size=10",
    "training.steps=3",
    "training.batch_size=8",
    "server.concurrency=4",
    "server.buffer_size=2",
    "stop.uploads=16",
    "evaluation.every_versions=3",
    "evaluation.score_examples=24",
]
"""Overrides that make the built-in recipe end in seconds."""
