"""Connections to etcd: endpoints in turn, TLS, the token, deadlines, and what an error means.

It knows no request of etcd's API but Authenticate. There is one connection at a time, shared by
all; who finds it bad leaves it, and everybody moves to the next endpoint. A left channel is closed
by its last user, because closing it cancels what still runs on it. Certificates are read anew for
each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from pyflannel.control.etcd3_stubs import call, message
from pyflannel.control.etcd_fault import (
    EtcdHeld,
    EtcdRejected,
    EtcdUnavailable,
    Fault,
    diagnose,
)
from pyflannel.control.etcd_session import Session
from pyflannel.control.etcd_tls import BadCertificates, EtcdTls
from pyflannel.control.quiet_grpc import grpc

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
REQUEST_SECONDS = 3.0
PATIENCE_MAX_SECONDS = 10.0
"""An etcd that is slow, though connected, gets more time with each request that ran out of it."""
WRITES_HELD_SECONDS = 600.0
"""How long a write that hangs costs nobody else anything, after every endpoint was tried."""
WRITES_HELD = "no endpoint answers a write in time"
CLOCK_SECONDS = 1.0
"""By more than this the clock jumps when it is set; NTP turns what is less in small steps."""

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Without it grpc waits 60 s for the answer to a ping, whatever keepalive_timeout says.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.max_receive_message_length", -1),
    # Else channels share a connection, and a new one would be as broken as the one left.
    ("grpc.use_local_subchannel_pool", 1),
]


class _NotConnected(Exception):
    """An endpoint cannot be used; `str()` says why."""

    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


class Connection:
    """One channel to one endpoint; `left` is done, with the reason, when it shall not be used."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel: Any = None
        self.token: str | None = None
        """None before it is asked for, "" where etcd has no users."""
        self.left: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, when nothing that was asked on it will be answered."""
        self.lock = asyncio.Lock()
        self._users = 0
        self._closing: asyncio.Future[None] | None = None

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What goes with each request."""
        return [("token", self.token)] if self.token else []

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Keep the channel open meanwhile."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_unused()

    async def connect(self) -> None:
        """Wait until the channel is up, or has failed: then a request will tell why."""
        states = grpc.ChannelConnectivity
        deadline = time.monotonic() + CONNECT_SECONDS
        state = self.channel.get_state(try_to_connect=True)
        while state in (states.IDLE, states.CONNECTING):
            # Not wait_for: before Python 3.12 it loses a cancellation that comes with the change.
            change = asyncio.ensure_future(self.channel.wait_for_state_change(state))
            try:
                done, _ = await asyncio.wait(
                    (change, self.left),
                    timeout=deadline - time.monotonic(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                change.cancel()
            if self.left.done():
                raise _NotConnected(Fault.ENDPOINT, self.left.result())
            if not done:
                raise _NotConnected(Fault.ENDPOINT, "cannot connect in time")
            state = self.channel.get_state(try_to_connect=True)

    def leave(self, why: str) -> None:
        """Let nobody use it any more; streams on it end."""
        if not self.left.done():
            self.left.set_result(why)
        self._close_unused()

    async def answer(self, rpc: Any) -> Any:
        """Wait for the answer of a call; _NotConnected when the connection is lost meanwhile."""
        waiting = asyncio.ensure_future(rpc)
        try:
            await asyncio.wait((waiting, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise _NotConnected(Fault.ENDPOINT, self.lost.result())
            return waiting.result()
        finally:
            waiting.cancel()

    def _close_unused(self) -> None:
        unused = self.left.done() and not self._users
        if unused and self.channel is not None and self._closing is None:
            self._closing = asyncio.ensure_future(self.channel.close())

    async def closed(self) -> None:
        """Wait until the channel is closed, if it is being closed."""
        if self._closing is not None:
            await self._closing


class Stream:
    """A call that sends and receives messages until it breaks or its connection is left."""

    def __init__(self, connection: Connection, rpc: Any) -> None:
        self._connection = connection
        self._rpc = rpc

    async def write(self, request: Any) -> None:
        """Send one message."""
        await self._rpc.write(request)

    async def read(self) -> Any:
        """Return the next message; EtcdUnavailable or AioRpcError at the end."""
        left = self._connection.left
        reading = asyncio.ensure_future(self._rpc.read())
        try:
            await asyncio.wait((reading, left), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise EtcdUnavailable(left.result())
            answer = reading.result()
        finally:
            reading.cancel()
        if answer is grpc.aio.EOF:
            raise EtcdUnavailable(f"{self._connection.endpoint}: the stream ended")
        return answer

    def rejected(self, why: str) -> EtcdRejected:
        """Return the error that etcd does not want this stream; the reason may be the token."""
        self._connection.token = None
        return EtcdRejected(f"{self._connection.endpoint}: {why}")


def _clock_setting() -> float:
    """Return what changes when the wall clock is set, in seconds."""
    return time.time() - time.monotonic()


class Connections:
    """Keeps one connection to one of the endpoints."""

    def __init__(
        self,
        endpoints: Sequence[str],
        tls: EtcdTls,
        username: str,
        password: str,
        session: Session,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._tls = tls
        self._files = tls.signature()
        """The certificate files as they were when they were last read."""
        self._clock = _clock_setting()
        """The wall clock's setting at that time; it decides whether a certificate is valid."""
        self._username = username
        self._password = password
        self._session = session
        self._current = 0
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._patience = REQUEST_SECONDS
        self._writes_held_until = 0.0

    @property
    def endpoint(self) -> str:
        """The endpoint in use, or to be tried next."""
        return self._endpoints[self._current % len(self._endpoints)]

    async def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.leave("closed")
            await connection.closed()

    def reconnect(self, why: str) -> None:
        """Give up the connection in use, which is dead, for a new one, and what was asked on it."""
        if self._connection is not None:
            self._connection.lost.set_result(why)
            self.leave(self._connection, why)

    async def ask(self, service: str, method: str, request: Any, *, is_write: bool = False) -> Any:
        """Ask one endpoint after the other until one answers.

        EtcdRejected when etcd says no to this request, EtcdUnavailable when nobody answered,
        EtcdHeld when a write hangs on a connection that stands: whether etcd answers is for the
        reads to tell, which go on beside it.
        """
        clause, token_is_fresh, is_held = "", False, False
        refusing: set[str] = set()
        for _ in range(len(self._endpoints) + 1):
            connection = await self._get()
            started = time.monotonic()
            is_asked = is_held = False
            waits = is_write and started < self._writes_held_until
            patience = PATIENCE_MAX_SECONDS if waits else self._patience
            try:
                with connection.use():
                    await self._make_usable(connection)
                    is_asked = True
                    answer = await connection.answer(
                        call(connection.channel, service, method)(
                            request, timeout=patience, metadata=connection.metadata
                        )
                    )
            except grpc.aio.AioRpcError as error:
                fault, clause = self._diagnose(connection, error)
                is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                is_held = is_write and is_asked and is_late
            except _NotConnected as error:
                fault, clause = error.fault, f"{connection.endpoint}: {error}"
            else:
                if is_write:
                    self._writes_held_until = 0.0
                if time.monotonic() - started < REQUEST_SECONDS / 2:
                    self._patience = REQUEST_SECONDS
                self._session.answered(answer.header.cluster_id, answer.header.revision)
                return answer
            if fault is Fault.REQUEST:
                raise self._reject(EtcdRejected(clause))
            if fault is Fault.TOKEN and self._username and not token_is_fresh:
                connection.token, token_is_fresh = None, True
                continue
            if is_held and waits:
                raise self._reject(EtcdHeld(WRITES_HELD))
            self.leave(connection, clause)
            if fault is not Fault.ENDPOINT:
                refusing.add(connection.endpoint)
                if len(refusing) == len(self._endpoints):
                    break
        if is_held:
            self._writes_held_until = time.monotonic() + WRITES_HELD_SECONDS
            raise self._reject(EtcdHeld(WRITES_HELD))
        (self._session.refused if refusing else self._session.failed)(clause)
        raise EtcdUnavailable(clause)

    def _reject(self, error: EtcdRejected) -> EtcdRejected:
        self._session.rejected(str(error))
        return error

    @contextlib.asynccontextmanager
    async def stream(self, service: str, method: str) -> AsyncIterator[Stream]:
        """Open a stream for the time of the context; EtcdUnavailable when it breaks."""
        connection = await self._get()
        with connection.use():
            rpc = None
            try:
                await self._make_usable(connection)
                metadata = [*connection.metadata, ("hasleader", "true")]
                rpc = call(connection.channel, service, method)(metadata=metadata)
                yield Stream(connection, rpc)
            except grpc.aio.AioRpcError as error:
                fault, clause = self._diagnose(connection, error)
                if fault is Fault.TOKEN:
                    connection.token = None
                else:
                    self.leave(connection, clause)
                raise EtcdUnavailable(clause) from error
            except _NotConnected as error:
                self.leave(connection, str(error))
                raise EtcdUnavailable(f"{connection.endpoint}: {error}") from error
            finally:
                if rpc is not None:
                    rpc.cancel()

    def leave(self, connection: Connection, why: str) -> None:
        """Give an endpoint up for the next; nothing if somebody did so already."""
        if connection is not self._connection:
            return
        self._connection = None
        self._current += 1
        self._session.endpoint_failed(why, self.endpoint)
        connection.leave(why)

    async def _get(self) -> Connection:
        """Return the connection in use, or a new one; waits while the session backs off."""
        async with self._lock:
            if self._connection is None:
                await self._back_off()
                self._connection = Connection(self.endpoint)
            return self._connection

    async def _make_usable(self, connection: Connection) -> None:
        """Connect and get a token, where that is not done yet."""
        async with connection.lock:
            if connection.left.done():
                raise _NotConnected(Fault.ENDPOINT, connection.left.result())
            if connection.channel is None:
                connection.channel = self._channel(connection.endpoint)
            await connection.connect()
            if self._username and connection.token is None:
                request = message("AuthenticateRequest")(
                    name=self._username, password=self._password
                )
                authenticate = call(connection.channel, "Auth", "Authenticate")
                try:
                    answer = await connection.answer(authenticate(request, timeout=self._patience))
                    connection.token = answer.token
                except grpc.aio.AioRpcError as error:
                    # A store without users, say after a wipe: they may come later.
                    if "authentication is not enabled" not in (error.details() or ""):
                        raise
                    connection.token = ""

    def _channel(self, endpoint: str) -> Any:
        scheme, _, target = endpoint.partition("://")
        if scheme == "http":
            return grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
        self._files, self._clock = self._tls.signature(), _clock_setting()
        try:
            credentials = self._tls.credentials()
        except BadCertificates as error:
            raise _NotConnected(Fault.CREDENTIALS, str(error)) from error
        return grpc.aio.secure_channel(target, credentials, _CHANNEL_OPTIONS)

    def _diagnose(self, connection: Connection, error: grpc.aio.AioRpcError) -> tuple[Fault, str]:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._patience = min(self._patience * 2, PATIENCE_MAX_SECONDS)
        scheme = connection.endpoint.partition("://")[0]
        fault, clause = diagnose(error.code().name, error.details() or "", scheme)
        return fault, f"{connection.endpoint}: {clause}"

    async def _back_off(self) -> None:
        """Wait until the session allows another attempt, or certificates or clock have changed."""
        while (delay := self._session.retry_at - time.monotonic()) > 0:
            if self._session.is_refused and self._tls.signature() != self._files:
                log.info("a certificate file has changed: trying etcd again")
                return
            if self._session.is_refused and abs(_clock_setting() - self._clock) > CLOCK_SECONDS:
                log.info("the clock was set: trying etcd again")
                return
            await asyncio.sleep(min(delay, 1.0))
