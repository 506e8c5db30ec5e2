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
from ipaddress import ip_address

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

TRIES = 2
SENT_AT_ONCE = 50
PAUSE_SECONDS = 0.01

_HEADER = struct.Struct("!BBHHH")
# linux/in.h, linux/in6.h: probe sets DF and does not believe a cached path MTU
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_IPV4_HEADER_BYTES = 20


async def echo(sizes: Mapping[IPAddress, int], seconds: float) -> set[IPAddress]:
    """Send each address of one family an IP packet of that many bytes; return who answered.

    Each has `seconds` to answer, and a second try. Refusal without CAP_NET_RAW.
    """
    answered: set[IPAddress] = set()
    for _ in range(TRIES):
        missing = {address: size for address, size in sizes.items() if address not in answered}
        if missing:
            answered |= await _round(missing, seconds)
    return answered


async def _round(sizes: Mapping[IPAddress, int], seconds: float) -> set[IPAddress]:
    is_ipv4 = next(iter(sizes)).version == 4
    answered: set[IPAddress] = set()
    with _socket(is_ipv4) as icmp:
        identifier = os.urandom(2)
        listening = asyncio.ensure_future(_listen(icmp, is_ipv4, identifier, sizes, answered))
        for number, (address, size) in enumerate(sizes.items()):
            header = _HEADER.size + (_IPV4_HEADER_BYTES if is_ipv4 else 40)
            packet = _request(is_ipv4, identifier, bytes(max(0, size - header)))
            # What cannot be sent is not answered; EMSGSIZE is our own interface's no.
            with contextlib.suppress(OSError):
                icmp.sendto(packet, (str(address), 0))
            if number % SENT_AT_ONCE == SENT_AT_ONCE - 1:
                await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.wait([listening], timeout=seconds)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return answered


def _socket(is_ipv4: bool) -> socket.socket:
    family, protocol, level, option = (
        (socket.AF_INET, socket.IPPROTO_ICMP, socket.IPPROTO_IP, _IP_MTU_DISCOVER)
        if is_ipv4
        else (socket.AF_INET6, socket.IPPROTO_ICMPV6, socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
    )
    try:
        icmp = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    except PermissionError:
        raise Refusal("echo requests need CAP_NET_RAW; run as root") from None
    icmp.setsockopt(level, option, _PMTUDISC_PROBE)
    return icmp


def _request(is_ipv4: bool, identifier: bytes, payload: bytes) -> bytes:
    """Return an echo request; the kernel sums ICMPv6 itself."""
    number = int.from_bytes(identifier, "big")
    kind = 8 if is_ipv4 else 128
    packet = _HEADER.pack(kind, 0, 0, number, 1) + payload
    if not is_ipv4:
        return packet
    words = struct.unpack(f"!{(len(packet) + 1) // 2}H", packet + bytes(len(packet) % 2))
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return _HEADER.pack(kind, 0, ~total & 0xFFFF, number, 1) + payload


async def _listen(
    icmp: socket.socket,
    is_ipv4: bool,
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
                    packet, source = icmp.recvfrom(65536)
                    # A raw IPv4 socket gives the IP header too, whose length is in its first byte.
                    reply = packet[(packet[0] & 15) * 4 :] if is_ipv4 else packet
                    address = ip_address(source[0].partition("%")[0])
                    is_reply = reply[0] == (0 if is_ipv4 else 129) and reply[4:6] == identifier
                    if is_reply and address in asked:
                        answered.add(address)
    finally:
        loop.remove_reader(icmp.fileno())
