"""What is shown while a run goes on and when it ends."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from alignfed.cli import words
from alignfed.cli.summary import summary_table
from alignfed.cli.view import PLAIN_EVERY_S, RunView
from alignfed.progress import Limits, RunInfo, RunSnapshot, fraction_done

INFO = RunInfo(
    name="trial",
    directory=Path("runs/trial"),
    strategy="fedbuff",
    lora="factor",
    model="builtin",
    base_parameters=1_200_000,
    adapter_parameters=50_000,
    fleet="mixed",
    clients=24,
    concurrency=8,
    buffer_size=4,
    limits=Limits(uploads=100),
)

SUMMARY = {
    "strategy": "fedbuff",
    "base_eval_loss": 4.0,
    "final_eval_loss": 1.0,
    "scorer": "exact_match",
    "base_exact_match": 0.05,
    "final_exact_match": 0.655,
    "virtual_time_s": 60.0,
    "synchronous_virtual_time_s": 300.0,
    "uploads": 100,
    "server_version": 25,
    "staleness_mean": 1.75,
    "staleness_max": 6,
    "rejected": 2,
    "rejections": {"not_finite": 2},
    "clients": 24,
    "clients_participating": 23,
    "participation_jain": 0.8,
    "client_loss_mean": 1.1,
    "client_loss_worst10": 2.2,
    "wall_time_s": 75.0,
}


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def snapshot(uploads, **more):
    return RunSnapshot(
        virtual_time_s=uploads * 1.0, version=uploads // 4, uploads=uploads, rejected=0,
        in_flight=8, **more,
    )  # fmt: skip


def make_view(*, terminal=False):
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, color_system=None)
    return RunView(console, clock), clock, file


def test_without_a_terminal_a_run_is_plain_lines_now_and_then():
    view, clock, file = make_view()
    view.started(INFO)
    for uploads in range(1, 13):
        clock.now_s += PLAIN_EVERY_S / 4
        view.progress(snapshot(uploads, loss=2.0, staleness_mean=1.5))
    view.close()
    lines = file.getvalue().splitlines()
    assert "running trial: fedbuff (factor), 24 clients" in lines[0]
    shown = [line for line in lines if line.startswith("virtual time")]
    assert len(shown) == 4  # three while it ran and the last figures
    assert "uploads 12/100" in shown[-1]
    assert "loss 2.000" in shown[-1]
    assert "\x1b" not in file.getvalue()


def test_on_a_terminal_the_figures_are_redrawn_in_place():
    view, _, file = make_view(terminal=True)
    view.started(INFO)
    view.progress(snapshot(50, loss=1.5, score=0.25))
    view.finished(SUMMARY)
    assert "50/100" in file.getvalue()
    assert "25.0%" in file.getvalue()
    assert "result" in file.getvalue()


def test_time_left_goes_by_the_pace_since_this_part_began():
    view, clock, _ = make_view()
    view.started(INFO)
    view.progress(snapshot(40))  # resumed here: what was done earlier says nothing about the pace
    assert view.time_left_s(snapshot(40)) is None
    clock.now_s = 30.0
    assert view.time_left_s(snapshot(60)) == pytest.approx(60.0)


def test_refused_uploads_are_shown_once_there_are_any():
    view, _, file = make_view()
    view.started(INFO)
    view.progress(RunSnapshot(1.0, 1, 4, rejected=3, in_flight=8))
    view.close()
    assert "refused 3" in file.getvalue()


def test_a_name_with_brackets_is_shown_as_it_is():
    view, _, file = make_view()
    view.started(RunInfo(**{**_fields(INFO), "directory": Path("runs/[bold]x")}))
    assert "runs/[bold]x" in file.getvalue()


def test_closing_twice_changes_nothing():
    view, _, file = make_view()
    view.started(INFO)
    view.progress(snapshot(1))
    view.close()
    before = file.getvalue()
    view.close()
    assert file.getvalue() == before


def test_the_nearest_stop_condition_says_how_far_a_run_is():
    limits = Limits(virtual_time_s=100.0, uploads=1000)
    assert fraction_done(limits, snapshot(50)) == 0.5
    assert fraction_done(Limits(), snapshot(50)) is None
    assert fraction_done(Limits(uploads=10), snapshot(50)) == 1.0


def render(summary):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(summary_table(summary))
    return console.file.getvalue()


def test_the_closing_table_shows_before_and_after():
    shown = render(SUMMARY)
    for figure in (
        "4.000", "1.000", "-75.0%", "5.0%", "65.5%", "5.0 min", "1.0 min", "5.0 times sooner",
        "25 server versions", "2 not finite", "at most 6", "23/24", "0.800", "2.200",
    ):  # fmt: skip
        assert figure in shown, figure


def test_the_closing_table_leaves_out_what_was_not_measured():
    unmeasured = (
        "base_exact_match", "final_exact_match", "synchronous_virtual_time_s", "staleness_mean",
        "staleness_max", "client_loss_mean", "client_loss_worst10",
    )  # fmt: skip
    bare = SUMMARY | dict.fromkeys(unmeasured)
    assert "exact match" not in render(bare)
    assert "None" not in render(bare)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.0, "0.0 s"), (0.02, "20 ms"), (3.46, "3.5 s"), (42.0, "42 s"),
     (252.0, "4.2 min"), (5400.0, "1.5 h"), (181440.0, "2.1 d")],
)  # fmt: skip
def test_durations_are_shown_in_the_largest_unit_that_fits(seconds, shown):
    assert words.duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(None, "-"), (999, "999 B"), (1_500, "1.5 kB"), (8_030_000_000, "8.03 GB")],
)
def test_bytes_are_shown_in_decimal_units(number, shown):
    assert words.size(number) == shown


def _fields(info):
    return {name: getattr(info, name) for name in info.__slots__}
