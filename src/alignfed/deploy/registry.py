"""The devices that may take part, and who they are: key, client, Flower's node id, revocation.

The file is replaced in one step under a lock, so that commands and a running server may use it at
once. A registry is a value: each change returns a new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignfed.deploy.pki import fingerprint, public_line, read_public_key, write_secret
from alignfed.deploy.settings import NAME_PATTERN, NAME_WORDS
from alignfed.errors import DeploymentError
from alignfed.training.naming import nearest_name

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        name: how people call it.
        client_id: which client of the federation it is.
        public_key: its key as an OpenSSH line without comment.
        node_id: Flower's number for it, once it is registered there.
        revoked_at_s: when it was shut out, in seconds since 1970; None while it may take part.
    """

    name: str
    client_id: int
    public_key: str
    node_id: int | None = None
    revoked_at_s: float | None = None

    @property
    def revoked(self) -> bool:
        """Whether it is shut out."""
        return self.revoked_at_s is not None

    @property
    def fingerprint(self) -> str:
        """Its key's fingerprint, as ``ssh-keygen -l`` shows it."""
        return fingerprint(self.public_key)


@dataclass(frozen=True, slots=True)
class Registry:
    """All devices, revoked ones included, in the order they were added."""

    devices: tuple[Device, ...] = ()

    @property
    def active(self) -> tuple[Device, ...]:
        """Those that are not revoked."""
        return tuple(device for device in self.devices if not device.revoked)

    def named(self, name: str) -> Device:
        """Return the device of a name, revoked or not.

        Raises:
            DeploymentError: there is none.
        """
        for device in reversed(self.devices):
            if device.name == name:
                return device
        known = [device.name for device in self.devices]
        near = nearest_name(name, known) or f"; known are {', '.join(known) or 'none'}"
        raise DeploymentError(f"there is no device {name!r}{near}", name=name)

    def by_node(self, node_id: int) -> Device | None:
        """Return the device Flower knows by a number, revoked or not; None if there is none."""
        return next((one for one in self.devices if one.node_id == node_id), None)

    def by_key(self, line: str) -> Device | None:
        """Return the device of a public key (OpenSSH line without comment), revoked or not."""
        return next((one for one in self.devices if one.public_key == line), None)

    def client_of(self, node_id: int) -> int | None:
        """Return the client behind a Flower node; None where it is unknown or revoked."""
        device = self.by_node(node_id)
        return None if device is None or device.revoked else device.client_id

    def next_client(self) -> int:
        """Return the smallest client number that no active device has."""
        used = {device.client_id for device in self.active}
        return next(number for number in range(len(used) + 1) if number not in used)

    def with_device(self, name: str, client_id: int, public_key: str) -> Registry:
        """Return the registry with a device more.

        Args:
            name: how people call it.
            client_id: which client it is.
            public_key: its key, an OpenSSH line.

        Raises:
            DeploymentError: the name, the client or the key is taken or not allowed. A revoked
                device frees its name and its client, never its key.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise DeploymentError(f"device name {name!r} must be {NAME_WORDS}", name=name)
        if client_id < 0:
            raise DeploymentError(
                f"client {client_id} must be 0 or more; leave it out to take the next free one",
                client_id=client_id,
            )
        line = public_line(read_public_key(public_key, f"the key of {name}"))
        for other in self.active:
            if other.name == name:
                raise DeploymentError(
                    f"device {name} exists already, as client {other.client_id}; choose another"
                    f" name, or revoke it first: alignfed deploy revoke {name}",
                    name=name,
                )
            if other.client_id == client_id:
                raise DeploymentError(
                    f"client {client_id} is device {other.name} already; take client"
                    f" {self.next_client()} or revoke {other.name} first",
                    client_id=client_id,
                )
        holder = self.by_key(line)
        if holder is not None:
            state = "revoked" if holder.revoked else "in use"
            raise DeploymentError(
                f"this key ({holder.fingerprint}) belongs to device {holder.name}, which is"
                f" {state}; a key stands for one device only: make a new one",
                name=holder.name,
            )
        return Registry((*self.devices, Device(name, client_id, line)))

    def with_node(self, name: str, node_id: int) -> Registry:
        """Return the registry with Flower's number of an active device.

        Raises:
            DeploymentError: there is no such active device, or another has that number.
        """
        device = self._active_named(name)
        holder = self.by_node(node_id)
        if holder is not None and holder != device:
            raise DeploymentError(
                f"node {node_id} is device {holder.name} already", node_id=node_id, name=name
            )
        return self._replaced(device, replace(device, node_id=node_id))

    def without(self, name: str, now_s: float) -> Registry:
        """Return the registry with a device shut out.

        Raises:
            DeploymentError: there is no such device, or it is revoked already.
        """
        device = self._active_named(name)
        return self._replaced(device, replace(device, revoked_at_s=now_s))

    def _active_named(self, name: str) -> Device:
        device = self.named(name)
        if device.revoked:
            raise DeploymentError(
                f"device {name} is revoked; add it anew with a new key to let it in again",
                name=name,
            )
        return device

    def _replaced(self, old: Device, new: Device) -> Registry:
        return Registry(tuple(new if one == old else one for one in self.devices))


def load_registry(path: Path) -> Registry:
    """Return the registry in a file; an absent file is an empty registry.

    Raises:
        DeploymentError: the file is damaged or of another format.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            raise DeploymentError(
                f"{path} has format {document['format']}, this version reads {FORMAT}; use the"
                " version of alignfed that wrote it",
                path=str(path),
            )
        return Registry(tuple(_device(entry) for entry in document["devices"]))
    except FileNotFoundError:
        return Registry()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeploymentError(
            f"{path} is damaged ({type(error).__name__}: {error}); put back its last copy",
            path=str(path),
        ) from error


def update_registry(path: Path, change: Callable[[Registry], Registry]) -> Registry:
    """Replace the registry in a file by what ``change`` makes of it, one writer at a time.

    Returns:
        The new registry.

    Raises:
        DeploymentError: it cannot be read or written, or ``change`` refuses.
    """
    with _locked(path):
        changed = change(load_registry(path))
        entries = [asdict(device) for device in changed.devices]
        text = json.dumps({"format": FORMAT, "devices": entries}, indent=1)
        write_secret(path, (text + "\n").encode("utf-8"), replace=True)
    return changed


class RegistryView:
    """The registry as it is on disk now; read again only when the file has changed."""

    def __init__(self, path: Path) -> None:
        """Watch the registry at ``path``."""
        self._path = path
        self._mark: tuple[int, ...] | None = None
        self._registry = Registry()

    def current(self) -> Registry:
        """Return the present registry.

        Raises:
            DeploymentError: the file is damaged.
        """
        mark = _mark(self._path)
        if mark != self._mark:
            self._registry = load_registry(self._path)
            self._mark = mark
        return self._registry


def _mark(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _device(entry: dict[str, Any]) -> Device:
    return Device(
        name=str(entry["name"]),
        client_id=int(entry["client_id"]),
        public_key=str(entry["public_key"]),
        node_id=None if entry["node_id"] is None else int(entry["node_id"]),
        revoked_at_s=None if entry["revoked_at_s"] is None else float(entry["revoked_at_s"]),
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeploymentError(
            f"{lock} cannot be opened: {error.strerror}; make its folder writable", path=str(lock)
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
