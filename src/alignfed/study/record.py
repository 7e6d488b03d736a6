"""What a study keeps of one run, read from the run's journal. Holds no figure of the wall clock."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from alignfed.errors import JournalError
from alignfed.journal import RunDirectory, RunReader, write_summary
from alignfed.running import CLIENTS_NOTE


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation, and what it had taken to get there.

    Attributes:
        time_s: virtual time.
        version: server version that was scored.
        uploads: answers received by then.
        tokens: tokens that clients had trained on for them.
        transferred_bytes: bytes moved both ways by then.
        loss: on the common evaluation set, in nats (None: not finite).
        score: in [0, 1] (None: not measured).
    """

    time_s: float
    version: int
    uploads: int
    tokens: float
    transferred_bytes: float
    loss: float | None
    score: float | None


@dataclass(frozen=True, slots=True)
class ClientsEvaluated:
    """Every client's own held-out slice under one version, by client id; None: not measured."""

    version: int
    losses: Mapping[int, float | None]
    scores: Mapping[int, float | None]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One finished run.

    Attributes:
        evaluations: in order.
        clients: scores of clients' own slices, in order; empty where they were not measured.
        uploads: applied uploads by client id; clients without any are there with 0.
        influence: sum of ``|coefficient| x update norm`` by client id.
        staleness: applied uploads by staleness.
        virtual_time_s: virtual time at the end.
        trained_tokens: tokens of all uploads.
        uploaded_bytes: from clients to the server.
        downloaded_bytes: from the server to clients.
        rejected: uploads refused.
    """

    evaluations: Sequence[Evaluated]
    clients: Sequence[ClientsEvaluated]
    uploads: Mapping[int, int]
    influence: Mapping[int, float]
    staleness: Mapping[int, int]
    virtual_time_s: float
    trained_tokens: float
    uploaded_bytes: float
    downloaded_bytes: float
    rejected: int


def read_record(root: Path, client_ids: Sequence[int]) -> RunRecord:
    """Return the record of a finished run.

    Bytes at an evaluation count every dispatch and upload alike: exact where all clients have
    adapters of one size, an average where ranks are mixed.

    Raises:
        JournalError: there is no run, or it is damaged.
    """
    summary = json.loads(RunDirectory(root).summary.read_text(encoding="utf-8"))
    uploads: Counter[int] = Counter({client_id: 0 for client_id in client_ids})
    influence = dict.fromkeys(client_ids, 0.0)
    staleness: Counter[int] = Counter()
    with RunReader(root) as reader:
        dispatched = [row.seq for row in reader.rows(name="Dispatch")]
        received = list(reader.uploads())
        for upload in received:
            if upload.outcome != "applied" or upload.client_id is None:
                continue
            uploads[upload.client_id] += 1
            staleness[upload.staleness or 0] += 1
            moved = abs(upload.weight or 0.0) * (upload.norm or 0.0)
            influence[upload.client_id] = influence.get(upload.client_id, 0.0) + moved
        scored = list(reader.evaluations())
        notes = [row.body for row in reader.rows(name=CLIENTS_NOTE)]
    down_bytes = summary["downloaded_bytes"] / max(1, len(dispatched))
    up_bytes = summary["uploaded_bytes"] / max(1, len(received))
    arrived = [upload.seq for upload in received]
    tokens = [0.0, *accumulate(float(one.metrics.get("tokens", 0.0)) for one in received)]
    evaluations = []
    for one in scored:
        count = bisect_right(arrived, one.seq)
        moved_bytes = bisect_right(dispatched, one.seq) * down_bytes + count * up_bytes
        evaluations.append(
            Evaluated(
                one.time_s, one.version, count, tokens[count], moved_bytes, one.loss, one.score
            )
        )
    return RunRecord(
        evaluations,
        [ClientsEvaluated(one["version"], *_clients(one)) for one in notes],
        dict(uploads),
        influence,
        dict(sorted(staleness.items())),
        summary["virtual_time_s"],
        tokens[-1],
        summary["uploaded_bytes"],
        summary["downloaded_bytes"],
        summary["rejected"],
    )


def write_record(path: Path, record: RunRecord, digest: str) -> None:
    """Write a record with the digest of what it is a record of.

    Raises:
        JournalError: the file cannot be written.
    """
    write_summary(path, {"digest": digest, **asdict(record)})


def load_record(path: Path, digest: str) -> RunRecord | None:
    """Return the record in a file, or None where there is none of that digest.

    Raises:
        JournalError: the file is no record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("digest") != digest:
            return None
        return RunRecord(
            **{
                **found,
                "evaluations": [Evaluated(**one) for one in found["evaluations"]],
                "clients": [
                    ClientsEvaluated(one["version"], *_clients(one)) for one in found["clients"]
                ],
                **{
                    name: {int(key): value for key, value in found[name].items()}
                    for name in ("uploads", "influence", "staleness")
                },
            }
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(
            f"{path} is no record of a run: {error!r}; delete it, and the run is done again",
            path=str(path),
        ) from error


def _clients(note: Mapping[str, Any]) -> tuple[dict[int, float | None], dict[int, float | None]]:
    losses, scores = (
        {int(client_id): value for client_id, value in note[name].items()}
        for name in ("losses", "scores")
    )
    return losses, scores
