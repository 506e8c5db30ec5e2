"""The kernel's routes to peers: through our device, or straight to a peer on the same link.

Blocking: it runs in netlink's thread. Messages are made and read here, in batches, which is many
times faster than one call a route. It decides what follows from the kernel's own
way to a peer: whether it can be reached directly (DirectRouting, spec section 7), and the MTU of
the route to its subnet. OSError with ENODEV when the device is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from pyflannel.dataplane.route import IPAddress, IPNetwork

LOOKUPS = 100
"""In one batch: the kernel has an answer of its own for each."""
WRITES = 500
"""In one batch, of which the kernel answers the last and what it refuses."""
RECEIVE_BUFFER = 1 << 20
REFUSAL_BYTES = 2048
"""What one takes of the receive buffer at most."""
_PORT_BASE = 1 << 30
READ_BYTES = 1 << 18

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
# linux/netlink.h, linux/rtnetlink.h
_HEADER, _RTMSG, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBBBBBI"), "=HH"
_ATTRIBUTE_HEADER = struct.calcsize(_ATTRIBUTE)
# A struct rtmsg, destination, gateway and device.
_GATEWAY_ROUTE = {
    version: struct.Struct(f"=BBBBBBBBI HH{octets}s HH{octets}s HHI")
    for version, octets in ((4, 4), (6, 16))
}
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
_NLM_F_DUMP = 0x300
_NLA_TYPE_MASK = 0x3FFF
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_METRICS, _RTAX_MTU = 1, 2, 4, 5, 8, 2
_RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 3, 0, 1
_RTNH_F_ONLINK = 4
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_MTU_MIN = {4: 68, 6: 1280}
_VERSION = {family: version for version, family in _FAMILY.items()}


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """`SUBNET via GATEWAY dev INDEX`, and whether the gateway is taken to be there (`onlink`).

    `mtu` in bytes, 0 where it is the device's.
    """

    subnet: IPNetwork
    gateway: IPAddress
    index: int
    onlink: bool
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class _Way:
    """How the kernel sends to a peer: on this link (`index`), or by a gateway; `mtu` as above."""

    index: int | None
    mtu: int


_UNKNOWN = _Way(None, 0)


@dataclass(frozen=True, slots=True)
class DirectRouting:
    """Peers on our link get a route without encapsulation; the network, and its subnets' length."""

    network: IPNetwork
    subnet_len: int


class PeerRoutes:
    """The routes to the peers of one device; `direct` is None where all are encapsulated.

    `mtu` is the device's, `overhead` what encapsulation adds, both in bytes. Where the kernel knows
    a smaller MTU on the way to a peer, the route to its subnet has what remains of that, so that
    senders are told (RFC 1191) instead of every packet being sent in fragments. `source` is the
    address that is sent from, by which rules may choose the way; None where it is not asked.
    """

    def __init__(
        self,
        device: str,
        direct: DirectRouting | None,
        *,
        mtu: int,
        overhead: int,
        source: IPAddress | None = None,
    ) -> None:
        self.mtu = mtu
        self.source = source
        self._device = device
        self._direct = direct
        self._overhead = overhead
        # Above the kernel's choices: a process id, or a negative number (netlink(7)).
        self.port = _PORT_BASE | secrets.randbits(30)
        """The netlink port that the kernel names as the author of what is written here."""

    def apply(
        self, replace: Mapping[IPNetwork, IPAddress], delete: Sequence[IPNetwork]
    ) -> list[tuple[IPNetwork, int]]:
        """Write routes to subnets behind underlay addresses; return what failed with its errno.

        A route to delete that is not there is no failure.
        """
        with _open(self.port) as netlink:
            return _write(netlink, self._wanted(netlink, replace).values(), delete)

    def sync(
        self, peers: Mapping[IPNetwork, IPAddress]
    ) -> tuple[int, int, list[tuple[IPNetwork, int]]]:
        """Make the routes exactly these; return how many came and went, and what failed as `apply`.

        Only routes of protocol boot with a gateway are looked at, as flannel writes them.
        """
        index = device_index(self._device)
        with _open(self.port) as netlink:
            wanted = self._wanted(netlink, peers)
            right, stale = set(), []
            for route in _dump(netlink):
                if route == wanted.get(route.subnet):
                    right.add(route.subnet)
                elif route.subnet in wanted:
                    continue
                elif route.index == index or self._was_direct(route):
                    stale.append(route.subnet)
            missing = [route for subnet, route in wanted.items() if subnet not in right]
            failed = _write(netlink, missing, stale)
        return len(missing), len(stale), failed

    def may_write_ahead(self) -> bool:
        """Whether the device has no route to a peer yet, and peers are reached through it."""
        if self._direct is not None:
            return False
        index = device_index(self._device)
        with _open(self.port) as netlink:
            return all(route.index != index for route in _dump(netlink))

    def write_ahead(
        self, replace: Mapping[IPNetwork, IPAddress], delete: Sequence[IPNetwork]
    ) -> list[tuple[IPNetwork, int]]:
        """Do what `apply` does without asking for the way to each peer; `sync` is to follow.

        It hardly needs the interpreter, so that other threads go on meanwhile.
        """
        index = device_index(self._device)
        with _open(self.port) as netlink:
            routes = [self._route(*peer, _UNKNOWN, index) for peer in replace.items()]
            return _write(netlink, routes, delete)

    def _was_direct(self, route: KernelRoute) -> bool:
        """Whether we must have made it in an earlier run: nobody else routes these subnets."""
        direct = self._direct
        return (
            direct is not None
            and route.subnet.prefixlen == direct.subnet_len
            and route.subnet.network_address in direct.network
        )

    def _wanted(
        self, netlink: socket.socket, peers: Mapping[IPNetwork, IPAddress]
    ) -> dict[IPNetwork, KernelRoute]:
        index = device_index(self._device)
        # What is not encapsulated is sent from the containers' addresses.
        ways = _ways_to(netlink, peers.values(), None if self._direct else self.source)
        return {
            subnet: self._route(subnet, underlay, ways.get(underlay, _UNKNOWN), index)
            for subnet, underlay in peers.items()
        }

    def _route(self, subnet: IPNetwork, underlay: IPAddress, way: _Way, index: int) -> KernelRoute:
        if self._direct is not None and way.index is not None:
            return KernelRoute(subnet, underlay, way.index, onlink=False)
        mtu = 0
        if way.mtu and way.mtu - self._overhead < self.mtu:
            mtu = max(way.mtu - self._overhead, _MTU_MIN[subnet.version])
        return KernelRoute(subnet, subnet.network_address, index, onlink=True, mtu=mtu)


