"""Values that describe where a packet goes: MAC address, VNI, route, change of a route.

A leaf without I/O and without compiled code, so that the control plane and its tests can speak of
routes on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Union

IPAddress = Union[IPv4Address, IPv6Address]
IPNetwork = Union[IPv4Network, IPv6Network]

DEFAULT_PORT = 8472
"""UDP port of the kernel's vxlan device and so of flannel (IANA's 4789 came later)."""

_MAC_PATTERNS = (
    re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}"),
    re.compile(r"[0-9a-f]{2}(?:-[0-9a-f]{2}){5}"),
    re.compile(r"[0-9a-f]{4}(?:\.[0-9a-f]{4}){2}"),
)


@dataclass(frozen=True, slots=True, order=True)
class MacAddress:
    """A 48-bit Ethernet address in wire order."""

    octets: bytes

    def __post_init__(self) -> None:
        if len(self.octets) != 6:
            raise ValueError(f"a MAC address has 6 octets, not {len(self.octets)}")

    @classmethod
    def parse(cls, text: str) -> MacAddress:
        """Read `0a:0b:…`, `0a-0b-…` or `0a0b.0c0d.0e0f`, any case; ValueError otherwise."""
        folded = text.lower()
        if not any(pattern.fullmatch(folded) for pattern in _MAC_PATTERNS):
            raise ValueError(f"{text!r} is not a MAC address")
        return cls(bytes.fromhex(re.sub(r"[:.-]", "", folded)))

    @classmethod
    def random(cls, randbytes: Callable[[int], bytes]) -> MacAddress:
        """Make a unicast, locally administered address with 46 random bits (spec section 9.2)."""
        first, *rest = randbytes(6)
        return cls(bytes([(first | 0x02) & 0xFE, *rest]))

    @property
    def is_vtep(self) -> bool:
        """Whether a VTEP can own it: not multicast, not all-zero."""
        return not self.octets[0] & 1 and any(self.octets)

    def __str__(self) -> str:
        return self.octets.hex(":")


class Vni(int):
    """A 24-bit VXLAN network identifier; ValueError outside 0..16777215 (RFC 7348, section 5)."""

    def __new__(cls, value: int) -> Vni:
        if not 0 <= value < 1 << 24:
            raise ValueError(f"VNI {value} is outside 0..16777215")
        return super().__new__(cls, value)


@dataclass(frozen=True, slots=True)
class Route:
    """One FIB entry: flannel's route, neighbour and FDB entry of a peer in one value.

    `previous_mac` is the VTEP's MAC before its last change; packets that were sent before the
    change still carry it (decision: both are accepted on receive).
    """

    subnet: IPNetwork
    vtep_mac: MacAddress
    underlay: IPAddress
    port: int = DEFAULT_PORT
    previous_mac: MacAddress | None = None


@dataclass(frozen=True, slots=True)
class Replace:
    """Add the route, or replace the one of the same subnet."""

    route: Route


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the route of this subnet."""

    subnet: IPNetwork


RouteChange = Union[Replace, Delete]
