"""Figures of a study as Markdown for people. Pure: figures in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignfed.core.aggregation import RULES
from alignfed.study.plan import METHOD, rule_of

Figures = Mapping[str, Any]


def comparison_table(figures: Figures) -> str:
    """Return the whole of ``comparison.md``."""
    rows = [
        [name, _step(one["tuned"]), *_cells(one, len(figures["seeds"]))]
        for name, one in figures["strategies"].items()
    ]
    return "\n".join(
        [
            f"# {figures['recipe']}: rules compared",
            "",
            *_table(["strategy", "step", *_heads(figures)], rows),
            "",
            *_speeds(figures),
            *_conditions(figures),
            *_tuning(figures),
        ]
    )


def ablation_table(figures: Figures) -> str:
    """Return the whole of ``ablation.md``."""
    lines = [f"# {figures['recipe']}: {METHOD} without each module", ""]
    for regime in figures["regimes"]:
        measured = regime["variants"]["full"]["staleness"]["mean"]
        lines += [
            f"## {regime['in_flight']} in flight, buffer {regime['buffer_size']} (staleness"
            f" {_number(measured)}), Dirichlet {regime['alpha']:g}",
            "",
            *_table(
                ["variant", *_heads(figures)],
                [
                    [name, *_cells(one, len(figures["seeds"]))]
                    for name, one in regime["variants"].items()
                ],
            ),
            "",
        ]
    return "\n".join([*lines, *_conditions(figures)])


def percent_or_number(value: float | None, scored: bool) -> str:
    """Return a score as per cent, a loss as a number.

    >>> percent_or_number(0.912, True), percent_or_number(0.912, False)
    ('91.2 %', '0.912')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if scored else _number(value)


def _heads(figures: Figures) -> list[str]:
    target = figures["target"]
    goal = percent_or_number(target["value"], target["measure"] == "score")
    return [
        "final loss",
        f"final {figures['scorer'].replace('_', ' ')}",
        f"time to {target['measure']} {goal}",
        "worst 10 % of clients",
        "participation (Jain)",
        "slowest tenth's influence",
        "staleness",
    ]


def _cells(one: Figures, seeds: int) -> list[str]:
    scored = one["final_score"]["mean"] is not None
    time = one["time_to_target_s"]
    reached = "" if time["reached"] == seeds else f" ({time['reached']} of {seeds} seeds)"
    when = _spread(time, "s") if time["mean"] is not None else "never" if not reached else "∞"
    return [
        _spread(one["final_eval_loss"]),
        _spread(one["final_score"], "%") if scored else "-",
        when + reached,
        _spread(one["worst10"], "%" if scored else ""),
        _spread(one["participation_jain"]),
        _spread(one["slow_influence"]),
        f"{_number(one['staleness']['mean'])} (at most {one['staleness']['max']})",
    ]


def _speeds(figures: Figures) -> list[str]:
    """Say how the method's time to the target compares with each kind of baseline's best."""
    strategies = figures["strategies"]
    if METHOD not in strategies:
        return []
    own = strategies[METHOD]["time_to_target_s"]["mean"]
    lines = []
    for words, synchronous in (("asynchronous", False), ("synchronous", True)):
        others = {
            name: one["time_to_target_s"]["mean"]
            for name, one in strategies.items()
            if rule_of(name) != METHOD and RULES[rule_of(name)].synchronous == synchronous
        }
        finite = {name: time_s for name, time_s in others.items() if time_s is not None}
        if not others:
            continue
        if not finite:
            lines.append(f"No {words} baseline reached the target on every seed.")
            continue
        name = min(finite, key=lambda one: finite[one])
        ratio = "" if own is None else f", {finite[name] / own:.2f} times {METHOD}'s"
        lines.append(
            f"The fastest {words} baseline, {name}, took {_number(finite[name])} s to the"
            f" target{ratio}."
        )
    if own is None:
        lines.append(f"{METHOD} did not reach the target on every seed.")
    return [*lines, ""]


def _conditions(figures: Figures) -> list[str]:
    seeds = ", ".join(map(str, figures["seeds"]))
    finals, uploads = figures["final_evaluations"], figures["uploads"]
    return [
        f"Mean ± standard deviation over seeds {seeds}. Every run replays its seed's recorded"
        f" device trace and stops at the client tokens of {uploads} uploads. Final values are means"
        f" over the last {finals} evaluations. Time is virtual; a seed that never reaches the"
        " target counts as infinite. The worst tenth of clients is judged on each client's own"
        " held-out slice. Influence is the slowest tenth's share of the sum of |coefficient| x"
        " update norm, over its share of clients.",
        "",
    ]


def _tuning(figures: Figures) -> list[str]:
    tuning = figures["tuning"]
    lines = []
    edges = []
    for name, one in figures["strategies"].items():
        tuned = one["tuned"]
        if not tuned:
            continue
        tried = "; ".join(
            f"{each['value']:g}: "
            + (
                f"{_number(each['time_to_target_s'])} s"
                if each["time_to_target_s"] is not None
                else "never"
            )
            + f", loss {_number(each['final_eval_loss'])}"
            for each in tuned["tried"]
        )
        lines.append(f"- {name}, `{tuned['setting']}`: {tried}")
        if tuned["at_edge"]:
            edges.append(name)
    if not lines:
        return []
    note = (
        [
            "",
            f"At the edge of what was tried: {', '.join(edges)}. A wider `compare.tuning_factors`"
            " or `compare.steps` may do better.",
        ]
        if edges
        else []
    )
    return [
        f"Server steps tried on seed {tuning['seed']}, with {100 * tuning['share_of_work']:g} % of"
        f" the client work each, chosen by {tuning['measure'].replace('_', ' ')}:",
        "",
        *lines,
        *note,
        "",
    ]


def _step(tuned: Figures) -> str:
    return f"{tuned['value']:g}" if tuned else "not tuned"


def _spread(figure: Figures, unit: str = "") -> str:
    mean, std = figure["mean"], figure["std"]
    if mean is None:
        return "-"
    scale = 100.0 if unit == "%" else 1.0

    def words(value: float) -> str:
        return f"{value * scale:.1f}" if unit == "%" else _number(value * scale)

    text = words(mean) if std is None else f"{words(mean)} ± {words(std)}"
    return f"{text} {unit}".rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]
