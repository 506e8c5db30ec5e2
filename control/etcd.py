"""The client of etcd's v3 API: read, compare-and-swap, leases, watch. The only network I/O here.

It knows keys and revisions, and nothing of subnets. Every request has a deadline; an endpoint that
fails is left for the next one; a token that expired is fetched again. What goes wrong is one
exception, EtcdUnavailable, and the caller decides when to try again. The channel options are those
that let a peer that went silent be noticed within seconds.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import grpc

from pyflannel.control.etcd3_stubs import call, message
from pyflannel.control.lease import KeyValue
from pyflannel.dataplane.refusal import Refusal

REQUEST_SECONDS = 3.0
PAGE_KEYS = 1000

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Without it grpc waits 60 s for the answer to a ping, whatever keepalive_timeout says.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", -1),
]

_RETRY_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class EtcdUnavailable(Exception):
    """etcd did not do what was asked; `str()` names the endpoint and the cause."""


class Compacted(Exception):
    """The revision to watch from is no longer kept; list again."""


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """Certificate files; all None with https means the system's CAs."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One key, or None where there is none, at a revision of the store."""

    kv: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix at one revision."""

    kvs: tuple[KeyValue, ...]
    revision: int
    cluster_id: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Outcome of a compare-and-swap; when it failed, `current` is what is there."""

    succeeded: bool
    revision: int
    current: KeyValue | None


@dataclass(frozen=True, slots=True)
class Put:
    """A key was written."""

    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Deleted:
    """A key was deleted or its lease ended."""

    key: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Events in order; watch again from `revision` + 1. No events: the store is at `revision`."""

    events: tuple[Union[Put, Deleted], ...]
    revision: int


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key behind all keys that begin with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _system_certificates() -> bytes:
    """Return the host's CA bundle; grpc would use one of its own instead."""
    path = ssl.get_default_verify_paths().cafile
    if path is None:
        raise Refusal(
            "https:// etcd endpoint, but this host has no CA bundle; name one with --etcd-cafile"
        )
    return Path(path).read_bytes()


