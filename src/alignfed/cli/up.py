"""``alignfed up``: a secured federation on this machine, in one command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignfed.cli.choosing import RecipeArgument, SetOption, chosen_recipe, new_directory
from alignfed.cli.refusal import INTERRUPTED, refusing, require_deploy_extra


@refusing
def up(
    recipe: RecipeArgument = None,
    devices: Annotated[
        int,
        typer.Option(
            "--devices",
            min=1,
            max=256,
            help="Devices; each is a SuperNode and a trainer with a model of its own, so memory "
            "sets the limit.",
        ),
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where to keep the run; a new folder in runs/ if left out. One that was "
            "interrupted goes on.",
        ),
    ] = None,
    encoding: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16|fp16|int8",
            help="Numbers of an adapter on the wire. Loopback costs nothing, so nothing is rounded "
            "unless you ask for it.",
        ),
    ] = "fp32",
    overrides: SetOption = None,
) -> None:
    """Run a whole federation on this machine as real processes, with TLS and node keys.

    A proxy, Flower's SuperLink and SuperExec, the ServerApp, and for each device a SuperNode and a
    trainer. The recipe is cut to as many clients as there are devices, with as many tasks in
    flight at most; DIR/recipe.toml says so, and [b]alignfed simulate DIR/recipe.toml[/b] is its
    counterpart on a virtual clock. Ctrl-C ends every process; the same command goes on.
    """
    require_deploy_extra()
    from alignfed.cli.view import RunView, UnheardConsole
    from alignfed.deploy.supervisor import stop_on_signals
    from alignfed.deploy.up import recipe_for, run_up

    loaded = chosen_recipe(recipe, overrides)
    fitted = recipe_for(loaded, devices)
    directory = out if out is not None else new_directory(f"{loaded.name}-up")
    view = RunView(UnheardConsole())
    with stop_on_signals() as stop:
        try:
            result = run_up(fitted, directory, devices, view, stop, encoding=encoding, adopts=True)
        finally:
            view.close()
    if result.summary is None:
        again = f"alignfed up --devices {devices} --out {shlex.quote(str(directory))}"
        typer.echo(
            f"interrupted; what was done is kept, and no process is left. Go on with: {again}"
            " and the same recipe",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)
    loads = result.summary["model_loads"]
    words = ", ".join(f"{name} {number}" for name, number in loads.items())
    Console().print(f"model loads: {words}", highlight=False, soft_wrap=True)
