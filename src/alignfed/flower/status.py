"""What a running server says of itself: for ``status.json``, metrics and the live view.

Times are the driver's seconds since the run began.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class ClientStatus:
    """One client as the driver has seen it since it was started.

    Attributes:
        client_id: which.
        node_id: Flower's number of its node, as last seen.
        online: whether it can be reached.
        seen_s: when it last joined, left or answered.
        task_id: the task it was last sent and has not answered, if any.
        base_version: that task's base version.
        received: uploads of it that reached the server.
        refused: those of them that were refused.
        failures: tasks that ended without an upload.
        sent_bytes: bytes sent to it.
        received_bytes: bytes received from it.
        expected_s: how long its tasks take, as learned; None: not known yet.
        last_error: why its last upload was refused or its last task failed.
        last_error_s: when that was.
        model_loads: how often its trainer has loaded the base model, as it reports.
    """

    client_id: int
    node_id: int = 0
    online: bool = False
    seen_s: float = 0.0
    task_id: int | None = None
    base_version: int | None = None
    received: int = 0
    refused: int = 0
    failures: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    expected_s: float | None = None
    last_error: str = ""
    last_error_s: float = 0.0
    model_loads: int | None = None


@dataclass(slots=True)
class ServerStatus:
    """The server.

    Attributes:
        run: name of the run.
        time_s: seconds since the run began, its stops left out.
        version: current server version.
        received: answers to given tasks, accepted or refused.
        accepted: uploads accepted.
        rejections: refused uploads by reason.
        in_flight: tasks in flight.
        buffered: accepted uploads not yet applied.
        staleness_mean: over the uploads of the last published version.
        staleness_max: the same.
        loss: of the last evaluation, in nats.
        score: of the last evaluation.
        evaluating: versions that wait to be scored.
        sent_bytes: bytes sent to devices, over restarts.
        received_bytes: bytes received, over restarts.
        stopped: why the run ended, if it has.
        clients: by client id.
    """

    run: str
    time_s: float = 0.0
    version: int = 0
    received: int = 0
    accepted: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    buffered: int = 0
    staleness_mean: float | None = None
    staleness_max: int | None = None
    loss: float | None = None
    score: float | None = None
    evaluating: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    stopped: str | None = None
    clients: dict[int, ClientStatus] = field(default_factory=dict)

    def client(self, client_id: int) -> ClientStatus:
        """Return a client's part, made at its first mention."""
        return self.clients.setdefault(client_id, ClientStatus(client_id))


__all__ = ["ClientStatus", "ServerStatus"]
