"""Reads frames off a host's interface and sends packets exactly as they are given."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.hosts import DEADLINE_SECONDS, Namespace
from tests.lab.inside import inside

ETH_P_ALL = 3  # linux/if_ether.h; any other shows only what arrives
IPV4 = b"\x08\x00"
UDP_HEADER = slice(34, 42)
"""Of a frame with an IPv4 header without options, as VTEPs send."""


class Tap:
    """What arrives at and leaves from an interface, from its creation on."""

    def __init__(self, tap: socket.socket) -> None:
        self._tap = tap

    def vxlan_frames(self, port: int, count: int) -> Iterator[bytes]:
        """Read frames with UDP datagrams to a port; AssertionError when `count` do not come."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while count:
            self._tap.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                frame = self._tap.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"{count} frames to port {port} did not come") from None
            is_udp = frame[12:14] == IPV4 and frame[23] == socket.IPPROTO_UDP
            if is_udp and frame[36:38] == port.to_bytes(2, "big"):
                count -= 1
                yield frame


@contextmanager
def tap(namespace: Namespace, interface: str) -> Iterator[Tap]:
    """Listen at an interface."""

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.bind((interface, ETH_P_ALL))
        return made

    with inside(namespace, listen) as made:
        yield Tap(made)


def send_packet(namespace: Namespace, packet: bytes) -> None:
    """Send an IPv4 packet from a namespace as it is."""
    with inside(
        namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    ) as raw:
        raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
