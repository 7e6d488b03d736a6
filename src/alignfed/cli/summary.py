"""The closing table of a run, from the content of ``summary.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from alignfed.cli.words import decimal, duration, percent


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return what a run achieved, as rows of before, after and what they mean."""
    table = Table(title="result", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    for row in (*_quality(summary), *_time(summary), *_clients(summary)):
        table.add_row(*row)
    return table


def sanitized_table(report: Mapping[str, Any]) -> Table:
    """Return what pruning an adapter changed, from the content of ``sanitize.json``."""
    before, after = report["before"], report["after"]
    table = Table(title="sanitised", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    harmful = report["harmful_examples"]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        (f"harmful responses given, of {harmful}", "harmful_success", percent),
        ("harmful loss (nats; higher is better)", "harmful_loss", decimal),
        ("evaluation loss (nats)", "eval_loss", decimal),
        (str(report["scorer"]).replace("_", " "), "eval_score", percent),
        ("calibration loss (nats)", "calibration_loss", decimal),
    ]
    for title, key, show in rows:
        if after[key] is not None:
            table.add_row(title, show(before[key]), show(after[key]))
    share = f"{report['zeroed_weights'] / report['weights']:.2%}, by {report['score']}"
    table.add_row("weights set to zero", "", f"{report['zeroed_weights']} ({share})")
    if not report["reached"]:
        table.caption = f"Harm is not down to {percent(report['reduce_to'])} of what it was."
    return table


def _quality(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    base, final = summary.get("base_eval_loss"), summary.get("final_eval_loss")
    change = f"{(final - base) / base:+.1%}" if base and final is not None else ""
    rows = [("evaluation loss (nats)", decimal(base), decimal(final), change)]
    if summary.get("final_exact_match") is not None:
        scorer = str(summary.get("scorer", "exact_match")).replace("_", " ")
        rows.append(
            (
                scorer,
                percent(summary.get("base_exact_match")),
                percent(summary["final_exact_match"]),
                "",
            )
        )
    return rows


def _time(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    own, synchronous = summary.get("virtual_time_s"), summary.get("synchronous_virtual_time_s")
    if own is not None and synchronous is not None:
        speedup = f"{synchronous / own:.1f} times sooner" if synchronous and own > 0 else ""
        rows.append(
            ("virtual time, FedAvg against this", duration(synchronous), duration(own), speedup)
        )
    rows.append(("wall-clock time", "", duration(summary.get("wall_time_s")), ""))
    return rows


def _clients(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rejected = summary.get("rejected", 0)
    reasons = ", ".join(
        f"{number} {reason.replace('_', ' ')}"
        for reason, number in sorted(summary.get("rejections", {}).items())
    )
    mean, worst = summary.get("staleness_mean"), summary.get("staleness_max")
    return [
        (
            "uploads applied",
            "",
            str(summary.get("uploads", "-")),
            f"{summary.get('server_version', '-')} server versions",
        ),
        ("uploads refused", "", str(rejected), reasons),
        ("staleness, mean", "", decimal(mean, 1), f"at most {worst}" if worst is not None else ""),
        (
            "clients participating",
            "",
            f"{summary.get('clients_participating', '-')}/{summary.get('clients', '-')}",
            f"Jain index {decimal(summary.get('participation_jain'))}",
        ),
        (
            "clients' own loss, mean",
            "",
            decimal(summary.get("client_loss_mean")),
            f"worst tenth {decimal(summary.get('client_loss_worst10'))}",
        ),
    ]
