"""ICMP echo to many hosts at once, of any size, never fragmented (RFC 792).

It knows nothing of overlays. The kernel chooses the way and the source address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from ipaddress import IPv4Address

from pyflannel.dataplane.refusal import Refusal

TRIES = 2
SENT_AT_ONCE = 50
PAUSE_SECONDS = 0.01

_HEADER = struct.Struct("!BBH2sH")
_IP_HEADER_BYTES = 20
_REPLY, _REQUEST = 0, 8
# linux/in.h: probe sets DF and does not believe a cached path MTU
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3


async def echo(sizes: Mapping[IPv4Address, int], seconds: float) -> set[IPv4Address]:
    """Send each address an IP packet of that many bytes; return who answered.

    Each has `seconds` to answer, and a second try. Refusal without CAP_NET_RAW.
    """
    answered: set[IPv4Address] = set()
    for _ in range(TRIES):
        missing = {address: size for address, size in sizes.items() if address not in answered}
        if missing:
            answered |= await _round(missing, seconds)
    return answered


async def _round(sizes: Mapping[IPv4Address, int], seconds: float) -> set[IPv4Address]:
    answered: set[IPv4Address] = set()
    with _socket() as icmp:
        identifier = os.urandom(2)
        listening = asyncio.ensure_future(_listen(icmp, identifier, sizes, answered))
        for number, (address, size) in enumerate(sizes.items()):
            packet = _request(identifier, bytes(max(0, size - _IP_HEADER_BYTES - _HEADER.size)))
            # What cannot be sent is not answered; EMSGSIZE is our own interface's no.
            with contextlib.suppress(OSError):
                icmp.sendto(packet, (str(address), 0))
            if number % SENT_AT_ONCE == SENT_AT_ONCE - 1:
                await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.wait([listening], timeout=seconds)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return answered


def _socket() -> socket.socket:
    try:
        icmp = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
        )
    except PermissionError:
        raise Refusal("echo requests need CAP_NET_RAW; run as root") from None
    icmp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
    return icmp


def _request(identifier: bytes, payload: bytes) -> bytes:
    packet = _HEADER.pack(_REQUEST, 0, 0, identifier, 1) + payload
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet[: len(packet) // 2 * 2]))
    total += packet[-1] << 8 if len(packet) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return _HEADER.pack(_REQUEST, 0, ~total & 0xFFFF, identifier, 1) + payload


async def _listen(
    icmp: socket.socket,
    identifier: bytes,
    asked: Mapping[IPv4Address, int],
    answered: set[IPv4Address],
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
                    packet, (source, _) = icmp.recvfrom(65536)
                    # The IP header comes too; its length is in its first byte.
                    reply = packet[(packet[0] & 15) * 4 :]
                    address = IPv4Address(source)
                    if reply[:1] == bytes([_REPLY]) and reply[4:6] == identifier:
                        answered |= {address} & asked.keys()
    finally:
        loop.remove_reader(icmp.fileno())