def _read_file(flag: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise Refusal(f"--{flag} {path}: {error.strerror}") from error


class Etcd:
    """A client of one cluster, given by the endpoints of some of its members."""

    def __init__(
        self,
        endpoints: Sequence[str],
        tls: EtcdTls | None = None,
        username: str = "",
        password: str = "",
    ) -> None:
        if not endpoints:
            raise Refusal("no etcd endpoint; set --etcd-endpoints")
        tls = tls or EtcdTls()
        if (tls.cert is None) != (tls.key is None):
            raise Refusal("--etcd-certfile and --etcd-keyfile go together; give both or neither")
        for endpoint in endpoints:
            if not endpoint.startswith(("http://", "https://")):
                raise Refusal(f"etcd endpoint {endpoint!r} must begin with http:// or https://")
            if endpoint.startswith("http://") and (tls.ca or tls.cert):
                raise Refusal(f"etcd endpoint {endpoint} is plain http, but TLS files are given")
        self._endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self._tls = tls
        self._username = username
        self._password = password
        self._current = 0
        self._channel: Any = None
        self._token: str | None = None

    @property
    def endpoint(self) -> str:
        """The endpoint in use."""
        return self._endpoints[self._current % len(self._endpoints)]

    async def close(self) -> None:
        """Close the connection; the next request opens another."""
        channel, self._channel, self._token = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def get(self, key: str) -> Reading:
        """Read one key."""
        answer = await self._request("KV", "Range", message("RangeRequest")(key=key.encode()))
        kv = _key_value(answer.kvs[0]) if answer.kvs else None
        return Reading(kv, answer.header.revision)

    async def snapshot(self, prefix: str) -> Snapshot:
        """Read all keys of a prefix, in pages of one revision."""
        start, end = prefix.encode(), prefix_end(prefix.encode())
        kvs: list[KeyValue] = []
        revision = cluster_id = 0
        while True:
            answer = await self._request(
                "KV",
                "Range",
                message("RangeRequest")(
                    key=start, range_end=end, limit=PAGE_KEYS, revision=revision
                ),
            )
            revision = revision or answer.header.revision
            cluster_id = answer.header.cluster_id
            kvs += [_key_value(kv) for kv in answer.kvs]
            if not answer.more:
                return Snapshot(tuple(kvs), revision, cluster_id)
            start = kvs[-1].key + b"\0"

    async def grant(self, ttl: int) -> int:
        """Make a lease of `ttl` seconds; return its id."""
        answer = await self._request("Lease", "LeaseGrant", message("LeaseGrantRequest")(TTL=ttl))
        return int(answer.ID)

    async def revoke(self, lease: int) -> None:
        """End a lease; its keys are deleted."""
        await self._request("Lease", "LeaseRevoke", message("LeaseRevokeRequest")(ID=lease))

    async def time_to_live(self, lease: int) -> int:
        """Return the seconds a lease has left, -1 if it is gone."""
        request = message("LeaseTimeToLiveRequest")(ID=lease)
        return int((await self._request("Lease", "LeaseTimeToLive", request)).TTL)

    async def put_if(self, key: str, value: bytes, lease: int, mod_revision: int) -> Commit:
        """Write a key if it still has this mod_revision; 0 means only if there is none."""
        put = message("PutRequest")(key=key.encode(), value=value, lease=lease)
        return await self._commit(key, mod_revision, message("RequestOp")(request_put=put))

    async def delete_if(self, key: str, mod_revision: int) -> Commit:
        """Delete a key if it still has this mod_revision."""
        delete = message("DeleteRangeRequest")(key=key.encode())
        operation = message("RequestOp")(request_delete_range=delete)
        return await self._commit(key, mod_revision, operation)

    async def watch(
        self, key: str, *, prefix: bool, from_revision: int
    ) -> AsyncIterator[WatchBatch]:
        """Yield what happens to a key, or to all keys of a prefix, from a revision on.

        The first batch is empty and says that the watch stands. Raises Compacted, or
        EtcdUnavailable when the stream ends; resume at the last batch's revision + 1.
        """
        start = key.encode()
        create = message("WatchCreateRequest")(
            key=start,
            range_end=prefix_end(start) if prefix else b"",
            start_revision=from_revision,
            progress_notify=True,
        )
        stream = None
        try:
            await self._open()
            metadata = [*self._metadata(), ("hasleader", "true")]
            stream = call(self._channel, "Watch", "Watch")(metadata=metadata)
            await stream.write(message("WatchRequest")(create_request=create))
            while True:
                answer = await stream.read()
                if answer is grpc.aio.EOF:
                    raise EtcdUnavailable(f"{self.endpoint}: watch ended ({await stream.code()})")
                # Both can be set, so the refusal is looked at first.
                if answer.canceled:
                    if answer.compact_revision:
                        raise Compacted(f"revision {from_revision} is compacted")
                    self._token = None
                    raise EtcdUnavailable(f"{self.endpoint}: watch refused: {answer.cancel_reason}")
                if answer.created:
                    yield WatchBatch((), from_revision - 1)
                    continue
                events = tuple(
                    Deleted(event.kv.key, event.kv.mod_revision)
                    if event.type == 1
                    else Put(_key_value(event.kv))
                    for event in answer.events
                )
                # The header of a catch-up batch is ahead of its events.
                revision = answer.events[-1].kv.mod_revision if events else answer.header.revision
                yield WatchBatch(events, revision)
        except grpc.aio.AioRpcError as error:
            await self._leave_endpoint(error)
            raise EtcdUnavailable(self._clause(error)) from error
        finally:
            if stream is not None:
                stream.cancel()

    async def _commit(self, key: str, mod_revision: int, operation: Any) -> Commit:
        compare = message("Compare")(
            key=key.encode(), target=2, result=0, mod_revision=mod_revision
        )
        read = message("RequestOp")(request_range=message("RangeRequest")(key=key.encode()))
        request = message("TxnRequest")(compare=[compare], success=[operation], failure=[read])
        answer = await self._request("KV", "Txn", request)
        current = None
        if not answer.succeeded and answer.responses[0].response_range.kvs:
            current = _key_value(answer.responses[0].response_range.kvs[0])
        return Commit(answer.succeeded, answer.header.revision, current)

    def _metadata(self) -> list[tuple[str, str]]:
        return [("token", self._token)] if self._token else []

    async def _open(self) -> None:
        """Have a channel, and a token if the cluster wants one."""
        if self._channel is None:
            scheme, _, target = self.endpoint.partition("://")
            if scheme == "https":
                tls = self._tls
                credentials = grpc.ssl_channel_credentials(
                    _read_file("etcd-cafile", tls.ca) or _system_certificates(),
                    _read_file("etcd-keyfile", tls.key),
                    _read_file("etcd-certfile", tls.cert),
                )
                self._channel = grpc.aio.secure_channel(target, credentials, _CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
        if self._username and self._token is None:
            request = message("AuthenticateRequest")(name=self._username, password=self._password)
            authenticate = call(self._channel, "Auth", "Authenticate")
            self._token = (await authenticate(request, timeout=REQUEST_SECONDS)).token

    async def _request(self, service: str, method: str, request: Any) -> Any:
        """Ask each endpoint once, and once more with a fresh token where the old one expired."""
        failure = ""
        for _ in range(len(self._endpoints) + 1):
            try:
                await self._open()
                return await call(self._channel, service, method)(
                    request, timeout=REQUEST_SECONDS, metadata=self._metadata()
                )
            except grpc.aio.AioRpcError as error:
                failure = self._clause(error)
                if not await self._leave_endpoint(error):
                    break
        raise EtcdUnavailable(failure)

    async def _leave_endpoint(self, error: grpc.aio.AioRpcError) -> bool:
        """React to an error; return whether the same request may succeed now."""
        if error.code() in _RETRY_ELSEWHERE:
            await self.close()
            self._current += 1
            return True
        expired = "invalid auth token" in (error.details() or "")
        if error.code() == grpc.StatusCode.UNAUTHENTICATED or expired:
            self._token = None
            return bool(self._username)
        return False

    def _clause(self, error: grpc.aio.AioRpcError) -> str:
        details = (error.details() or "").strip() or error.code().name
        return f"{self.endpoint}: {details[:200]}"
