"""Whom a start follows: a running process that hands over (`takeover`), or nobody.

Both tell what there is to begin with: descriptors, offloads in use, a lease.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from pyflannel.control.lease import BadLease, KeyValue, Lease, lease_key, parse_lease_untrusted
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.control.lease_list import RecentSnapshot
from pyflannel.control.network_config import NetworkConfig
from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.offload import Offload
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management.control_socket import NoAnswer, ask
from pyflannel.management.notify import take_kept_descriptors
from pyflannel.node.takeover import (
    DONE,
    FDS_MAX,
    READY,
    SETTLE_SECONDS,
    STATE_BYTES,
    STOPPED,
    YOURS,
    HandedOver,
    entry_from_json,
)

log = logging.getLogger(__name__)


class NoPredecessor:
    """Nobody runs; the supervisor may have kept descriptors of a process before."""

    def __init__(self) -> None:
        self.inherited = Inheritance(take_kept_descriptors(os.environ))
        self.offloads: Mapping[str, Offload] = {}

    async def lease(self, keeper: LeaseKeeper, recent: RecentSnapshot) -> Lease:
        """Get a lease, however long it takes; SubnetsExhausted when none is free."""
        return await keeper.acquire(recent)

    def beyond_etcd(self) -> list[tuple[KeyValue, float | None]]:
        """Nobody knows more than etcd."""
        return []

    def stop(self) -> None:
        """There is nothing to stop."""

    def finish(self) -> None:
        """Nor to end."""

    def close(self) -> None:
        """Close the descriptors that nobody took; may be called again."""
        self.inherited.close()


class Predecessor:
    """The running process, as its successor sees it; the connection's end is the end of the try."""

    def __init__(
        self,
        path: Path,
        connection: socket.socket,
        handed: HandedOver,
        inherited: Inheritance,
        prefix: str,
        config: NetworkConfig,
    ) -> None:
        self._path = path
        self._connection = connection
        self._handed = handed
        self._prefix = prefix
        self._config = config
        self.offloads = handed.offloads
        self.inherited = inherited

    @classmethod
    def find(cls, path: Path, prefix: str, config: NetworkConfig) -> Predecessor:
        """Ask the process that serves this control socket for all it has; Refusal if none does.

        `prefix` and `config` are of the network that the successor serves.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(SETTLE_SECONDS)
            connection.connect(str(path))
            connection.sendall(b'{"request":"takeover"}\n')
            line, fds, _, _ = socket.recv_fds(connection, STATE_BYTES, FDS_MAX)
        except OSError as error:
            connection.close()
            raise Refusal(
                f"nothing to take over: {path}: {error.strerror or error}; start without --takeover"
            ) from error
        inherited = Inheritance(fds)
        try:
            return cls(path, connection, HandedOver.from_json(line), inherited, prefix, config)
        except BaseException:
            inherited.close()
            connection.close()
            raise

    async def lease(self, keeper: LeaseKeeper, _: RecentSnapshot) -> Lease:
        """Go on with its lease; Refusal if that is of another network."""
        try:
            lease = parse_lease_untrusted(self._handed.lease)
        except BadLease as error:
            raise Refusal(f"the running process has no lease to hand over: {error}") from error
        key = self._handed.lease.key.decode()
        if key != lease_key(self._prefix, lease.subnet) or not self._config.fits(lease.subnet):
            raise Refusal(
                f"the running process has {key}, which does not fit --etcd-prefix or the network "
                "configuration any more; restart instead: systemctl restart pyflannel-udp"
            )
        return keeper.take_over(lease, self._handed.expires_at)

    def beyond_etcd(self) -> list[tuple[KeyValue, float | None]]:
        """Return the leases that it keeps though etcd does not tell them; Refusal if it hangs."""
        try:
            found = ask(self._path, "beyond_etcd", seconds=SETTLE_SECONDS)
            return [(entry_from_json(entry), entry["seconds"]) for entry in found]
        except NoAnswer:
            raise
        except (Refusal, ValueError, TypeError, KeyError) as error:
            log.debug("another version, which hands over its own lease only: %s", error)
            return []

    def stop(self) -> None:
        """Have it stop forwarding; from here on until we forward, packets queue."""
        self._exchange(READY, STOPPED)

    def finish(self) -> None:
        """Let it end."""
        self._exchange(DONE, YOURS)
        self._connection.close()

    def close(self) -> None:
        """Leave it alone: it goes on where `finish` was not reached; may be called again."""
        self._connection.close()
        self.inherited.close()

    def _exchange(self, say: bytes, expect: bytes) -> None:
        try:
            self._connection.sendall(say)
            answer = self._connection.recv(len(expect), socket.MSG_WAITALL)
        except OSError as error:
            raise Refusal(f"the running process does not hand over: {error}") from error
        if answer != expect:
            raise Refusal("the running process does not hand over: look at its log")
