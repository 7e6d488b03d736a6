"""The built-in default: a small base model shipped with the package and a generated corpus.

Everything here works offline on a fresh machine and is the same for the same seed.
"""

from pathlib import Path
from typing import Final

from alignfed.builtin.corpus import (
    PROMPT_TEMPLATE,
    SKILLS,
    Record,
    calibration_records,
    evaluation_records,
    prompt,
    training_records,
)

MODEL_PATH: Final = Path(__file__).parent / "model"
"""The base model's folder, in the standard Hugging Face layout."""

__all__ = [
    "MODEL_PATH",
    "PROMPT_TEMPLATE",
    "SKILLS",
    "Record",
    "calibration_records",
    "evaluation_records",
    "prompt",
    "training_records",
]
