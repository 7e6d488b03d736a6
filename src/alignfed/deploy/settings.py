"""A deployment's settings: validated as recipes are, unknown keys refused with the nearest name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from alignfed.config.document import write_commented, write_recipe
from alignfed.config.problems import problems_of
from alignfed.config.section import Section, UnfitError, key, table
from alignfed.errors import DeploymentError

MIB = 1024 * 1024

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_WORDS = (
    "at most 64 letters, digits, dots, dashes and underscores, starting with a letter or digit"
)

Port = Annotated[int, Field(ge=1, le=65535)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class LimitsSection(Section):
    """What the proxy lets through; a device that sends more is told to wait."""

    body_bytes: int = key(
        8 * MIB,
        "Largest request body, in bytes. Flower cuts payloads into pieces of 5 MiB, so this bounds"
        " a piece, not an adapter.",
        ge=64 * 1024,
    )
    device_requests_per_minute: int = key(
        1200, "Requests of one device a minute; an idle one makes about 25.", ge=60
    )
    device_bytes_per_minute: int = key(1024 * MIB, "Bytes one device may send a minute.", ge=MIB)
    address_requests_per_minute: int = key(
        12000, "Requests of one address a minute; devices behind one router share it.", ge=60
    )
    connections: int = key(1024, "Connections open at once.", ge=8)


class LogSection(Section):
    """Logs of the processes; old ones are dropped."""

    bytes: int = key(10 * MIB, "Size at which a log starts anew, in bytes.", ge=4096)
    files: int = key(3, "Old logs kept of each process.", ge=0, le=100)


class ServingSection(Section):
    """How the server deals with devices."""

    encoding: Literal["fp32", "bf16", "fp16", "int8"] = key(
        "bf16", "Numbers of an adapter on the wire; int8 is blockwise with error feedback."
    )
    time_to_live_s: float = key(
        3600.0,
        "Seconds a device is given for its first answer; later ones by how long its tasks took. A"
        " task without an answer is sent again, at most three times.",
        ge=30,
    )
    poll_s: float = key(0.5, "Seconds between looks for answers.", gt=0, le=60)
    keep_payloads: bool = key(
        False, "Keep every upload, so that the run can be replayed from its start."
    )
    replay_bytes: int = key(
        256_000_000,
        "Else so many bytes of the last uploads, beyond what recovery needs, so that what happened"
        " lately can be replayed.",
        ge=0,
    )


class ServerSettings(Section):
    """Everything about a server that is not the recipe."""

    hosts: Names = key(
        ...,
        "Names and addresses that devices dial; all stand in the certificate, and the first goes"
        " into the devices' settings.",
        allowed="a list of at least 1 host name or address",
        suggested=("fl.example.org", "192.0.2.10"),
    )
    port: Port = key(9443, "The one port that devices reach.")
    bind: str = key("0.0.0.0", "Address the proxy listens on.", min_length=1)
    superlink_port: Port = key(9080, "Port of Flower's SuperLink, on loopback only.")
    metrics_bind: str = key(
        "127.0.0.1", "Address of the Prometheus endpoint; it has no lock of its own.", min_length=1
    )
    metrics_port: int = key(9464, "Port of the Prometheus endpoint; 0 for none.", ge=0, le=65535)
    run: str = key(
        "run",
        "Folder of the run's files, the same as a simulated run's; relative to this file's folder.",
        min_length=1,
    )
    serving: ServingSection = table(ServingSection, "How the server deals with devices.")
    limits: LimitsSection = table(LimitsSection, "What the proxy lets through.")
    log: LogSection = table(LogSection, "Logs of the processes.")

    def run_folder(self, root: Path) -> Path:
        """Return the folder of the run's files for a server whose directory is ``root``."""
        return (root.resolve() / self.run).resolve()

    @model_validator(mode="after")
    def _fits(self) -> ServerSettings:
        problems = [
            ("hosts", f"{host!r} is no host name or address; leave out port and scheme")
            for host in self.hosts
            if not host or any(part in host for part in ("/", " ", "://", "@"))
        ]
        ports = {"port": self.port, "superlink_port": self.superlink_port}
        if self.metrics_port:
            ports["metrics_port"] = self.metrics_port
        for name, port in ports.items():
            earlier = next(other for other, used in ports.items() if used == port)
            if earlier != name:
                problems.append((name, f"{port} is {earlier} too; give each its own"))
        if problems:
            raise UnfitError(problems)
        return self


