"""How a command ends badly: a clear sentence on standard error and an exit code, no traceback."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from alignfed.errors import AlignFedError, DeploymentError

REFUSED = 2
"""Exit code of a refusal; click uses the same for wrong arguments."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 + SIGINT."""

_DEPLOY_EXTRA = ("aiohttp", "cryptography", "flwr", "prometheus_client", "psutil")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Debugging:
    """Whether a refusal shows where it was raised; set once, by ``--debug``."""

    on: bool = False


debugging = _Debugging()


def refusing(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a command show what AlignFed refuses instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except AlignFedError as error:
            if debugging.on:
                raise
            show_refusal(error)
            raise typer.Exit(REFUSED) from None

    # Help keeps a docstring's line breaks; paragraphs are to flow.
    wrapped.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
    return wrapped


def require_deploy_extra() -> None:
    """Refuse where the packages of the extra ``deploy`` are not installed.

    Raises:
        DeploymentError: some are missing.
    """
    missing = [name for name in _DEPLOY_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise DeploymentError(
            f"{', '.join(missing)} not installed; real devices need the extra: pip install"
            " 'alignfed[deploy]'",
            missing=missing,
        )


def show_refusal(error: AlignFedError) -> None:
    """Write an error to standard error: a panel on a terminal, a plain line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(Panel(escape(str(error)), title="refused", border_style="red"))
    else:
        typer.echo(f"error: {error}", err=True)
