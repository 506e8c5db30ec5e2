"""A naive twin of the fast path, written from the specification: the oracle that C is held to."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_network

from pyflannel.dataplane.route import IPAddress, IPNetwork, MacAddress, Route

# RFC 6040, figure 4: result by (inner, outer); None drops.
_DECAP_ECN: dict[tuple[int, int], int | None] = {
    (0, 0): 0, (0, 1): 0, (0, 2): 0, (0, 3): None,
    (1, 0): 1, (1, 1): 1, (1, 2): 1, (1, 3): 3,
    (2, 0): 2, (2, 1): 1, (2, 2): 2, (2, 3): 3,
    (3, 0): 3, (3, 1): 3, (3, 2): 3, (3, 3): 3,
}  # fmt: skip

_ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}
_NO_SOURCE = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32"),
    6: ("::/128", "::1/128", "ff00::/8"),
}


_EVERYTHING = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


def checksum(octets: bytes) -> int:
    """The Internet checksum, word by word (RFC 1071)."""
    octets += b"\0" * (len(octets) % 2)
    total: int = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(frozen=True)
class Twin:
    """One VTEP with a list of routes; inner packets are of the family of `network`."""

    vni: int
    mac: MacAddress
    network: IPNetwork
    routes: tuple[Route, ...]
    mode: str = "enforce"
    ignore_reserved: bool = False

    def lookup(self, address: IPAddress) -> Route | None:
        """Return the route with the longest prefix, by looking at all."""
        hits = [route for route in self.routes if address in route.subnet]
        return max(hits, key=lambda route: route.subnet.prefixlen, default=None)

    def encapsulate(self, packet: bytes) -> tuple[bytes, int] | str:
        """Return the datagram and outer ECN, or the drop reason."""
        if not packet or packet[0] >> 4 not in (4, 6):
            return "encap_malformed"
        if packet[0] >> 4 != self.network.version:
            other = replace(self, network=_EVERYTHING[packet[0] >> 4])
            is_multicast = other.encapsulate(packet) == "encap_multicast"
            return "encap_multicast" if is_multicast else "encap_family"
        length = self._inner_length(packet)
        if length is None:
            return "encap_malformed"
        _, destination = self._addresses(packet)
        if destination.is_multicast or destination == IPv4Address("255.255.255.255"):
            return "encap_multicast"
        route = self.lookup(destination)
        if route is None:
            return "no_route"
        header = b"\x08\0\0\0" + self.vni.to_bytes(3, "big") + b"\0"
        ethernet = route.vtep_mac.octets + self.mac.octets + _ETHERTYPE[self.network.version]
        ecn = self._ecn(packet)
        return header + ethernet + packet[:length], 2 if ecn == 3 else ecn

    def decapsulate(self, datagram: bytes, source: IPAddress, tos: int) -> bytes | str:
        """Return the inner packet, or the drop reason."""
        if len(datagram) < 22:
            return "short"
        if not datagram[0] & 8:
            return "no_vni_flag"
        reserved = datagram[0] & 0xF7 or any(datagram[1:4]) or datagram[7]
        if reserved and not self.ignore_reserved:
            return "reserved_bits"
        if int.from_bytes(datagram[4:7], "big") != self.vni:
            return "wrong_vni"
        to, sender_mac = MacAddress(datagram[8:14]), MacAddress(datagram[14:20])
        here = [route for route in self.routes if route.underlay == source]
        sender = next((x for x in here if sender_mac in (x.vtep_mac, x.previous_mac)), None)
        if sender is None and self.mode == "enforce":
            return "vtep_mac" if here else "unknown_vtep"
        if sender_mac == self.mac:
            return "loop"
        if to != self.mac:
            return "not_our_mac"
        if datagram[20:22] != _ETHERTYPE[self.network.version]:
            return "ethertype"
        packet = datagram[22:]
        length = self._inner_length(packet)
        if length is None:
            return "inner_malformed"
        if self.mode == "enforce" and not self._may_send(sender, self._addresses(packet)[0]):
            return "inner_source"
        ecn = _DECAP_ECN[self._ecn(packet), tos & 3]
        if ecn is None:
            return "ecn"
        return self._with_ecn(packet[:length], ecn)

    def _may_send(self, sender: Route | None, source: IPAddress) -> bool:
        if any(source in ip_network(network) for network in _NO_SOURCE[source.version]):
            return False
        if source not in self.network:
            return True
        return sender is not None and self.lookup(source) == sender

    def _addresses(self, packet: bytes) -> tuple[IPAddress, IPAddress]:
        if self.network.version == 6:
            return IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        return IPv4Address(packet[12:16]), IPv4Address(packet[16:20])

    def _ecn(self, packet: bytes) -> int:
        return (packet[1] >> 4 if self.network.version == 6 else packet[1]) & 3

    def _inner_length(self, packet: bytes) -> int | None:
        if self.network.version == 6:
            total = 40 + int.from_bytes(packet[4:6], "big")
            sound = len(packet) >= 40 and packet[0] >> 4 == 6 and total <= len(packet)
            return total if sound else None
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return None
        header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        if not 20 <= header <= total <= len(packet) or checksum(packet[:header]):
            return None
        return total

    def _with_ecn(self, packet: bytes, ecn: int) -> bytes:
        changed = bytearray(packet)
        if self.network.version == 6:
            changed[1] = packet[1] & 0xCF | ecn << 4
        elif self._ecn(packet) != ecn:
            header = (packet[0] & 15) * 4
            changed[1] = packet[1] & 0xFC | ecn
            changed[10:12] = b"\0\0"
            changed[10:12] = checksum(bytes(changed[:header])).to_bytes(2, "big")
        return bytes(changed)
