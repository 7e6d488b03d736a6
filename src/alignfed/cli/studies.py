"""``alignfed compare`` and ``alignfed ablate``: many runs that answer one question."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from alignfed.cli.choosing import RecipeArgument, SetOption, chosen_recipe
from alignfed.cli.refusal import INTERRUPTED, refusing
from alignfed.errors import AlignFedError

if TYPE_CHECKING:
    from alignfed.study.running import StudyView

Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="0,1,2",
        help="Reported seeds; those of [b]compare.seeds[/b] if left out.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Where to keep everything, and where to go on after an interruption.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", metavar="N", help="Worker processes; one for each core if left out."),
]


@refusing
def compare(
    recipe: RecipeArgument = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            metavar="A,B",
            help="Rules to compare, as [b]alignfed strategies[/b] lists them. If left out: "
            "alignfed, fedbuff, fedasync, ca2fl, fedavg, fedadam, as far as they exist. "
            "[b]fedbuff+by_speed[/b] gives a rule local steps by device speed, and "
            "[b]alignfed+equal[/b] takes them away.",
        ),
    ] = None,
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    overrides: SetOption = None,
) -> None:
    """Compare rules: same devices, same client work, every baseline's server step tuned alike.

    The target is fixed in the recipe ([b]compare.target_score[/b] or [b]target_loss[/b]) before
    anything runs. Steps are chosen on a seed that is not reported. Writes comparison.json,
    comparison.md and curves; the same command again goes on after an interruption.
    """
    from alignfed.study.comparison import compare as run

    loaded = chosen_recipe(recipe, overrides)
    names, numbers = _names(strategies), _numbers(seeds)
    place = out if out is not None else Path("studies") / f"{loaded.name}-compare"
    _watch(
        place,
        lambda view: run(loaded, place, strategies=names, seeds=numbers, jobs=jobs, view=view),
    )


@refusing
def ablate(
    recipe: RecipeArgument = None,
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    overrides: SetOption = None,
) -> None:
    """Run AlignFed with each module off in turn, at three staleness levels and two skews.

    The regimes are in the recipe's [b]ablate[/b] section; the data must be dealt by Dirichlet
    shares. Writes ablation.json and ablation.md; the same command again goes on after an
    interruption.
    """
    from alignfed.study.ablation import ablate as run

    loaded = chosen_recipe(recipe, overrides)
    numbers = _numbers(seeds)
    place = out if out is not None else Path("studies") / f"{loaded.name}-ablate"
    _watch(place, lambda view: run(loaded, place, seeds=numbers, jobs=jobs, view=view))


def add_commands(app: typer.Typer) -> None:
    """Add the studies to the command line."""
    app.command(
        epilog="Examples: [b]alignfed compare[/b]; [b]alignfed compare my.toml --strategies"
        " alignfed,fedbuff --seeds 0,1,2 --out studies/mine[/b]"
    )(compare)
    app.command(epilog="Example: [b]alignfed ablate my.toml --out studies/modules[/b]")(ablate)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise AlignFedError(
            f"--seeds {text!r} is no list of whole numbers; write them as in --seeds 0,1,2"
        ) from None


def _watch(place: Path, run: Callable[[StudyView], object]) -> None:
    from alignfed.cli.study_view import StudyScreen

    screen = StudyScreen(Console())
    try:
        run(screen)
    except KeyboardInterrupt:
        screen.close()
        again = shlex.join(["alignfed", *sys.argv[1:]])
        if (place / "study.json").exists():
            typer.echo(f"interrupted; what was done is kept. Go on with: {again}", err=True)
        else:
            typer.echo("interrupted before anything was kept", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        screen.close()
