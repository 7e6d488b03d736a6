"""What a deployed server is given of its own; a simulation does not look at it."""

from __future__ import annotations

from alignfed.config.section import Section, key

_FILE = "a JSON, JSONL, CSV, TSV or Parquet file"


class DeploySection(Section):
    """Files of whoever operates the server. Devices keep theirs to themselves."""

    evaluation: str | None = key(
        None,
        "The server's evaluation set, with the columns of data.template; unset takes what the"
        " recipe's data gives where the server has it, and else scores nothing.",
        allowed=_FILE,
        min_length=1,
        path=True,
        suggested="/data/evaluation.jsonl",
    )
    calibration: str | None = key(
        None,
        "The server's calibration set, of which data.calibration_examples are taken; unset as"
        " above, and else nothing is calibrated.",
        allowed=_FILE,
        min_length=1,
        path=True,
        suggested="/data/calibration.jsonl",
    )
