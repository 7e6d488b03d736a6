"""The one door to the outside: TLS, and behind it only what ``gate.py`` lets through.

Bodies are passed on piece by piece, so that memory does not grow with an adapter; only a
``push-messages`` request, which holds no tensors, is read whole to look at its sender. Run as
``python -m alignfed.deploy.proxy DIR``.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import signal
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path

import aiohttp
from aiohttp import web

from alignfed.deploy.directory import ServerDirectory
from alignfed.deploy.gate import PUSH_MESSAGES, Gate, Refusal
from alignfed.deploy.records import log_record, write_json
from alignfed.deploy.registry import Device, RegistryView
from alignfed.deploy.settings import ServerSettings, load_server_settings
from alignfed.errors import DeploymentError

_HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "forwarded",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-for",
    )
)
"""Headers that belong to one connection, or that a device might forge."""

COUNTS_EVERY_S = 5.0
LOGGED_REFUSALS_PER_MINUTE = 600
"""A flood of refusals is counted in full but logged in part."""


class TooMuchError(Exception):
    """A body went on past what its sender may send."""

    def __init__(self, refusal: Refusal) -> None:
        """Keep why."""
        super().__init__(refusal.sentence)
        self.refusal = refusal


class Proxy:
    """Passes requests on to the SuperLink."""

    def __init__(
        self, gate: Gate, upstream: str, trusted: ssl.SSLContext, connections: int
    ) -> None:
        """Make a proxy.

        Args:
            gate: who may pass.
            upstream: the SuperLink, as ``https://127.0.0.1:port``.
            trusted: by what the SuperLink's certificate is judged.
            connections: open at once towards the SuperLink.
        """
        self.counts: Counter[str] = Counter()
        self._gate = gate
        self._upstream = upstream
        self._trusted = trusted
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._minute = 0
        self._logged = 0

    def application(self) -> web.Application:
        """Return the application to serve."""
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{path:.*}", self._handle)
        application.cleanup_ctx.append(self._client)
        return application

    async def _client(self, _: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(ssl=self._trusted, limit=self._connections)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        ) as session:
            self._session = session
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            found = self._gate.admit(request.method, path, headers, request.remote or "unknown")
        except DeploymentError as error:
            # Without a registry nobody is known, so nobody passes; devices try again.
            found = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "registry", str(error))
        if isinstance(found, Refusal):
            return self._refuse(request, found)
        refusal = self._gate.announce(found, request.content_length)
        if refusal is not None:
            return self._refuse(request, refusal)
        try:
            if path != PUSH_MESSAGES:
                return await self._pass_on(request, path, self._pieces(request, found))
            whole = b"".join([piece async for piece in self._pieces(request, found)])
            refusal = self._gate.check_replies(found, whole)
            if refusal is not None:
                return self._refuse(request, refusal)
            return await self._pass_on(request, path, io.BytesIO(whole))
        except TooMuchError as much:
            return self._refuse(request, much.refusal)
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error.__cause__, TooMuchError):
                return self._refuse(request, error.__cause__.refusal)
            return self._refuse(
                request,
                Refusal(
                    HTTPStatus.BAD_GATEWAY,
                    "upstream",
                    f"the SuperLink does not answer ({type(error).__name__})",
                    found.name,
                ),
            )

    async def _pieces(self, request: web.Request, device: Device) -> AsyncIterator[bytes]:
        so_far = 0
        async for piece in request.content.iter_any():
            so_far += len(piece)
            refusal = self._gate.receive(device, len(piece), so_far)
            if refusal is not None:
                raise TooMuchError(refusal)
            yield piece

    async def _pass_on(
        self, request: web.Request, path: str, body: io.BytesIO | AsyncIterator[bytes]
    ) -> web.StreamResponse:
        assert self._session is not None
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP
        ]
        if not isinstance(body, io.BytesIO) and request.content_length is not None:
            headers.append(("Content-Length", str(request.content_length)))
        async with self._session.post(
            self._upstream + path, data=body, headers=headers, allow_redirects=False
        ) as answer:
            self.counts[f"status_{answer.status}"] += 1
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP and name.lower() not in ("server", "date"):
                    response.headers.add(name, value)
            if answer.content_length is not None:
                response.content_length = answer.content_length
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    def _refuse(self, request: web.Request, refusal: Refusal) -> web.Response:
        self.counts[f"refused_{refusal.reason}"] += 1
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._logged = minute, 0
        self._logged += 1
        if self._logged <= LOGGED_REFUSALS_PER_MINUTE:
            log_record(
                "refused",
                status=int(refusal.status),
                reason=refusal.reason,
                detail=refusal.sentence,
                device=refusal.device,
                address=request.remote,
                path=request.path[:100],
            )
        response = web.json_response(
            {"error": refusal.reason, "detail": refusal.sentence}, status=refusal.status
        )
        if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = "5"
        # The rest of the body is not read, so the connection cannot be used again.
        response.force_close()
        return response


async def serve(directory: ServerDirectory, settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        DeploymentError: certificates are missing or the port cannot be had.
    """
    gate = Gate(
        RegistryView(directory.registry),
        settings.limits,
        time.monotonic,
        lambda: datetime.datetime.now(datetime.UTC),
    )
    proxy = Proxy(
        gate,
        f"https://127.0.0.1:{settings.superlink_port}",
        trusting(directory.ca_certificate),
        settings.limits.connections,
    )
    runner = web.AppRunner(
        proxy.application(), access_log=None, keepalive_timeout=75, shutdown_timeout=3
    )
    await runner.setup()
    site = web.TCPSite(
        runner,
        settings.bind,
        settings.port,
        ssl_context=presenting(directory.proxy_certificate, directory.proxy_key),
        backlog=min(settings.limits.connections, 1024),
    )
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise DeploymentError(
            f"{settings.bind}:{settings.port} cannot be listened on: {error.strerror}; set port or"
            f" bind in {directory.settings}, or stop what uses it",
            bind=settings.bind,
            port=settings.port,
        ) from error
    log_record("listening", bind=settings.bind, port=settings.port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    counts = directory.state / "proxy.json"
    while not stop.is_set():
        write_json(counts, {"time_s": time.time(), "counts": dict(proxy.counts)})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), COUNTS_EVERY_S)
    await runner.cleanup()


def presenting(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return how a server shows itself: TLS 1.2 or newer.

    Raises:
        DeploymentError: a file is missing or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise DeploymentError(
            f"{certificate} and {key} cannot be used: {error}; make them with alignfed deploy"
            " renew",
            path=str(certificate),
        ) from error
    return context


def trusting(authority: Path) -> ssl.SSLContext:
    """Return how a client judges a server: by one authority alone.

    Raises:
        DeploymentError: the file is missing or holds no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise DeploymentError(
            f"{authority} holds no certificate: {error}", path=str(authority)
        ) from error
    return context


def main() -> None:
    """Serve the directory named on the command line."""
    directory = ServerDirectory(Path(sys.argv[1]))
    try:
        asyncio.run(serve(directory, load_server_settings(directory.settings)))
    except DeploymentError as error:
        log_record("failed", detail=str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
