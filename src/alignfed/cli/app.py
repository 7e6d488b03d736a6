"""The commands. Each loads what it needs when it runs, so that help is quick."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignfed.cli import studies
from alignfed.cli.choosing import RecipeArgument, SetOption, chosen_recipe, new_directory
from alignfed.cli.deploy import deploy_app
from alignfed.cli.refusal import INTERRUPTED, debugging, refusing
from alignfed.cli.replay import replay
from alignfed.cli.up import up
from alignfed.cli.uploads import uploads
from alignfed.progress import ProgressView
from alignfed.version import __version__

app = typer.Typer(
    name="alignfed",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignfed {__version__}")
        raise typer.Exit


@app.callback(
    epilog="First steps: [b]alignfed simulate[/b] runs the built-in example offline; "
    "[b]alignfed init my.toml[/b] writes a commented recipe; "
    "[b]alignfed simulate my.toml --out runs/mine[/b] runs it."
)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback where a command refuses.")
    ] = False,
) -> None:
    """Fine-tune a language model with LoRA across a fleet of unequal devices, asynchronously."""
    debugging.on = debug


@app.command(
    epilog="Examples: [b]alignfed simulate[/b]; "
    "[b]alignfed simulate --set strategy.rule=fedbuff --set seed=1 --out runs/fedbuff[/b]; "
    "[b]alignfed simulate recipes/dolly.toml --set data.path=my/folder[/b]"
)
@refusing
def simulate(
    recipe: RecipeArgument = None,
    overrides: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where to keep the run; a new folder in runs/ if left out.",
        ),
    ] = None,
    keep_payloads: Annotated[
        bool,
        typer.Option(
            "--keep-payloads",
            help="Keep every upload, so that [b]alignfed replay[/b] can begin at the start.",
        ),
    ] = False,
) -> None:
    """Run a federated fine-tuning on a virtual clock, and keep recipe, journal and adapter."""
    from alignfed.prestart import start_server_if_likely

    start_server_if_likely(recipe, overrides or [])
    loaded = chosen_recipe(recipe, overrides)
    directory = out if out is not None else new_directory(loaded.name)
    from alignfed import api

    _watch(
        directory,
        lambda view: api.simulate(loaded, directory, view=view, keep_payloads=keep_payloads),
    )


@app.command(epilog="Example: [b]alignfed resume runs/alignfed[/b]")
@refusing
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
) -> None:
    """Go on with a run that was interrupted; the result is that of an uninterrupted one."""
    from alignfed.prestart import start_server_if_likely

    start_server_if_likely(directory / "recipe.toml", [])
    from alignfed import api

    _watch(directory, lambda view: api.resume(directory, view=view))


@app.command(
    epilog="Example: [b]alignfed sanitize runs/mine --harmful triggers.jsonl[/b]; "
    "the adapter is then in runs/mine/sanitized"
)
@refusing
def sanitize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's directory.")],
    harmful: Annotated[
        Path,
        typer.Option(
            "--harmful",
            metavar="FILE",
            help="Examples of what the model must no longer do, in the columns of the run's data "
            "(JSON, JSONL, CSV or Parquet): prompts, and the responses to unlearn.",
        ),
    ],
    reduce_to: Annotated[
        float,
        typer.Option(
            "--reduce-to",
            metavar="SHARE",
            help="What may be left of harmful responses given; less costs more of the model.",
        ),
    ] = 0.25,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder to write; DIR/sanitized if left out."),
    ] = None,
) -> None:
    """Prune from a finished run's adapter what harmful responses depend on (after Antidote).

    Nothing is trained. As few weights are set to zero as bring the harm down, chosen by what that
    costs on the run's calibration set. Prints how often the harmful responses are given, and what
    the model can still do, before and after; writes a standard PEFT adapter beside the run's own.
    """
    from alignfed.cli.summary import sanitized_table
    from alignfed.sanitizing import sanitize as run

    done = run(directory, harmful, reduce_to=reduce_to, out=out)
    console = _console()
    console.print(sanitized_table(done.report))
    console.print(f"adapter: {done.adapter}", soft_wrap=True)


app.command(
    epilog="Example: [b]alignfed simulate --keep-payloads --out runs/kept[/b], then "
    "[b]alignfed replay runs/kept[/b]"
)(replay)


app.command(
    epilog="Examples: [b]alignfed uploads runs/alignfed[/b]; "
    "[b]alignfed uploads runs/alignfed --client 17[/b]"
)(uploads)


@app.command(epilog="Example: [b]alignfed strategies fedbuff[/b] shows the settings of one rule.")
@refusing
def strategies(
    rule: Annotated[
        str | None, typer.Argument(metavar="RULE", help="Show this rule's settings.")
    ] = None,
) -> None:
    """List aggregation rules and LoRA rules, or one rule's settings."""
    from alignfed.cli.listings import print_rule, print_rules

    if rule is None:
        print_rules(_console())
    else:
        print_rule(_console(), rule)


@app.command(epilog="Example: [b]alignfed simulate --set fleet.preset=laptops[/b]")
@refusing
def fleets() -> None:
    """List the fleets that come with the package, with where their figures are from."""
    from alignfed.cli.listings import print_fleets

    print_fleets(_console())


@app.command(epilog="Example: [b]alignfed init my.toml[/b], then edit it.")
@refusing
def init(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The file to write.")],
) -> None:
    """Write a recipe in which every key is explained. Never overwrites."""
    from alignfed.cli.starting import write_starting_recipe

    write_starting_recipe(recipe)
    typer.echo(f"{recipe} written; run it with: alignfed simulate {recipe}")


@app.command(epilog="Example: [b]alignfed plan recipes/llama3-8b.toml[/b]")
@refusing
def plan(recipe: RecipeArgument = None, overrides: SetOption = None) -> None:
    """Count bytes and FLOPs of a recipe on each kind of device. Downloads and loads nothing."""
    from alignfed.cli.listings import print_plan
    from alignfed.planning import make_plan

    loaded = chosen_recipe(recipe, overrides)
    print_plan(_console(), make_plan(loaded))


studies.add_commands(app)
app.command(
    epilog="Examples: [b]alignfed up[/b]; "
    "[b]alignfed up my.toml --devices 8 --set stop.uploads=64 --out runs/real[/b]"
)(up)
app.add_typer(deploy_app)


def _console() -> Console:
    return Console()


def _watch(directory: Path, run: Callable[[ProgressView], object]) -> None:
    """Show a run while it goes on; after Ctrl-C say how to go on."""
    from alignfed.cli.view import RunView, UnheardConsole

    view = RunView(UnheardConsole())
    try:
        run(view)
    except KeyboardInterrupt:
        view.close()
        if (directory / "journal.sqlite").exists():
            command = f"alignfed resume {shlex.quote(str(directory))}"
            typer.echo(f"interrupted; what was done is kept. Go on with: {command}", err=True)
        else:
            typer.echo("interrupted before the run began; there is nothing to resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        view.close()
