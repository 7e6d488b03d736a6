"""The durable record of a run: rows, checkpoints, recovery, and reading it all back.

Nothing here decides anything; it writes down what was decided, so that a run killed at any instant
goes on to the same result.
"""

from alignfed.journal.atomic import write_summary, write_text_atomically
from alignfed.journal.checkpoint import Checkpoints, Recovered
from alignfed.journal.codec import Codec, Encoded
from alignfed.journal.directory import RunDirectory
from alignfed.journal.reader import EvaluationRecord, RunReader, UploadRecord, VersionRecord
from alignfed.journal.rows import Row
from alignfed.journal.schema import RunMeta
from alignfed.journal.store import Batching, SqliteJournal

__all__ = [
    "Batching",
    "Checkpoints",
    "Codec",
    "Encoded",
    "EvaluationRecord",
    "Recovered",
    "Row",
    "RunDirectory",
    "RunMeta",
    "RunReader",
    "SqliteJournal",
    "UploadRecord",
    "VersionRecord",
    "write_summary",
    "write_text_atomically",
]
