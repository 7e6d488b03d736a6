"""The durable record of a run: rows, checkpoints, recovery, and reading it all back.

Nothing here decides anything; it writes down what was decided, so that a run killed at any instant
goes on to the same result. A simulation is cut back to a checkpoint and computes again
(``Checkpoints``); a server cannot, so its events are handled again (``DurableLog``).
"""

from alignfed.journal.atomic import write_summary, write_text_atomically
from alignfed.journal.checkpoint import Checkpoints, Recovered
from alignfed.journal.codec import Codec, Encoded, rule_state_class
from alignfed.journal.directory import RunDirectory
from alignfed.journal.durable import DurableLog
from alignfed.journal.facts import ReplayFacts, facts_of, read_facts, this_platform
from alignfed.journal.reader import (
    EvaluationRecord,
    RunReader,
    SenderRecord,
    UploadRecord,
    VersionRecord,
)
from alignfed.journal.recorder import Recorder
from alignfed.journal.recording import Recording
from alignfed.journal.rows import Row
from alignfed.journal.schema import RunMeta
from alignfed.journal.serving import RecoveredServer
from alignfed.journal.store import Batching, SqliteJournal

__all__ = [
    "Batching",
    "Checkpoints",
    "Codec",
    "DurableLog",
    "Encoded",
    "EvaluationRecord",
    "Recorder",
    "Recording",
    "Recovered",
    "RecoveredServer",
    "ReplayFacts",
    "Row",
    "RunDirectory",
    "RunMeta",
    "RunReader",
    "SenderRecord",
    "SqliteJournal",
    "UploadRecord",
    "VersionRecord",
    "facts_of",
    "read_facts",
    "rule_state_class",
    "this_platform",
    "write_summary",
    "write_text_atomically",
]
