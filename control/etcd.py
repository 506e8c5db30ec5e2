"""The client of etcd's v3 API: read, compare-and-swap, leases, watch.

It knows keys and revisions, and nothing of subnets. What goes wrong is one exception,
EtcdUnavailable; the caller may ask again at once, because a request waits while the session with
etcd backs off.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Union

from pyflannel.control.etcd3_stubs import message
from pyflannel.control.etcd_connection import Connections
from pyflannel.control.etcd_session import EtcdSession, Session
from pyflannel.control.etcd_tls import BadCertificates, EtcdTls
from pyflannel.control.lease import KeyValue
from pyflannel.dataplane.refusal import Refusal

PAGE_KEYS = 1000


class Compacted(Exception):
    """The revision to watch from is no longer kept; list again."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One key, or None where there is none, at a revision of the store."""

    kv: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix at one revision; `asked_at` by the monotonic clock."""

    kvs: tuple[KeyValue, ...]
    revision: int
    cluster_id: int
    asked_at: float


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
    """Events in order; watch again after `revision`. No events: the store is at `revision`."""

    events: tuple[Union[Put, Deleted], ...]
    revision: int


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key behind all keys that begin with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


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
        try:
            if any(endpoint.startswith("https://") for endpoint in endpoints):
                tls.credentials()
        except BadCertificates as error:
            raise Refusal(str(error)) from error
        names = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self._session = Session(names[0], time.monotonic, random.random)
        self._connections = Connections(names, tls, username, password, self._session)
        self._ask = self._connections.ask

    @property
    def session(self) -> EtcdSession:
        """How we stand with etcd: state, endpoint, revision, last error."""
        return self._session.reading()

    async def close(self) -> None:
        """Close the connection; the next request opens another."""
        await self._connections.close()

    def reconnect(self, why: str) -> None:
        """Connect anew; watches end with EtcdUnavailable."""
        self._connections.reconnect(why)

    async def get(self, key: str) -> Reading:
        """Read one key."""
        answer = await self._ask("KV", "Range", message("RangeRequest")(key=key.encode()))
        kv = _key_value(answer.kvs[0]) if answer.kvs else None
        return Reading(kv, answer.header.revision)

    async def snapshot(self, prefix: str) -> Snapshot:
        """Read all keys of a prefix, in pages of one revision."""
        asked_at = time.monotonic()
        start, end = prefix.encode(), prefix_end(prefix.encode())
        kvs: list[KeyValue] = []
        revision = cluster_id = 0
        while True:
            answer = await self._ask(
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
                return Snapshot(tuple(kvs), revision, cluster_id, asked_at)
            start = kvs[-1].key + b"\0"

    async def grant(self, ttl: int) -> int:
        """Make a lease of `ttl` seconds; return its id."""
        request = message("LeaseGrantRequest")(TTL=ttl)
        answer = await self._ask("Lease", "LeaseGrant", request, is_write=True)
        return int(answer.ID)

    async def revoke(self, lease: int) -> None:
        """End a lease; its keys are deleted."""
        request = message("LeaseRevokeRequest")(ID=lease)
        await self._ask("Lease", "LeaseRevoke", request, is_write=True)

    async def time_to_live(self, lease: int) -> int:
        """Return the seconds a lease has left, -1 if it is gone."""
        request = message("LeaseTimeToLiveRequest")(ID=lease)
        return int((await self._ask("Lease", "LeaseTimeToLive", request)).TTL)

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
        self, key: str, *, prefix: bool, after_revision: int
    ) -> AsyncGenerator[WatchBatch, None]:
        """Yield what happens to a key, or to all keys of a prefix, after a revision.

        The first batch is empty and says that the watch stands. Raises Compacted, or
        EtcdUnavailable when the stream ends; resume after the last batch's revision.

        That revision itself is asked for once more: when the revision of a deletion is compacted,
        a watch from just there misses it and is told nothing (etcd issue 18089, seen with 3.4.23).
        """
        start = key.encode()
        create = message("WatchCreateRequest")(
            key=start,
            range_end=prefix_end(start) if prefix else b"",
            # 0 would be now.
            start_revision=max(after_revision, 1),
            progress_notify=True,
        )
        async with self._connections.stream("Watch", "Watch") as stream:
            await stream.write(message("WatchRequest")(create_request=create))
            while True:
                answer = await stream.read()
                # Both can be set, so the refusal is looked at first.
                if answer.canceled:
                    if answer.compact_revision:
                        raise Compacted(f"what came after revision {after_revision} is compacted")
                    raise stream.rejected(f"watch refused: {answer.cancel_reason}")
                self._session.answered(answer.header.cluster_id, answer.header.revision)
                if answer.created:
                    yield WatchBatch((), after_revision)
                    continue
                events = tuple(
                    Deleted(event.kv.key, event.kv.mod_revision)
                    if event.type == 1
                    else Put(_key_value(event.kv))
                    for event in answer.events
                    if event.kv.mod_revision > after_revision
                )
                if answer.events and not events:
                    continue
                # The header of a catch-up batch is ahead of its events.
                revision = answer.events[-1].kv.mod_revision if events else answer.header.revision
                yield WatchBatch(events, revision)

    async def _commit(self, key: str, mod_revision: int, operation: Any) -> Commit:
        compare = message("Compare")(
            key=key.encode(), target=2, result=0, mod_revision=mod_revision
        )
        read = message("RequestOp")(request_range=message("RangeRequest")(key=key.encode()))
        request = message("TxnRequest")(compare=[compare], success=[operation], failure=[read])
        answer = await self._ask("KV", "Txn", request, is_write=True)
        current = None
        if not answer.succeeded and answer.responses[0].response_range.kvs:
            current = _key_value(answer.responses[0].response_range.kvs[0])
        return Commit(answer.succeeded, answer.header.revision, current)
