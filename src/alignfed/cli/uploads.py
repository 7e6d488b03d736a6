"""``alignfed uploads``: what became of everybody's uploads, and of one client's each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from alignfed.cli.refusal import refusing
from alignfed.cli.words import decimal, percent
from alignfed.errors import AlignFedError

if TYPE_CHECKING:
    from alignfed.journal import SenderRecord, UploadRecord


@refusing
def uploads(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory, also while it is running.")
    ],
    client: Annotated[
        int | None, typer.Option("--client", metavar="ID", help="Show each upload of this client.")
    ] = None,
) -> None:
    """Name the clients whose uploads were refused or cut, and how far each client's count.

    A refused upload never entered the model. One that was cut counts for less, because it was too
    long or contradicted the others. The journal is only read.
    """
    from alignfed.journal import RunReader

    with RunReader(directory) as reader:
        if client is None:
            table = _senders(list(reader.senders()))
        else:
            table = _uploads([one for one in reader.uploads() if one.client_id == client], client)
            if not table.rows:
                raise AlignFedError(
                    f"client {client} has sent nothing in this run, {len(list(reader.senders()))}"
                    f" others have; see who was refused or cut: alignfed uploads {directory}",
                    client=client,
                )
    Console().print(table)


def _senders(senders: Sequence[SenderRecord]) -> Table:
    contested = [one for one in senders if one.refused or one.cut]
    pulls = [one.pull for one in senders if one.pull is not None]
    usual = median(pulls) if pulls else 0.0
    table = _table("uploads refused or cut", *("client", "uploads", "refused", "cut", "pull"))
    table.add_column("refused for")
    for one in contested:
        table.add_row(
            "-" if one.client_id is None else str(one.client_id),
            str(one.uploads),
            percent(one.refused / one.uploads),
            percent(one.cut / one.uploads),
            decimal(one.pull / usual, 2) if one.pull is not None and usual > 0 else "-",
            ", ".join(reason.replace("_", " ") for reason in one.reasons),
        )
    table.caption = (
        f"{len(contested)} of {len(senders)} clients. Pull: how far an applied upload moved the"
        " server, 1 for the middle client."
    )
    return table


def _uploads(found: Sequence[UploadRecord], client: int) -> Table:
    table = _table(
        f"uploads of client {client}",
        *("task", "base", "applied in", "staleness", "norm", "coefficient"),
    )
    table.add_column("")
    for one in found:
        fate = [one.outcome if one.outcome == "rejected" or one.reason is None else "cut"]
        if one.detail is not None:
            fate.append(one.detail)
        table.add_row(
            *(
                "-" if value is None else str(value)
                for value in (one.task_id, one.base_version, one.applied_version, one.staleness)
            ),
            decimal(one.norm),
            decimal(one.weight),
            ": ".join(fate),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table
