"""Hands a running node over to a successor without losing a packet (`--takeover`, decision 24).

    successor                                        running process
    connects, {"request":"takeover"}        ->
                                            <-       its lease, offloads and all descriptors
    prepares everything but reading packets
    "ready"                                 ->       stops reading, sends what it holds
                                            <-       "stopped"
    forwards, sets up the rest
    "done"                                  ->       tells the supervisor
                                            <-       "yours", and ends

Both have the same open descriptors, so packets queue in the kernel while nobody reads. Whatever
happens to the successor before "done", the running process goes on; what it reads until then is the
control socket's, so it comes from root or from itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyflannel.control.lease import KeyValue
from pyflannel.control.patience import within
from pyflannel.dataplane.offload import NO_OFFLOAD, Offload, parse_offload
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management.health import STARTING
from pyflannel.management.notify import notify
from pyflannel.node.parts import Node

log = logging.getLogger(__name__)

READY, STOPPED, DONE, YOURS = b"ready\n", b"stopped\n", b"done\n", b"yours\n"
PREPARE_SECONDS = 120.0
"""How long a successor may prepare; etcd may be slow."""
SETTLE_SECONDS = 15.0
"""How long it may take from forwarding until it is through; nothing is lost meanwhile."""
CHILD_POLL_SECONDS = 0.05
STATE_BYTES = 1 << 16
FDS_MAX = 253
"""So many descriptors go into one message (linux/net/scm.h: SCM_MAX_FD)."""

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What a successor gets beside the descriptors.

    `expires_at` is as the keeper has it, `offloads` are those in use by device.
    """

    lease: KeyValue
    expires_at: float | None
    offloads: Mapping[str, Offload]

    def to_json(self) -> bytes:
        """Return one line."""
        return (
            json.dumps(
                {
                    **entry_to_json(self.lease),
                    "expires_at": self.expires_at,
                    "offloads": {device: str(x) for device, x in self.offloads.items()},
                }
            ).encode()
            + b"\n"
        )

    @classmethod
    def from_json(cls, line: bytes) -> HandedOver:
        """Read what another version may have written; Refusal when it cannot be used."""
        try:
            found = json.loads(line)
            if "error" in found:
                raise Refusal(f"the running process cannot hand over: {found['error']}")
            return cls(
                entry_from_json(found),
                found["expires_at"],
                {
                    # What is in use is never auto.
                    device: parse_offload(text) or NO_OFFLOAD
                    for device, text in dict(found["offloads"]).items()
                },
            )
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(
                f"what the running process hands over is not understood ({error!r}); "
                "restart instead: systemctl restart pyflannel-udp"
            ) from error


def entry_to_json(kv: KeyValue) -> dict[str, Any]:
    """Return an entry of etcd in the form that passes between two processes."""
    return {
        "key": kv.key.decode(),
        "value": kv.value.decode(),
        "create_revision": kv.create_revision,
        "mod_revision": kv.mod_revision,
        "version": kv.version,
        "etcd_lease": kv.lease,
    }


def entry_from_json(found: Mapping[str, Any]) -> KeyValue:
    """Read such an entry; ValueError, TypeError or KeyError if it is none."""
    return KeyValue(
        found["key"].encode(),
        found["value"].encode(),
        int(found["create_revision"]),
        int(found["mod_revision"]),
        int(found["version"]),
        int(found["etcd_lease"]),
    )


class Handover:
    """The requests of a successor in the running process; `done` is set when it shall end.

    `listeners` are the descriptors to hand over beside those of the overlays.
    """

    def __init__(self, node: Node) -> None:
        self.done = asyncio.Event()
        self.requests = {
            "takeover": self.takeover,
            "beyond_etcd": self.beyond_etcd,
            "reload": self.reload,
        }
        self.listeners: list[int] = []
        self._node = node
        self._is_busy = False
        self._is_handed_over = False
        self._reloading = False

    async def takeover(self, _: Mapping[str, Any], connection: socket.socket) -> object:
        """Serve a successor."""
        if self._is_busy:
            raise Refusal("another successor is on its way")
        self._is_busy = True
        try:
            await self._hand_over(connection)
        finally:
            self._is_busy = False
        if not self._reloading:
            self.done.set()
        return None

    async def _hand_over(self, connection: socket.socket) -> None:
        overlays, keeper = self._node.overlays, self._node.keeper
        if keeper is None or STARTING in self._node.readiness.reasons:
            raise Refusal("it is starting itself; try again when it is ready")
        kv, expires_at = keeper.to_hand_over()
        fds = [fd for overlay in overlays for fd in overlay.descriptors()] + self.listeners
        if len(fds) > FDS_MAX:
            raise Refusal(
                f"{len(fds)} descriptors are open, and the kernel passes {FDS_MAX} on: restart "
                "instead, with fewer --tun-queues or --source-ports"
            )
        state = HandedOver(kv, expires_at, {x.device: x.offload for x in overlays})
        socket.send_fds(connection, [state.to_json()], fds)
        await _expect(connection, READY, PREPARE_SECONDS)
        try:
            for overlay in overlays:
                overlay.pause()
            await asyncio.get_running_loop().sock_sendall(connection, STOPPED)
            await _expect(connection, DONE, SETTLE_SECONDS)
        except BaseException:
            for overlay in overlays:
                overlay.resume()
            raise
        self._is_handed_over = True
        keeper.let_go()
        pid = _peer(connection)
        notify(f"MAINPID={pid}")
        log.info("Handed over to process %d", pid)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(connection, YOURS)

    async def beyond_etcd(self, _: Mapping[str, Any], __: socket.socket) -> object:
        """Tell a successor of the leases that it cannot have from etcd."""
        table = self._node.table
        kept = () if table is None else table.beyond_etcd(time.monotonic())
        return [{**entry_to_json(kv), "seconds": seconds} for kv, seconds in kept]

    async def reload(self, _: Mapping[str, Any], connection: socket.socket) -> object:
        """Start a successor with our arguments and answer when it has taken over."""
        if self._is_busy or self._reloading:
            raise Refusal("another successor is on its way")
        self._reloading = True
        arguments = [word for word in sys.argv[1:] if word.lstrip("-") != "takeover"]
        # It names us; with it the successor would leave the watchdog hungry.
        environ = {key: value for key, value in os.environ.items() if key != "WATCHDOG_PID"}
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "pyflannel", *arguments, "--takeover"],
                stdin=subprocess.DEVNULL,
                env=environ,
            )
            while not self._is_handed_over:
                if child.poll() is not None:
                    raise Refusal(
                        f"the successor ended with code {child.returncode}, so this process goes "
                        "on; the reason is in the log"
                    )
                await asyncio.sleep(CHILD_POLL_SECONDS)
        finally:
            self._reloading = False
        # The server's own answer may be cut off by our end.
        answer = json.dumps({"result": {"old": os.getpid(), "new": child.pid}}).encode() + b"\n"
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(connection, answer)
        self.done.set()
        return None


async def _expect(connection: socket.socket, word: bytes, seconds: float) -> None:
    """Wait for a word of the successor; Refusal when it does not come."""
    loop = asyncio.get_running_loop()
    said = b""
    try:
        while said != word:
            received = await within(seconds, loop.sock_recv(connection, len(word)))
            if not received:
                raise Refusal("the successor ended before it was through: this process goes on")
            said += received
            if not word.startswith(said):
                raise Refusal(f"the successor said {said!r}: this process goes on")
    except (OSError, asyncio.TimeoutError, Refusal) as error:
        sentence = str(error) or "the successor took too long: this process goes on"
        log.error("%s", sentence)
        raise Refusal(sentence) from error


def _peer(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])
