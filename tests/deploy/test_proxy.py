"""The proxy over real sockets and TLS, before a server that says what reached it."""

import asyncio
import datetime
import hashlib
import io
import ssl
import time

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from alignfed.deploy import pki
from alignfed.deploy.gate import Gate
from alignfed.deploy.proxy import Proxy, presenting, trusting
from alignfed.deploy.registry import RegistryView, update_registry
from alignfed.deploy.settings import LimitsSection
from tests.deploy.test_gate import replies, signed

MIB = 1024 * 1024
PUSH_OBJECT = "/v1/fleet/push-object"
PULL_OBJECT = "/v1/fleet/pull-object"
PUSH_MESSAGES = "/v1/fleet/push-messages"
ANSWER = bytes(range(256)) * (3 * MIB // 256)


class Upstream:
    """Stands where the SuperLink stands."""

    def __init__(self):
        self.seen = []

    async def handle(self, request):
        body = await request.read()
        self.seen.append((request.path, dict(request.headers), hashlib.sha256(body).hexdigest()))
        return web.Response(body=ANSWER, headers={"flwr-package-version": "1.41.0"})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.UTC)
    authority = pki.make_authority("test", now)
    certificate, key = pki.issue_certificate(authority, pki.LOOPBACK, now)
    pki.write_public(folder / "ca.crt", pki.certificate_text(authority.certificate))
    pki.write_public(folder / "s.crt", pki.certificate_text(certificate))
    pki.write_secret(folder / "s.key", pki.key_text(key))
    return folder


@pytest.fixture
def key(tmp_path):
    private, line = pki.make_device_key()
    path = tmp_path / "registry.json"
    update_registry(path, lambda known: known.with_device("a", 0, line))
    update_registry(path, lambda known: known.with_node("a", 10))
    return load_ssh_private_key(private, None)


def through_proxy(certificates, tmp_path, use, *, upstream=None, **limits):
    """Run ``use(session, base address)`` against a proxy, and return what it returns."""

    async def run():
        handler = upstream or Upstream()
        behind = web.Application(client_max_size=64 * MIB)
        behind.router.add_route("*", "/{path:.*}", handler.handle)
        context = presenting(certificates / "s.crt", certificates / "s.key")
        back = await _listen(behind, context)
        gate = Gate(
            RegistryView(tmp_path / "registry.json"),
            LimitsSection(**limits),
            time.monotonic,
            lambda: datetime.datetime.now(datetime.UTC),
        )
        proxy = Proxy(gate, f"https://127.0.0.1:{back.port}", trusting(certificates / "ca.crt"), 16)
        front = await _listen(proxy.application(), context)
        connector = aiohttp.TCPConnector(ssl=trusting(certificates / "ca.crt"))
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                return await use(session, f"https://127.0.0.1:{front.port}"), handler, proxy
        finally:
            await front.runner.cleanup()
            await back.runner.cleanup()

    return asyncio.run(run())


class _Listening:
    def __init__(self, runner, port):
        self.runner = runner
        self.port = port


async def _listen(application, context):
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    return _Listening(runner, site._server.sockets[0].getsockname()[1])