class DeviceSettings(Section):
    """Everything about a device that is not the recipe."""

    name: str = key(
        ...,
        "The device's name, as the server knows it.",
        pattern=NAME_PATTERN,
        allowed=NAME_WORDS,
        suggested="phone-1",
    )
    client: int = key(
        ..., "Which client of the federation it is; the server fixes this.", ge=0, suggested=0
    )
    server: str = key(
        ...,
        "Where the server is, as host:port.",
        pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}$",
        allowed="host:port; an IPv6 address stands in brackets",
        suggested="fl.example.org:9443",
    )
    runtime_port: Port = key(
        9094, "Port of Flower's SuperNode on loopback; devices that share a machine need their own."
    )
    data: str | None = key(
        None,
        "The device's own examples, as data.path of a recipe; unset takes client's share of the"
        " recipe's data, as a simulation deals it.",
        min_length=1,
        suggested="/data/examples.jsonl",
    )
    compute: str | None = key(
        None,
        "Where the trainer computes; unset: the recipe's model.device.",
        min_length=1,
        suggested="cuda",
    )
    threads: int | None = key(
        None, "Threads of the trainer; unset leaves it to torch.", ge=1, suggested=2
    )
    outbox_bytes: int = key(
        512 * MIB, "Room for finished uploads that wait for the server, in bytes.", ge=MIB
    )
    log: LogSection = table(LogSection, "Logs of the processes.")


Settings = TypeVar("Settings", bound=Section)

SERVER_OPENING = """\
Settings of this server. Start it with: alignfed deploy server THIS-FOLDER

After a change of hosts, run: alignfed deploy renew THIS-FOLDER"""

DEVICE_OPENING = """\
Settings of this device. Start it with: alignfed deploy device THIS-FOLDER"""


def load_server_settings(path: Path) -> ServerSettings:
    """Return a server's settings.

    Raises:
        DeploymentError: the file cannot be read or has problems; all are listed.
    """
    return _load(path, ServerSettings, "alignfed deploy init DIR makes one")


def load_device_settings(path: Path) -> DeviceSettings:
    """Return a device's settings.

    Raises:
        DeploymentError: the file cannot be read or has problems; all are listed.
    """
    return _load(path, DeviceSettings, "alignfed deploy add-device makes one, on the server")


def make_settings(kind: type[Settings], source: str, values: dict[str, Any]) -> Settings:
    """Return validated settings from plain values.

    Args:
        kind: which settings.
        source: where the values are from, for the message.
        values: nested mappings, as TOML gives them.

    Raises:
        DeploymentError: there are problems; all are listed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = problems_of(error, kind)
        number = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DeploymentError(
            f"{source} has {number}:{lines}", source=source, problems=tuple(problems)
        ) from None


def settings_text(settings: ServerSettings | DeviceSettings) -> str:
    """Return settings as commented TOML; reading it gives the same settings."""
    opening = SERVER_OPENING if isinstance(settings, ServerSettings) else DEVICE_OPENING
    return write_commented(settings, opening)


def bare_text(settings: ServerSettings | DeviceSettings) -> str:
    """Return settings as TOML without comments."""
    return write_recipe(settings)


def _load(path: Path, kind: type[Settings], remedy: str) -> Settings:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DeploymentError(f"{path} does not exist; {remedy}", path=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise DeploymentError(f"{path} is not valid TOML: {error}", path=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read: {error}", path=str(path)) from error
    return make_settings(kind, str(path), values)
