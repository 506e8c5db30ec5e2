"""ICMP echo to many hosts at once, of any size, never fragmented (RFC 792, RFC 4443).

It knows nothing of overlays. The kernel chooses the way and the source address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

TRIES = 2
SENT_AT_ONCE = 50
PAUSE_SECONDS = 0.01

_HEADER = struct.Struct("!BBH2sH")
# linux/in.h, linux/in6.h: probe sets DF and does not believe a cached path MTU
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE, _IPV6_DONTFRAG = 10, 23, 3, 62


@dataclass(frozen=True, slots=True)
class _Family:
    """How one address family says echo; options are (level, option, value)."""

    number: socket.AddressFamily
    protocol: int
    request: int
    reply: int
    header_bytes: int
    """Of the IP header."""
    shows_header: bool
    """Whether what a raw socket receives begins with the IP header."""
    options: tuple[tuple[int, int, int], ...]


_FAMILIES = {
    4: _Family(
        socket.AF_INET,
        socket.IPPROTO_ICMP,
        request=8,
        reply=0,
        header_bytes=20,
        shows_header=True,
        options=((socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE),),
    ),
    6: _Family(
        socket.AF_INET6,
        socket.IPPROTO_ICMPV6,
        request=128,
        reply=129,
        header_bytes=40,
        shows_header=False,
        options=(
            (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE),
            (socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1),
        ),
    ),
}


async def echo(sizes: Mapping[IPAddress, int], seconds: float) -> set[IPAddress]:
    """Send each address an IP packet of that many bytes; return who answered.

    Each has `seconds` to answer, and a second try. Refusal without CAP_NET_RAW.
    """
    answered: set[IPAddress] = set()
    for _ in range(TRIES):
        missing = {address: size for address, size in sizes.items() if address not in answered}
        rounds = [
            _round(
                family, {x: size for x, size in missing.items() if x.version == version}, seconds
            )
            for version, family in _FAMILIES.items()
        ]
        answered = answered.union(*await asyncio.gather(*rounds))
    return answered


async def _round(family: _Family, sizes: Mapping[IPAddress, int], seconds: float) -> set[IPAddress]:
    answered: set[IPAddress] = set()
    if not sizes:
        return answered
    with _socket(family) as icmp:
        identifier = os.urandom(2)
        listening = asyncio.ensure_future(_listen(family, icmp, identifier, sizes, answered))
        for number, (address, size) in enumerate(sizes.items()):
            payload = bytes(max(0, size - family.header_bytes - _HEADER.size))
            # What cannot be sent is not answered; EMSGSIZE is our own interface's no.
            with contextlib.suppress(OSError):
                icmp.sendto(_request(family.request, identifier, payload), (str(address), 0))
            if number % SENT_AT_ONCE == SENT_AT_ONCE - 1:
                await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.wait([listening], timeout=seconds)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return answered


def _socket(family: _Family) -> socket.socket:
    try:
        icmp = socket.socket(family.number, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family.protocol)
    except PermissionError:
        raise Refusal("echo requests need CAP_NET_RAW; run as root") from None
    for option in family.options:
        icmp.setsockopt(*option)
    return icmp


def _request(kind: int, identifier: bytes, payload: bytes) -> bytes:
    """Return the message; its checksum is for IPv4, as the kernel computes IPv6's itself."""
    packet = _HEADER.pack(kind, 0, 0, identifier, 1) + payload
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet[: len(packet) // 2 * 2]))
    total += packet[-1] << 8 if len(packet) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return _HEADER.pack(kind, 0, ~total & 0xFFFF, identifier, 1) + payload


async def _listen(
    family: _Family,
    icmp: socket.socket,
    identifier: bytes,
    asked: Mapping[IPAddress, int],
    answered: set[IPAddress],
) -> None:
    """Note who answers until all have."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(icmp.fileno(), readable.set)
    try:
        while len(answered) < len(asked):
            await readable.wait()
            readable.clear()
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, (source, *_) = icmp.recvfrom(65536)
                    # The length of an IPv4 header is in its first byte.
                    reply = packet[(packet[0] & 15) * 4 :] if family.shows_header else packet
                    if reply[:1] == bytes([family.reply]) and reply[4:6] == identifier:
                        answered |= {ip_address(source)} & asked.keys()
    finally:
        loop.remove_reader(icmp.fileno())
