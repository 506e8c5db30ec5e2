"""Readiness, and the small HTTP server that tells it: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

from pyflannel.control.patience import within
from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management.notify import notify

log = logging.getLogger(__name__)

REQUEST_BYTES = 8192
REQUEST_SECONDS = 5.0

STARTING, STARTS = "starting", "the node is starting"

HUNG = "hung"
"""The one reason that a restart mends, so /healthz fails by it too."""


class Readiness:
    """The reasons why the node is not ready; none means ready. Starts with `starting`."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {STARTING: STARTS}

    @property
    def reasons(self) -> Mapping[str, str]:
        """Sentence by reason."""
        return self._reasons

    @property
    def is_ready(self) -> bool:
        """Whether a packet to any node known to etcd would be forwarded now."""
        return not self._reasons

    def start(self, sentence: str = STARTS) -> None:
        """Say what the start waits for, which others log."""
        if self._reasons.get(STARTING) != sentence:
            self._reasons[STARTING] = sentence
            self._tell_supervisor()

    def set(self, reason: str, sentence: str) -> None:
        """Become unready; each new sentence is logged and told the supervisor once."""
        if self._reasons.get(reason) == sentence:
            return
        self._reasons[reason] = sentence
        log.error("not ready (%s): %s", reason, sentence)
        self._tell_supervisor()

    def clear(self, reason: str) -> None:
        """Take a reason back."""
        if self._reasons.pop(reason, None) is not None:
            log.info("cleared: %s%s", reason, "; ready" if self.is_ready else "")
            self._tell_supervisor()

    def _tell_supervisor(self) -> None:
        """Tell what `systemctl status` shows; others' words must not begin a line of their own."""
        why = "; ".join(f"{name}: {sentence}" for name, sentence in self._reasons.items())
        why = "".join(x if x.isprintable() else " " for x in why)  # it is shown on a terminal
        notify(f"STATUS={' '.join(why.split()) or 'ready'}")


class HealthServer:
    """Serves GET requests, one a connection; anything else is refused and closed."""

    def __init__(
        self,
        readiness: Readiness,
        address: str,
        port: int,
        metrics: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._readiness = readiness
        self._address = address
        self._port = port
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port in use."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def fd(self) -> int:
        """The listening socket."""
        assert self._server is not None
        return self._server.sockets[0].fileno()

    async def start(self, inherited: Inheritance) -> None:
        """Listen, on the socket that is inherited if there is one; Refusal if there is no port."""
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        sockets = inherited.take_sockets(
            family, socket.SOCK_STREAM, lambda own: own[:2] == (self._address, self._port)
        )
        try:
            if sockets:
                self._server = await asyncio.start_server(
                    self._serve, sock=sockets[0], limit=REQUEST_BYTES
                )
                return
            self._server = await asyncio.start_server(
                self._serve, self._address, self._port, limit=REQUEST_BYTES
            )
        except OSError as error:
            raise Refusal(
                f"cannot listen on {self._address}:{self._port} ({error.strerror}); "
                "choose another with --healthz-ip, --healthz-port or --metrics-port"
            ) from error

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, method: bytes, target: bytes) -> tuple[str, str, bytes]:
        """Return status line, content type and body."""
        text = "text/plain; charset=utf-8"
        path = target.partition(b"?")[0]
        if method != b"GET":
            return "405 Method Not Allowed", text, b"only GET\n"
        if path == b"/healthz":
            hung = self._readiness.reasons.get(HUNG)
            if hung is not None:
                return "503 Service Unavailable", text, f"{hung}\n".encode()
            return "200 OK", text, b"pyflannel-udp is running\n"
        if path == b"/readyz":
            if self._readiness.is_ready:
                return "200 OK", text, b"pyflannel-udp is ready\n"
            lines = [f"{name}: {why}\n" for name, why in self._readiness.reasons.items()]
            return "503 Service Unavailable", text, "".join(lines).encode()
        if path == b"/metrics":
            return "200 OK", "text/plain; version=0.0.4; charset=utf-8", await self._metrics()
        return "404 Not Found", text, b"/healthz, /readyz, /metrics\n"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await within(REQUEST_SECONDS, reader.readuntil(b"\r\n\r\n"))
            words = request.split(b"\r\n", 1)[0].split(b" ")
            status, kind, body = (
                await self._answer(words[0], words[1])
                if len(words) == 3
                else ("400 Bad Request", "text/plain", b"not HTTP\n")
            )
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n".encode()
                + body
            )
            await within(REQUEST_SECONDS, writer.drain())
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            log.debug("a health request ended early")
        finally:
            writer.close()
