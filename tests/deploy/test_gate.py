"""What the gate lets through: signatures as Flower makes them, forged ones, rates and sizes."""

import base64
import datetime

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from alignfed.deploy.gate import ADDRESSES, PATHS, Bucket, Gate, Refusal
from alignfed.deploy.pki import make_device_key
from alignfed.deploy.registry import Device, RegistryView, update_registry
from alignfed.deploy.settings import LimitsSection

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
PULL = "/v1/fleet/pull-messages"


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture(scope="module")
def keys():
    made = [make_device_key() for _ in range(3)]
    return [(load_ssh_private_key(private, None), line) for private, line in made]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path, keys):
    path = tmp_path / "registry.json"
    for number, name in enumerate(("a", "b")):
        line = keys[number][1]
        update_registry(path, lambda known: known.with_device(name, number, line))  # noqa: B023
        update_registry(path, lambda known: known.with_node(name, 10 + number))  # noqa: B023
    return path


def gate_of(path, clock, **limits):
    return Gate(RegistryView(path), LimitsSection(**limits), clock, lambda: NOW)


@pytest.fixture
def gate(path, clock):
    return gate_of(path, clock)


def signed(key, at=NOW):
    stamp = at.isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(
            public_key_to_bytes(key.public_key())
        ).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, stamp.encode())).decode(),
        TIMESTAMP_HEADER: stamp,
    }


def replies(node_id, *senders):
    return PushMessagesRequest(
        node=Node(node_id=node_id),
        messages_list=[Message(metadata=Metadata(src_node_id=sender)) for sender in senders],
    ).SerializeToString()


@pytest.mark.parametrize("wanted", sorted(PATHS))
def test_a_registered_device_reaches_every_path_of_the_fleet(gate, keys, wanted):
    assert gate.admit("POST", wanted, signed(keys[0][0]), "x").name == "a"


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet//pull-messages"),
        ("POST", "/v1/fleet/%70ull-messages"),
        ("POST", "/V1/FLEET/PULL-MESSAGES"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/health"),
        ("POST", ""),
    ],
)
def test_everything_else_is_forbidden_even_to_a_registered_device(gate, keys, method, wanted):
    refusal = gate.admit(method, wanted, signed(keys[0][0]), "x")
    assert (refusal.status, refusal.reason) == (403, "path")


def test_an_unregistered_and_a_revoked_key_are_refused_at_once(gate, path, keys):
    assert gate.admit("POST", PULL, signed(keys[2][0]), "x").reason == "unregistered"
    assert isinstance(gate.admit("POST", PULL, signed(keys[0][0]), "x"), Device)
    update_registry(path, lambda known: known.without("a", 1.0))
    refusal = gate.admit("POST", PULL, signed(keys[0][0]), "x")
    assert (refusal.status, refusal.reason, refusal.device) == (401, "revoked", "a")


def forged(headers, **changes):
    return {**headers, **changes}


def test_a_signature_must_fit_key_and_time(gate, keys):
    ours, others = signed(keys[0][0]), signed(keys[1][0])
    minute = datetime.timedelta(minutes=1)
    for headers, words in [
        ({}, "has no key"),
        (
            forged(others, **{FLEET_HTTP_PUBLIC_KEY_HEADER: ours[FLEET_HTTP_PUBLIC_KEY_HEADER]}),
            "does not fit the key",
        ),
        (
            forged(ours, **{TIMESTAMP_HEADER: (NOW + minute / 30).isoformat()}),
            "does not fit the key",
        ),
        (signed(keys[0][0], NOW - 6 * minute), "signed 360 s ago"),
        (signed(keys[0][0], NOW + minute), "signed -60 s ago"),
        (forged(ours, **{TIMESTAMP_HEADER: "yesterday"}), "cannot be read"),
        (forged(ours, **{TIMESTAMP_HEADER: "2030-01-01T00:00:00"}), "cannot be read"),
        (forged(ours, **{FLEET_HTTP_SIGNATURE_HEADER: "!"}), "cannot be read"),
        (forged(ours, **{FLEET_HTTP_PUBLIC_KEY_HEADER: "AAAA"}), "cannot be read"),
        (forged(ours, **{TIMESTAMP_HEADER: "2030-01-01T00:00:00é"}), "cannot be read"),
    ]:
        refusal = gate.admit("POST", PULL, headers, "x")
        assert (refusal.status, refusal.reason) == (401, "unauthenticated")
        assert words in refusal.sentence


def test_a_device_answers_in_its_own_name_only(gate, keys):
    device = gate.admit("POST", PULL, signed(keys[0][0]), "x")
    assert gate.check_replies(device, replies(10, 10)) is None
    for body in (replies(10, 11), replies(11, 11), replies(10), replies(10, 10, 10), b""):
        assert gate.check_replies(device, body).reason == "forged_sender"
    assert gate.check_replies(device, b"\xff\xff").reason == "malformed"


def test_a_body_is_stopped_at_its_limit_announced_or_not(path, clock, keys):
    gate = gate_of(path, clock, body_bytes=100_000)
    device = gate.admit("POST", PULL, signed(keys[0][0]), "x")
    assert gate.announce(device, 100_000) is None
    assert gate.announce(device, None) is None
    assert gate.announce(device, 100_001).status == 413
    assert gate.receive(device, 50_000, 100_000) is None
    assert gate.receive(device, 1, 100_001).status == 413


def test_one_devices_haste_holds_up_nobody_else(path, clock, keys):
    gate = gate_of(path, clock, device_requests_per_minute=60)
    hasty = [gate.admit("POST", PULL, signed(keys[0][0]), "x") for _ in range(61)]
    assert hasty[-1].status == 503
    assert [one for one in hasty[:-1] if isinstance(one, Refusal)] == []
    assert gate.admit("POST", PULL, signed(keys[1][0]), "x").name == "b"
    clock.now_s += 1.0
    assert gate.admit("POST", PULL, signed(keys[0][0]), "x").name == "a"


def test_bytes_of_a_device_are_limited_by_the_minute(path, clock, keys):
    gate = gate_of(path, clock, device_bytes_per_minute=1024 * 1024)
    device = gate.admit("POST", PULL, signed(keys[0][0]), "x")
    assert gate.receive(device, 1024 * 1024, 1024 * 1024) is None
    assert gate.receive(device, 1, 1).reason == "device_bytes"
    clock.now_s += 30.0
    assert gate.receive(device, 512 * 1024, 512 * 1024) is None


def test_an_address_without_a_key_is_limited_before_any_signature_is_checked(path, clock):
    gate = gate_of(path, clock, address_requests_per_minute=60)
    answers = [gate.admit("POST", PULL, {}, "1.2.3.4").reason for _ in range(61)]
    assert answers[-2:] == ["unauthenticated", "address_rate"]
    assert gate.admit("POST", PULL, {}, "4.3.2.1").reason == "unauthenticated"


def test_memory_for_addresses_is_bounded(gate):
    for number in range(ADDRESSES + 50):
        gate.admit("GET", "/", {}, str(number))
    assert len(gate._addresses) == ADDRESSES


def test_a_bucket_never_holds_more_than_a_minutes_worth():
    bucket = Bucket(60, 0.0)
    assert bucket.take(60, 1e6)
    assert not bucket.take(1, 1e6)
    assert not bucket.take(1, 0.0), "a clock that goes back gives nothing"