def test_bodies_pass_unchanged_both_ways(certificates, tmp_path, key):
    body = bytes(reversed(range(256))) * (5 * MIB // 256)
    headers = {**signed(key, _now()), "Content-Type": "application/x-protobuf"}

    async def use(session, base):
        async with session.post(
            base + PUSH_OBJECT, data=io.BytesIO(body), headers=headers
        ) as answer:
            return answer.status, await answer.read(), answer.headers["flwr-package-version"]

    found, upstream, proxy = through_proxy(certificates, tmp_path, use)
    assert found == (200, ANSWER, "1.41.0")
    (seen,) = upstream.seen
    assert seen[0] == PUSH_OBJECT
    assert seen[1]["Content-Type"] == "application/x-protobuf"
    assert seen[2] == hashlib.sha256(body).hexdigest()
    assert proxy.counts == {"status_200": 1}


def test_nothing_of_a_refused_request_reaches_the_superlink(certificates, tmp_path, key):
    async def use(session, base):
        statuses = []
        for path, headers, body in [
            ("/v1/control/start-run", signed(key, _now()), b""),
            (PULL_OBJECT, {}, b""),
            (PUSH_MESSAGES, signed(key, _now()), replies(10, 11)),
        ]:
            async with session.post(base + path, data=body, headers=headers) as answer:
                statuses.append(answer.status)
        return statuses

    found, upstream, proxy = through_proxy(certificates, tmp_path, use)
    assert found == [403, 401, 403]
    assert upstream.seen == []
    assert proxy.counts == {
        "refused_path": 1,
        "refused_unauthenticated": 1,
        "refused_forged_sender": 1,
    }


def test_a_devices_own_reply_passes_whole(certificates, tmp_path, key):
    body = replies(10, 10)

    async def use(session, base):
        headers = signed(key, _now())
        async with session.post(base + PUSH_MESSAGES, data=body, headers=headers) as answer:
            return answer.status

    found, upstream, _ = through_proxy(certificates, tmp_path, use)
    assert found == 200
    assert upstream.seen[0][2] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("announced", [True, False])
def test_an_oversize_body_is_refused_before_it_is_read_whole(
    certificates, tmp_path, key, announced
):
    sent = []

    async def pieces():
        for _ in range(400):
            sent.append(64 * 1024)
            yield bytes(64 * 1024)

    async def use(session, base):
        headers = signed(key, _now())
        if announced:
            headers["Content-Length"] = str(400 * 64 * 1024)
        try:
            async with session.post(base + PUSH_OBJECT, data=pieces(), headers=headers) as answer:
                return answer.status
        except aiohttp.ClientError:
            return "cut off"

    found, _, proxy = through_proxy(certificates, tmp_path, use, body_bytes=MIB)
    assert found in (413, "cut off")
    assert proxy.counts["refused_body_size"] == 1
    assert proxy.counts["status_200"] == 0
    assert sum(sent) < 400 * 64 * 1024


def test_a_superlink_that_is_down_is_a_reason_to_try_again(certificates, tmp_path, key):
    class Gone(Upstream):
        async def handle(self, request):
            request.transport.abort()
            return web.Response()

    async def use(session, base):
        async with session.post(base + PULL_OBJECT, headers=signed(key, _now())) as answer:
            return answer.status

    found, _, proxy = through_proxy(certificates, tmp_path, use, upstream=Gone())
    assert found == 502
    assert proxy.counts["refused_upstream"] == 1


def test_a_damaged_registry_lets_nobody_in(certificates, tmp_path, key):
    (tmp_path / "registry.json").write_text("{")

    async def use(session, base):
        async with session.post(base + PULL_OBJECT, headers=signed(key, _now())) as answer:
            return answer.status

    found, upstream, _ = through_proxy(certificates, tmp_path, use)
    assert found == 503
    assert upstream.seen == []


def test_plain_text_and_old_tls_get_no_answer(certificates, tmp_path, key):
    async def use(session, base):
        outcomes = []
        try:
            async with session.post(base.replace("https", "http") + PULL_OBJECT) as answer:
                outcomes.append(answer.status)
        except aiohttp.ClientError:
            outcomes.append("refused")
        old = trusting(certificates / "ca.crt")
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("ALL:@SECLEVEL=0")
        async with session.post(base + PULL_OBJECT, ssl=old, headers=signed(key, _now())) as answer:
            outcomes.append(answer.status)
        return outcomes

    found, _, _ = through_proxy(certificates, tmp_path, use)
    assert found == ["refused", 200]
    assert (
        presenting(certificates / "s.crt", certificates / "s.key").minimum_version
        >= ssl.TLSVersion.TLSv1_2
    )


def _now():
    return datetime.datetime.now(datetime.UTC)
