"""Who may pass to the SuperLink, and with what. Decides only: no sockets; clocks are passed in.

Flower's SuperLink serves its control API on the port that devices reach, and checks that a request
comes from the node it names, but not that a reply inside it does. So whatever is not listed here is
refused, each request's signature is checked against our registry, and replies must carry the
sender's own node id.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from google.protobuf.message import DecodeError

from alignfed.deploy.pki import public_line
from alignfed.deploy.registry import Device, RegistryView
from alignfed.deploy.settings import LimitsSection

PREFIX = "/v1/fleet/"
PUSH_MESSAGES = PREFIX + "push-messages"

PATHS = frozenset(
    PREFIX + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
"""What a SuperNode with a key calls. Registering itself is not among it: that is the operator's."""

ADDRESSES = 10_000
"""Addresses whose rate is remembered; the one not heard of for longest is forgotten."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further.

    Attributes:
        status: 401 makes a SuperNode stop, 503 makes it try again, 403 and 413 give up the message.
        reason: one word for counts.
        sentence: for the log and the answer.
        device: whose key it was, where known.
    """

    status: HTTPStatus
    reason: str
    sentence: str
    device: str | None = None


class Bucket:
    """A token bucket: so many a minute, and a minute's worth at once."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        """Start full."""
        self._per_minute = per_minute
        self._level = per_minute
        self._at_s = now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Take ``amount`` if it is there."""
        gained = max(0.0, now_s - self._at_s) * self._per_minute / 60.0
        self._level = min(self._per_minute, self._level + gained)
        self._at_s = now_s
        if amount > self._level:
            return False
        self._level -= amount
        return True


class Gate:
    """Decides about requests. One event loop uses it; it is not for several threads."""

    def __init__(
        self,
        registry: RegistryView,
        limits: LimitsSection,
        clock: Callable[[], float],
        now: Callable[[], datetime.datetime],
    ) -> None:
        """Open the gate.

        Args:
            registry: who may take part.
            limits: how much each may send.
            clock: seconds that only grow, for rates.
            now: the present with a time zone, for signatures.
        """
        self._registry = registry
        self._limits = limits
        self._clock = clock
        self._now = now
        self._addresses: OrderedDict[str, Bucket] = OrderedDict()
        self._requests: dict[str, Bucket] = {}
        self._bytes: dict[str, Bucket] = {}

    def admit(
        self, method: str, path: str, headers: Mapping[str, str], address: str
    ) -> Device | Refusal:
        """Return the device a request comes from, or why it may not pass.

        Args:
            method: HTTP method.
            path: the raw path, without query.
            headers: by name in lower case.
            address: the peer's.

        Raises:
            DeploymentError: the registry cannot be read; nobody passes then.
        """
        if not self._address(address).take(1, self._clock()):
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "address_rate",
                f"more than {self._limits.address_requests_per_minute} requests a minute from"
                f" {address}",
            )
        if method != "POST" or path not in PATHS:
            return Refusal(
                HTTPStatus.FORBIDDEN, "path", f"{method} {path[:100]!r} is not for devices"
            )
        line = _signed_by(headers, self._now())
        if isinstance(line, Refusal):
            return line
        device = self._registry.current().by_key(line)
        if device is None:
            return Refusal(HTTPStatus.UNAUTHORIZED, "unregistered", "no device has this key")
        if device.revoked:
            return Refusal(
                HTTPStatus.UNAUTHORIZED, "revoked", f"device {device.name} is revoked", device.name
            )
        requests = self._requests.setdefault(
            line, Bucket(self._limits.device_requests_per_minute, self._clock())
        )
        if not requests.take(1, self._clock()):
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "device_rate",
                f"more than {self._limits.device_requests_per_minute} requests a minute",
                device.name,
            )
        return device

    def announce(self, device: Device, length: int | None) -> Refusal | None:
        """Return why a body of a stated length may not be sent; unknown lengths pass here."""
        if length is not None and length > self._limits.body_bytes:
            return self._too_large(device, length)
        return None

    def receive(self, device: Device, piece: int, so_far: int) -> Refusal | None:
        """Return why a body may not go on.

        Args:
            device: whose it is.
            piece: bytes that just came.
            so_far: bytes of this body, the piece included.
        """
        if so_far > self._limits.body_bytes:
            return self._too_large(device, so_far)
        bucket = self._bytes.setdefault(
            device.public_key, Bucket(self._limits.device_bytes_per_minute, self._clock())
        )
        if not bucket.take(piece, self._clock()):
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "device_bytes",
                f"more than {self._limits.device_bytes_per_minute} bytes a minute",
                device.name,
            )
        return None

    def check_replies(self, device: Device, body: bytes) -> Refusal | None:
        """Return why replies may not pass: each must carry the sender's own node id.

        Args:
            device: the sender, by its key.
            body: a ``PushMessagesRequest``.
        """
        try:
            request = PushMessagesRequest.FromString(body)
        except DecodeError:
            return Refusal(
                HTTPStatus.BAD_REQUEST, "malformed", "no push-messages request", device.name
            )
        claimed = {request.node.node_id}
        claimed.update(message.metadata.src_node_id for message in request.messages_list)
        if len(request.messages_list) != 1 or claimed != {device.node_id}:
            return Refusal(
                HTTPStatus.FORBIDDEN,
                "forged_sender",
                f"node {device.node_id} sent {len(request.messages_list)} replies in the name of"
                f" {sorted(claimed)}",
                device.name,
            )
        return None

    def _too_large(self, device: Device, length: int) -> Refusal:
        return Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body_size",
            f"a body of {length} bytes; at most {self._limits.body_bytes} are taken"
            " (limits.body_bytes)",
            device.name,
        )

    def _address(self, address: str) -> Bucket:
        bucket = self._addresses.get(address)
        if bucket is None:
            bucket = Bucket(self._limits.address_requests_per_minute, self._clock())
            self._addresses[address] = bucket
            if len(self._addresses) > ADDRESSES:
                self._addresses.popitem(last=False)
        self._addresses.move_to_end(address)
        return bucket


def _signed_by(headers: Mapping[str, str], now: datetime.datetime) -> str | Refusal:
    """Return the OpenSSH line of the key that signed a request's time, as Flower signs it."""
    try:
        pem = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = headers[TIMESTAMP_HEADER]
        age_s = (now - datetime.datetime.fromisoformat(stamp)).total_seconds()
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return _unauthenticated("the key is not on an elliptic curve")
        key.verify(signature, stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except KeyError as missing:
        return _unauthenticated(f"header {missing} is missing; the SuperNode has no key")
    except InvalidSignature:
        return _unauthenticated("the signature does not fit the key")
    except (ValueError, TypeError, UnicodeError, UnsupportedAlgorithm, binascii.Error):
        return _unauthenticated("key, time or signature cannot be read")
    if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        return _unauthenticated(
            f"signed {age_s:.0f} s ago, allowed are {-SYSTEM_TIME_TOLERANCE} to"
            f" {TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE}; set the device's clock"
        )
    return public_line(key)


def _unauthenticated(sentence: str) -> Refusal:
    return Refusal(HTTPStatus.UNAUTHORIZED, "unauthenticated", sentence)
