"""An upload before the whole gate: who sends it, what it holds, and how far it has moved."""

from __future__ import annotations

from alignfed.core.adapter import Adapter, with_layout
from alignfed.core.admission import Rejection, check_numbers, check_origin, check_shape
from alignfed.core.distance import distance
from alignfed.core.events import UpdateArrived
from alignfed.core.instructions import RejectReason
from alignfed.core.lora.exchange import Exchange
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Task


def judge(
    state: CoordinatorState,
    exchange: Exchange,
    event: UpdateArrived,
    task: Task | None,
) -> Rejection | tuple[Adapter, Adapter, float]:
    """Return why an upload is refused, or the pair that the rules see, and its norm."""
    update = event.update
    if state.stopped is not None:
        return Rejection(RejectReason.RUN_STOPPED, f"the run ended: {state.stopped}")
    if (
        task is None
        or task.client_id != update.client_id
        or task.base_version != update.base_version
    ):
        stranger = check_origin(
            update,
            known_client=update.client_id in state.clients,
            in_flight=task,
            expired=state.expired,
            next_task_id=state.next_task_id,
            server_version=state.version,
            versions=state.snapshots,
        )
        assert stranger is not None
        return stranger
    # A task in flight has a client that joined and a version that is held.
    snapshot = state.snapshots[task.base_version]
    served = snapshot.adapter
    if exchange.whole and not served.layout.folded:
        # The usual case, in one step: what was sent is the server's, what came is all of it.
        adapter, update_norm = update.adapter, event.distance
        if update_norm is None:
            if (rejection := check_shape(adapter, served.layout)) is not None:
                return rejection
            # From here on equal layouts are one object, so that nobody compares them again.
            adapter = with_layout(adapter, served.layout)
            update_norm = distance(adapter, served)
        rejection = check_numbers(update, update_norm, state.norms, task.steps)
        return (adapter, served, update_norm) if rejection is None else rejection
    sent = snapshot.sent_to(exchange, update.client_id)
    expected = exchange.upload_layout(sent.layout)
    if (rejection := check_shape(update.adapter, expected)) is not None:
        return rejection
    upload = with_layout(update.adapter, expected)
    adapter = with_layout(exchange.complete(upload, sent), sent.layout)
    update_norm = distance(adapter, sent)
    if (rejection := check_numbers(update, update_norm, state.norms, task.steps)) is not None:
        return rejection
    return *exchange.compared(adapter, sent, served), update_norm
