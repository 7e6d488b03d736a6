"""Making deployments: a server's directory, the devices' directories, new certificates."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from alignfed.config import Recipe, load_recipe
from alignfed.deploy import pki
from alignfed.deploy.directory import DeviceDirectory, ServerDirectory
from alignfed.deploy.registry import Registry, load_registry, update_registry
from alignfed.deploy.settings import DeviceSettings, ServerSettings, make_settings, settings_text
from alignfed.errors import DeploymentError

_SERVER_UNIT = """\
[Unit]
Description=AlignFed server in {folder}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart={command} deploy server {folder}
{common}
"""

_DEVICE_UNIT = """\
[Unit]
Description=AlignFed device in {folder}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart={command} deploy device {folder}
{common}
"""

_COMMON = """\
# A finished run ends with exit code 0 and is not started again.
Restart=on-failure
RestartSec=10
KillMode=mixed
TimeoutStopSec=45
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target"""


def create_server(
    root: Path, settings: ServerSettings, recipe: Recipe, now: datetime.datetime
) -> ServerDirectory:
    """Make a server's directory with keys, certificates, settings and units.

    Args:
        root: a folder that holds no deployment yet.
        settings: how the server is set up.
        recipe: what is to be trained.
        now: the present, with a time zone.

    Raises:
        DeploymentError: there is a deployment already, or something cannot be written.
    """
    directory = ServerDirectory(root)
    if directory.settings.exists() or directory.ca_key.exists():
        raise DeploymentError(
            f"{root} holds a deployment already; choose another directory, or change"
            f" {directory.settings} by hand",
            path=str(root),
        )
    directory.prepare()
    authority = pki.make_authority(f"AlignFed {recipe.name}"[:64], now)
    pki.write_secret(directory.ca_key, pki.key_text(authority.key))
    pki.write_public(directory.ca_certificate, pki.certificate_text(authority.certificate))
    _issue(directory, settings, authority, now)
    pki.write_secret(directory.superexec_secret, pki.make_secret())
    pki.write_public(directory.recipe, recipe.to_toml().encode("utf-8"))
    pki.write_secret(directory.registry, b'{"format": 1, "devices": []}\n')
    unit = directory.systemd / "alignfed-server.service"
    pki.write_public(unit, _unit(_SERVER_UNIT, root.resolve()))
    # Written last: a directory with settings is complete.
    pki.write_public(directory.settings, settings_text(settings).encode("utf-8"))
    return directory


def renew_certificates(
    directory: ServerDirectory, settings: ServerSettings, now: datetime.datetime
) -> None:
    """Issue the server's certificates anew, for the hosts in its settings. Devices notice nothing.

    Raises:
        DeploymentError: the authority's key is not there, or something cannot be written.
    """
    authority = pki.read_authority(directory.ca_certificate, directory.ca_key)
    _issue(directory, settings, authority, now)


def add_device(
    directory: ServerDirectory,
    settings: ServerSettings,
    name: str,
    *,
    client_id: int | None = None,
    public_key: str | None = None,
    runtime_port: int | None = None,
    data: str | None = None,
) -> DeviceDirectory:
    """Let a device take part, and make the directory to carry to it.

    Args:
        directory: the server's.
        settings: its settings.
        name: how people call the device.
        client_id: which client it is; None takes the next free number.
        public_key: its key, where it was made on the device; None makes a pair here.
        runtime_port: its SuperNode's port, where several devices share a machine.
        data: its own examples; None for the share of the recipe's data.

    Raises:
        DeploymentError: name, client or key are taken, or something cannot be written.
    """
    recipe = load_recipe(directory.recipe, files_exist=False)
    private, line = (None, public_key) if public_key is not None else pki.make_device_key()
    known = load_registry(directory.registry)
    chosen = known.next_client() if client_id is None else client_id
    known.with_device(name, chosen, line)  # refuses before anything is written
    _check_client(recipe, chosen, data)
    device = directory.device(name)
    host = settings.hosts[0]
    dialled = f"[{host}]" if ":" in host else host
    values: dict[str, object] = {
        "name": name,
        "client": chosen,
        "server": f"{dialled}:{settings.port}",
    }
    if runtime_port is not None:
        values["runtime_port"] = runtime_port
    if data is not None:
        values["data"] = data
    if device.settings.exists():
        _put_aside(directory, known, name)
    made = make_settings(DeviceSettings, f"device {name}", values)
    device.prepare()
    pki.write_public(device.ca_certificate, directory.ca_certificate.read_bytes())
    pki.write_public(device.recipe, directory.recipe.read_bytes())
    if private is not None:
        pki.write_secret(device.key, private)
    pki.write_public(device.public_key, (line.strip() + "\n").encode("ascii"))
    pki.write_public(device.settings, settings_text(made).encode("utf-8"))
    update_registry(directory.registry, lambda present: present.with_device(name, chosen, line))
    return device


def write_device_unit(device: DeviceDirectory) -> Path:
    """Write a systemd unit for a device where it lives, and return it.

    Raises:
        DeploymentError: it cannot be written.
    """
    unit = device.systemd / "alignfed-device.service"
    pki.write_public(unit, _unit(_DEVICE_UNIT, device.root.resolve()), replace=True)
    return unit


def _issue(
    directory: ServerDirectory,
    settings: ServerSettings,
    authority: pki.Authority,
    now: datetime.datetime,
) -> None:
    for hosts, certificate, key in (
        (settings.hosts, directory.proxy_certificate, directory.proxy_key),
        (pki.LOOPBACK, directory.superlink_certificate, directory.superlink_key),
    ):
        issued, secret = pki.issue_certificate(authority, hosts, now)
        pki.write_secret(key, pki.key_text(secret), replace=True)
        pki.write_public(certificate, pki.certificate_text(issued), replace=True)


def _check_client(recipe: Recipe, client_id: int, data: str | None) -> None:
    number = recipe.data.partition.num_clients
    if data is None and number is not None and client_id >= number:
        raise DeploymentError(
            f"client {client_id} has no share of the recipe's data, which is dealt to clients 0 to"
            f" {number - 1}; give the device its own with --data, or raise"
            " data.partition.num_clients in the recipe",
            client_id=client_id,
            num_clients=number,
        )


def _put_aside(directory: ServerDirectory, known: Registry, name: str) -> None:
    """Move the directory of a revoked device of the same name out of the way."""
    number = sum(device.name == name for device in known.devices)
    directory.device(name).root.replace(directory.devices / f"{name}.revoked-{number}")


def _unit(template: str, folder: Path) -> bytes:
    command = Path(sys.executable).parent / "alignfed"
    quoted = str(folder).replace("%", "%%")
    if any(character in quoted for character in ' "\\'):
        quoted = '"' + quoted.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return template.format(folder=quoted, command=command, common=_COMMON).encode("utf-8")