def device_index(name: str) -> int:
    """Return the index of a device; OSError with ENODEV when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        # Python's own error says neither number nor name.
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name) from None


def _open(port: int) -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        netlink.bind((port, 0))
        # Only root of the whole machine may, not that of a user namespace.
        with contextlib.suppress(PermissionError):
            netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except OSError:
        netlink.close()
        raise
    return netlink


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack(_ATTRIBUTE, _ATTRIBUTE_HEADER + len(value), kind) + value


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, sequence, 0) + body


def _write(
    netlink: socket.socket, replace: Iterable[KernelRoute], delete: Iterable[IPNetwork]
) -> list[tuple[IPNetwork, int]]:
    """Delete, then write; return (subnet, errno) of what the kernel refused.

    In IPv6 it refuses a gateway that the route to be replaced leads to by another device
    (ip6_route_check_nh_onlink), as a direct one does to the base of its subnet: that goes first.
    """
    routes = {route.subnet: route for route in replace}
    failed = dict(_write_batches(netlink, routes.values(), delete))
    hidden = [
        subnet
        for subnet, err in failed.items()
        if err == errno.EINVAL
        and subnet in routes
        and routes[subnet].onlink
        and subnet.version == 6
    ]
    if hidden:
        for subnet in hidden:
            del failed[subnet]
        failed |= dict(_write_batches(netlink, [routes[x] for x in hidden], hidden))
    return list(failed.items())


def _write_batches(
    netlink: socket.socket, replace: Iterable[KernelRoute], delete: Iterable[IPNetwork]
) -> list[tuple[IPNetwork, int]]:
    work = [(subnet, _delete_message(subnet)) for subnet in delete]
    deletions = len(work)
    work += [(route.subnet, _replace_message(route)) for route in replace]
    failed = []
    room = netlink.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    size = min(WRITES, room // REFUSAL_BYTES)
    for start in range(0, len(work), size):
        batch = work[start : start + size]
        last = start + len(batch) - 1
        # Refusals are told without being asked for.
        netlink.send(
            b"".join(
                _message(kind, flags | (_NLM_F_ACK if sequence == last else 0), sequence, body)
                for sequence, (_, (kind, flags, body)) in enumerate(batch, start)
            )
        )
        for kind, sequence, body in _answers(netlink, last):
            if kind != _NLMSG_ERROR:
                continue
            err = -struct.unpack_from("=i", body)[0]
            if err and not (sequence < deletions and err == errno.ESRCH):
                failed.append((work[sequence][0], err))
    return failed


def _replace_message(route: KernelRoute) -> tuple[int, int, bytes]:
    """Return kind, flags and body of a route as flanneld writes it, protocol boot."""
    subnet, length = route.subnet, _ATTRIBUTE_HEADER + route.subnet.max_prefixlen // 8
    # In one piece, as there may be 10,000 of them.
    body = _GATEWAY_ROUTE[subnet.version].pack(
        *_route_fields(subnet, _RTNH_F_ONLINK if route.onlink else 0),
        *(length, _RTA_DST, subnet.network_address.packed),
        *(length, _RTA_GATEWAY, route.gateway.packed),
        *(_ATTRIBUTE_HEADER + 4, _RTA_OIF, route.index),
    )
    if route.mtu:
        body += _attribute(_RTA_METRICS, _attribute(_RTAX_MTU, struct.pack("=I", route.mtu)))
    return _RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, body


def _delete_message(subnet: IPNetwork) -> tuple[int, int, bytes]:
    """Return kind, flags and body for the route of protocol boot, whichever way it leads."""
    header = _RTMSG.pack(*_route_fields(subnet, 0))
    return _RTM_DELROUTE, 0, header + _attribute(_RTA_DST, subnet.network_address.packed)


def _route_fields(subnet: IPNetwork, flags: int) -> tuple[int, ...]:
    """Return the fields of a struct rtmsg of protocol boot, whose attributes follow."""
    family, main = _FAMILY[subnet.version], _RT_TABLE_MAIN
    scope = _RT_SCOPE_UNIVERSE
    return family, subnet.prefixlen, 0, 0, main, _RTPROT_BOOT, scope, _RTN_UNICAST, flags


def _ways_to(
    netlink: socket.socket, addresses: Iterable[IPAddress], source: IPAddress | None
) -> dict[IPAddress, _Way]:
    """Return how the kernel reaches each address; those that it cannot reach are left out."""
    wanted = list(dict.fromkeys(addresses))
    found = {}
    for start in range(0, len(wanted), LOOKUPS):
        batch = wanted[start : start + LOOKUPS]
        netlink.send(
            b"".join(
                _message(_RTM_GETROUTE, 0, sequence, _lookup(address, source))
                for sequence, address in enumerate(batch, start)
            )
        )
        for kind, sequence, body in _answers(netlink, start + len(batch) - 1):
            if kind != _RTM_NEWROUTE or _RTMSG.unpack_from(body)[7] != _RTN_UNICAST:
                continue
            about = attributes(body)
            on_link = _RTA_GATEWAY not in about and _RTA_OIF in about
            found[wanted[sequence]] = _Way(_index(about) if on_link else None, _mtu(about))
    return found


def _lookup(address: IPAddress, source: IPAddress | None) -> bytes:
    family, length = _FAMILY[address.version], address.max_prefixlen
    header = _RTMSG.pack(family, length, length if source else 0, 0, 0, 0, 0, 0, 0)
    to = _attribute(_RTA_DST, address.packed)
    return header + to + (_attribute(_RTA_SRC, source.packed) if source else b"")


def _dump(netlink: socket.socket) -> Iterator[KernelRoute]:
    """Read the unicast routes of protocol boot in the main table that have a gateway."""
    for family in _VERSION:
        body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)
        netlink.send(_message(_RTM_GETROUTE, _NLM_F_DUMP, 0, body))
        for _, _, message in _answers(netlink, None):
            _, length, _, _, table, protocol, _, kind, flags = _RTMSG.unpack_from(message)
            if (table, protocol, kind) != (_RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST):
                continue
            about = attributes(message)
            if not about.keys() >= {_RTA_DST, _RTA_GATEWAY, _RTA_OIF}:
                continue
            yield KernelRoute(
                ip_network((about[_RTA_DST], length)),
                ip_address(about[_RTA_GATEWAY]),
                _index(about),
                bool(flags & _RTNH_F_ONLINK),
                _mtu(about),
            )


def _mtu(about: Mapping[int, bytes]) -> int:
    value = attributes(about.get(_RTA_METRICS, b""), 0).get(_RTAX_MTU)
    return int(struct.unpack("=I", value)[0]) if value else 0


def _index(about: Mapping[int, bytes]) -> int:
    return int(struct.unpack("=I", about[_RTA_OIF])[0])


def attributes(message: bytes, offset: int = _RTMSG.size) -> dict[int, bytes]:
    """Read the attributes of a message of the kernel, those of a route unless `offset` is given."""
    found = {}
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from(_ATTRIBUTE, message, offset)
        found[kind & _NLA_TYPE_MASK] = message[offset + 4 : offset + length]
        offset += max(4, (length + 3) & ~3)
    return found


def _answers(netlink: socket.socket, last: int | None) -> Iterator[tuple[int, int, bytes]]:
    """Read (kind, sequence, body) until that of sequence `last`, or if None the end of a dump."""
    while True:
        datagram = netlink.recv(READ_BYTES)
        offset = 0
        while offset < len(datagram):
            length, kind, _, sequence, _ = _HEADER.unpack_from(datagram, offset)
            if kind == _NLMSG_DONE or (last is None and kind == _NLMSG_ERROR):
                return
            yield kind, sequence, datagram[offset + _HEADER.size : offset + length]
            if sequence == last:
                return
            offset += (length + 3) & ~3
