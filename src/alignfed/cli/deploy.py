"""``alignfed deploy``: a federation on real machines."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from alignfed.cli.refusal import refusing, require_deploy_extra

if TYPE_CHECKING:
    from alignfed.deploy.directory import ServerDirectory
    from alignfed.deploy.settings import ServerSettings

deploy_app = typer.Typer(
    name="deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a federation on real machines, behind Flower: keys, processes, status.",
    epilog="On the server: [b]alignfed deploy init fl --host fl.example.org[/b], then "
    "[b]alignfed deploy add-device fl phone-1[/b] for each device, then "
    "[b]alignfed deploy server fl[/b]. Copy [b]fl/devices/phone-1[/b] to the device over a safe "
    "channel, and there run [b]alignfed deploy device phone-1[/b]. Watch it with "
    "[b]alignfed deploy status fl[/b]. To try it all on one machine: [b]alignfed up[/b].",
)


@deploy_app.callback()
@refusing
def _root() -> None:
    require_deploy_extra()


ServerArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="The server's directory, made by deploy init.")
]
AnyArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A server's or a device's directory.")
]


@deploy_app.command(
    epilog="Examples: [b]alignfed deploy init fl --host fl.example.org --host 192.0.2.10[/b]; "
    "[b]alignfed deploy init fl --host 192.0.2.10 --recipe my.toml --port 443[/b]"
)
@refusing
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    host: Annotated[
        list[str],
        typer.Option(
            "--host",
            metavar="NAME",
            help="Name or address by which devices dial this server; the first goes into their "
            "settings, all into the certificate. May be given again and again.",
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE.toml", help="What to train; the built-in recipe if left out."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one key of the recipe."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The one port that devices must reach.")
    ] = 9443,
) -> None:
    """Make a server's directory: authority, certificates, settings, systemd unit.

    Nothing is started and nothing outside DIR is touched. What is secret can be read by you alone;
    ca/ca.key signs certificates and may be kept elsewhere until the next renewal.
    """
    from alignfed.config import default_recipe, load_recipe
    from alignfed.deploy.creating import create_server
    from alignfed.deploy.settings import ServerSettings, make_settings

    changes = overrides or []
    loaded = (
        default_recipe(changes)
        if recipe is None
        else load_recipe(recipe, changes, files_exist=False)  # a device's files are on the device
    )
    values = {"hosts": host, "port": port}
    settings = make_settings(ServerSettings, "the command line", values)
    made = create_server(directory, settings, loaded, _now())
    typer.echo(
        f"{made.root} made for {', '.join(settings.hosts)}, port {settings.port}\n"
        f"settings: {made.settings}   recipe: {made.recipe}   unit: {made.systemd}\n"
        f"next: alignfed deploy add-device {directory} NAME, once a device"
    )


@deploy_app.command(
    "add-device",
    epilog="Examples: [b]alignfed deploy add-device fl phone-1[/b]; with a key that never leaves "
    'the device: on it [b]ssh-keygen -t ecdsa -b 384 -N "" -f node.key[/b], on the server '
    "[b]alignfed deploy add-device fl phone-1 --public-key node.key.pub[/b]",
)
@refusing
def add_device(
    directory: ServerArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the device.")],
    client: Annotated[
        int | None,
        typer.Option(min=0, help="Which client of the federation it is; the next free one."),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The device's own public key, in OpenSSH format."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The device's own examples, as a path there; otherwise it takes its client's "
            "share of the recipe's data.",
        ),
    ] = None,
    runtime_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Its SuperNode's local port; devices on one machine need theirs."
        ),
    ] = None,
) -> None:
    """Let one more device take part, and make the directory to carry to it.

    A running server lets it in at once. The directory holds the device's private key (unless
    --public-key was given): carry it over a safe channel and delete it here.
    """
    from alignfed.deploy import creating

    server, settings = _server(directory)
    line = None
    if public_key is not None:
        line = _text_of(public_key)
    device = creating.add_device(
        server,
        settings,
        name,
        client_id=client,
        public_key=line,
        runtime_port=runtime_port,
        data=data,
    )
    typer.echo(f"device {name} may take part; its directory: {device.root}")
    if public_key is not None:
        typer.echo(f"on the device, put its private key beside it as {device.key.name}, mode 600")
    typer.echo(f"next: copy {device.root} to the device, and there: alignfed deploy device {name}")


@deploy_app.command(epilog="Example: [b]alignfed deploy revoke fl phone-1[/b]")
@refusing
def revoke(
    directory: ServerArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The device to shut out.")],
) -> None:
    """Shut a device out, at once and for good.

    The proxy refuses its very next request, a running server fails its task and refuses what it
    still sends, and its key is never accepted again. To let the device back in, add it anew with a
    new key.
    """
    from alignfed.deploy.registry import update_registry

    server, _ = _server(directory)
    update_registry(server.registry, lambda known: known.without(name, time.time()))
    typer.echo(f"device {name} is revoked; its next request will be refused")


@deploy_app.command(epilog="Example: [b]alignfed deploy renew fl[/b], then start the server again.")
@refusing
def renew(directory: ServerArgument) -> None:
    """Issue the server's certificates anew, for the hosts in deploy.toml, for two years.

    Devices notice nothing: they trust the authority, which lasts ten years.
    """
    from alignfed.deploy.creating import renew_certificates

    server, settings = _server(directory)
    renew_certificates(server, settings, _now())
    typer.echo(
        f"new certificates for {', '.join(settings.hosts)}; they are used from the next start on"
    )


@deploy_app.command(
    epilog="Example: [b]alignfed deploy server fl[/b]; as a service, install the unit in "
    "[b]fl/systemd[/b]. Ctrl-C or SIGTERM ends it; what was done is kept, and the next start goes "
    "on from there."
)
@refusing
def server(directory: ServerArgument) -> None:
    """Run a server: proxy, SuperLink, SuperExec and the run itself, until the recipe is done.

    Each part is started again if it dies. Devices reach the proxy alone; SuperLink, its control API
    and the metrics listen on loopback.
    """
    from alignfed.deploy.server import ServerHost
    from alignfed.deploy.supervisor import stop_on_signals
    from alignfed.deploy.thin_app import write_app

    made, settings = _server(directory)
    with stop_on_signals() as stop:
        host = ServerHost(made, settings, write_app(made.app), adopts=True)
        try:
            host.start()
            typer.echo(
                f"serving on {settings.bind}:{settings.port}; alignfed deploy status {made.root}"
            )
            host.run(stop)
        finally:
            host.stop()
    typer.echo("the run is complete" if host.completed else "stopped; start it again to go on")


@deploy_app.command(
    epilog="Example: [b]alignfed deploy device phone-1[/b]; as a service, install the unit that "
    "[b]--unit[/b] writes."
)
@refusing
def device(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory add-device made, carried here.")
    ],
    unit: Annotated[
        bool, typer.Option("--unit", help="Only write a systemd unit for this device.")
    ] = False,
) -> None:
    """Run a device: a trainer that loads the model once, and Flower's SuperNode, until stopped.

    It only dials out. Its data stay here; what leaves is the adapter's update and the agreed
    figures. Finished work waits on disk until the server has it for sure.
    """
    from alignfed.deploy.creating import write_device_unit
    from alignfed.deploy.directory import DeviceDirectory
    from alignfed.deploy.host import DeviceHost
    from alignfed.deploy.settings import load_device_settings
    from alignfed.deploy.supervisor import stop_on_signals

    made = DeviceDirectory(directory)
    settings = load_device_settings(made.settings)
    if unit:
        typer.echo(f"{write_device_unit(made)} written; install it with: systemctl enable --now")
        return
    with stop_on_signals() as stop:
        host = DeviceHost(made, settings, adopts=True)
        try:
            host.start()
            typer.echo(
                f"{settings.name} dials {settings.server}; alignfed deploy status {made.root}"
            )
            host.run(stop)
        finally:
            host.stop()
    typer.echo("stopped; unfinished work is given up, finished work is kept")


@deploy_app.command(
    epilog="Examples: [b]alignfed deploy status fl[/b]; "
    "[b]alignfed deploy status fl --json | jq .run[/b]"
)
@refusing
def status(
    directory: AnyArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show processes, devices, version, tasks in flight, staleness, uploads, refusals, errors.

    Reads what the processes leave on disk, so it works while nothing runs, too.
    """
    from alignfed.cli.deploy_view import print_device, print_server
    from alignfed.deploy.directory import DeviceDirectory
    from alignfed.deploy.status import device_picture, server_picture

    console = Console()
    if DeviceDirectory(directory).settings.exists():
        found = device_picture(DeviceDirectory(directory), _now())
        show = print_device
    else:
        made, settings = _server(directory)
        found = server_picture(made, settings, _now())
        show = print_server
    if as_json:
        typer.echo(json.dumps(found, indent=1, default=str))
    else:
        show(console, found)


@deploy_app.command(
    epilog="Examples: [b]alignfed deploy logs fl[/b] lists the logs; "
    "[b]alignfed deploy logs fl proxy -n 50[/b]"
)
@refusing
def logs(
    directory: AnyArgument,
    name: Annotated[
        str | None, typer.Argument(metavar="PROCESS", help="Whose; all are listed without.")
    ] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many lines.")] = 40,
) -> None:
    """Show the last lines a process wrote. Logs are bounded; the oldest lines go first."""
    from alignfed.cli.deploy_view import print_log, print_logs

    if name is None:
        print_logs(Console(), directory / "logs")
    else:
        print_log(directory / "logs", name, lines)


def _server(root: Path) -> tuple[ServerDirectory, ServerSettings]:
    from alignfed.deploy.directory import ServerDirectory
    from alignfed.deploy.settings import load_server_settings

    directory = ServerDirectory(root)
    return directory, load_server_settings(directory.settings)


def _text_of(path: Path) -> str:
    from alignfed.errors import DeploymentError

    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read: {error}", path=str(path)) from error


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
