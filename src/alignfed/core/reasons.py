"""Why an upload was not accepted. Nothing is imported here, so that devices may read it too."""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """Why an upload was not accepted."""

    UNKNOWN_CLIENT = "unknown_client"
    UNKNOWN_TASK = "unknown_task"
    TASK_USED = "task_used"
    TASK_EXPIRED = "task_expired"
    WRONG_CLIENT = "wrong_client"
    FUTURE_VERSION = "future_version"
    EVICTED_VERSION = "evicted_version"
    WRONG_VERSION = "wrong_version"
    WRONG_NAMES = "wrong_names"
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    NOT_FINITE = "not_finite"
    NO_EXAMPLES = "no_examples"
    OUTLYING_NORM = "outlying_norm"
    RUN_STOPPED = "run_stopped"
    # What a driver of real devices refuses before there is an update at all.
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"
    WRONG_CHECKSUM = "wrong_checksum"
    WRONG_TASK = "wrong_task"
    WRONG_RUN = "wrong_run"
