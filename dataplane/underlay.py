"""The UDP sockets of the underlay and the lock that keeps a second daemon off the same port.

It does not know VXLAN or peers; it opens descriptors, and the fast path moves packets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.offload import NO_OFFLOAD, Offload
from pyflannel.dataplane.proc_net import is_tentative, processes, udp_inodes, unix_inodes
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

_RECEIVE_SOCKETS = 32
RECEIVE_BUFFER_BYTES = 4 << 20
"""Of each receive socket. The kernel takes up to twice as much memory for what is queued."""

# asm-generic/socket.h
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
# linux/sock_diag.h: the last of the words of SO_MEMINFO
_SK_MEMINFO_DROPS = 8
# linux/udp.h
_UDP_SEGMENT = 103
_UDP_GRO = 104
# linux/in.h, linux/in6.h; the socket module has these names only in some Python versions
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_DONT = 0
_IPV6_AUTOFLOWLABEL = 70
_IPV6_FREEBIND = 78

_BPF_RETURN_CONSTANT = 0x06


@dataclass(frozen=True, slots=True)
class _Family:
    """What sockets of one address family are given: (level, option, value)."""

    number: socket.AddressFamily
    proc_tables: tuple[str, ...]
    """Where those are listed that would keep us from a port."""
    receive: tuple[tuple[int, int, int], ...]
    send: tuple[tuple[int, int, int], ...]


# The outer header's ECN arrives as ancillary data (RFC 6040). What is sent is as the kernel's vxlan
# device sends it: DF clear (the default of a socket sets it), no flow label, and what a socket does
# unless told otherwise, the host's own TTL and a UDP checksum.
_FAMILIES = {
    4: _Family(
        socket.AF_INET,
        ("udp", "udp6"),
        receive=((socket.IPPROTO_IP, socket.IP_RECVTOS, 1),),
        send=((socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT),),
    ),
    6: _Family(
        socket.AF_INET6,
        ("udp6",),
        receive=(
            (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1),
            (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1),
        ),
        send=(
            (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT),
            (socket.IPPROTO_IPV6, _IPV6_AUTOFLOWLABEL, 0),
        ),
    ),
}


class Underlay:
    """The sockets that receive on the VXLAN port, those that send, and the instance lock.

    What a peer sends from one port always comes by the same receive socket. `is_adopted` tells
    whether those were inherited. All descriptors are of one address family, non-blocking, and owned
    by this object.
    """

    __slots__ = ("_closing", "_receivers", "_senders", "is_adopted", "lock_fd", "offload")

    def __init__(
        self,
        lock_fd: int,
        receivers: _Sockets,
        senders: _Sockets,
        offload: Offload,
        closing: ExitStack,
        *,
        is_adopted: bool,
    ) -> None:
        self.is_adopted = is_adopted
        self.lock_fd = lock_fd
        self.offload = offload
        self._receivers = receivers
        self._senders = senders
        self._closing = closing

    @classmethod
    def open(
        cls,
        interface_name: str,
        address: IPAddress,
        port: int,
        send_sockets: int,
        *,
        vxlan_devices: Collection[str] = (),
        offload: Offload | None = NO_OFFLOAD,
        inherited: Inheritance | None = None,
    ) -> Underlay:
        """Bind `port` on every address, and `send_sockets` sockets on `address` of the interface.

        The family of `address` is that of all sockets. The kernel's routes choose by which
        interface is sent, unless `address` is an IPv6 link-local one, which means nothing without
        its own. What is in `inherited` is used instead of binding anew, so nothing queued in it is
        lost.

        `vxlan_devices` names the kernel vxlan devices that are up on `port`; they are named in
        the refusal when the port is taken. `offload` None uses Offload.GSO and Offload.GRO where
        the kernel has them. Raises Refusal when the host says no or has not what `offload` asks
        for, and then leaves nothing open.
        """
        with ExitStack() as opened:
            family = _FAMILIES[address.version]
            old = _take(inherited or Inheritance(), port, address)
            lock = opened.enter_context(old.lock or _instance_lock(port, address.version))
            receivers = opened.enter_context(
                old.receivers or _receive_sockets(family, port, vxlan_devices)
            )
            _check_calls(receivers.sockets[0])
            for one in receivers.sockets:
                _widen(one)
            senders = opened.enter_context(
                old.senders or _send_sockets(interface_name, address, send_sockets)
            )
            agreed = _agree(offload, Offload.GSO, senders.sockets[:1], _UDP_SEGMENT, 0)
            agreed |= _agree(offload, Offload.GRO, receivers.sockets, _UDP_GRO, 1)
            return cls(
                lock.fileno(),
                receivers,
                senders,
                agreed,
                opened.pop_all(),
                is_adopted=old.receivers is not None,
            )

    @property
    def receive_fds(self) -> tuple[int, ...]:
        """The sockets to receive from."""
        return self._receivers.fds

    @property
    def receive_buffer(self) -> int:
        """How many bytes a receive socket was given, RECEIVE_BUFFER_BYTES at best."""
        return min(map(_receive_buffer, self._receivers.sockets))

    def drops(self) -> int:
        """Return how often the kernel has dropped what came for us, since the sockets were made.

        They had no room for it, or its outer checksum was wrong. What UDP_GRO has joined counts
        once. Inherited sockets bring what they had counted. Linux before 4.12 tells 0.
        """
        return sum(map(_drops, self._receivers.sockets))

    @property
    def send_fds(self) -> tuple[int, ...]:
        """The sockets to send from; others after `rebind`."""
        return self._senders.fds

    def rebind(self, interface_name: str, address: IPAddress) -> AbstractContextManager[object]:
        """Send from another address; the sockets so far are closed when the result is left.

        Refusal when that cannot be, and then everything stays.
        """
        old = self._senders
        self._senders = _send_sockets(interface_name, address, len(old.sockets))
        self._closing.enter_context(self._senders)
        return old

    def close(self) -> None:
        """Close every socket and release the lock; idempotent."""
        self._closing.close()


class _Sockets:
    """Sockets that are closed when it is left as a context."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(one.fileno() for one in self.sockets)

    def __enter__(self) -> _Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.sockets:
            one.close()


@dataclass(frozen=True, slots=True)
class _Taken:
    lock: socket.socket | None
    receivers: _Sockets | None
    senders: _Sockets | None


def _take(inherited: Inheritance, port: int, address: IPAddress) -> _Taken:
    """Take what is there of the sockets for this port and address."""
    name = b"\0" + lock_name(port, address.version).encode()
    family = _FAMILIES[address.version].number
    locks = inherited.take_sockets(socket.AF_UNIX, socket.SOCK_STREAM, lambda own: own == name)
    receivers = inherited.take_sockets(family, socket.SOCK_DGRAM, lambda own: own[1] == port)
    senders = inherited.take_sockets(family, socket.SOCK_DGRAM, lambda own: own[0] == str(address))
    return _Taken(
        next(iter(locks), None),
        _Sockets(receivers) if receivers else None,
        _Sockets(senders) if senders else None,
    )


def lock_name(port: int, version: int) -> str:
    """Return the abstract name of a unix socket that whoever serves a port holds."""
    return f"pyflannel-udp/{port}" if version == 4 else f"pyflannel-udp/{port}/ipv6"


def _instance_lock(port: int, version: int) -> socket.socket:
    """Hold an abstract name, of which there is one in each network namespace."""
    name = lock_name(port, version)
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0{name}")
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise Refusal(
            f"another pyflannel-udp{_in_brackets(processes(unix_inodes('@' + name)))} already "
            f"serves UDP port {port} in this network namespace: stop it first"
        ) from None
    return lock


def _send_sockets(interface_name: str, address: IPAddress, count: int) -> _Sockets:
    family = _FAMILIES[address.version]
    with ExitStack() as opened:
        sockets = [
            opened.enter_context(_send_socket(family, interface_name, address))
            for _ in range(count)
        ]
        opened.pop_all()
        return _Sockets(sockets)


def _receive_sockets(family: _Family, port: int, vxlan_devices: Collection[str]) -> _Sockets:
    """Bind several sockets to one port; the kernel chooses by the sender's address and port.

    It must not choose by the inner flow: UDP_GRO joins datagrams of several, and they go where the
    first one does. The first socket is bound without SO_REUSEPORT, so that another program's port
    is never shared.
    """
    with ExitStack() as opened:
        first = opened.enter_context(_receive_socket(family))
        try:
            first.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _port_taken(family, port, vxlan_devices) from None
            if error.errno == errno.EACCES:
                raise Refusal(
                    f"binding UDP port {port} is not permitted: run as root or with "
                    "CAP_NET_BIND_SERVICE"
                ) from None
            raise
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sockets = [first]
        while len(sockets) < _RECEIVE_SOCKETS:
            one = opened.enter_context(_receive_socket(family))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("", port))
            sockets.append(one)
        opened.pop_all()
        return _Sockets(sockets)


def _receive_socket(family: _Family) -> socket.socket:
    receive = _udp_socket(family)
    try:
        for option in family.receive:
            receive.setsockopt(*option)
    except OSError:
        receive.close()
        raise
    return receive


def _check_calls(udp: socket.socket) -> None:
    """Refuse a host whose filter of system calls keeps the fast path from moving packets."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("recvmmsg", "sendmmsg"):
        # Of no message, so nothing is received, sent or waited for.
        if getattr(libc, name)(udp.fileno(), None, 0, socket.MSG_DONTWAIT, None) < 0:
            err = ctypes.get_errno()
            if err in (errno.ENOSYS, errno.EPERM, errno.EACCES):
                raise Refusal(
                    f"the system call {name}, by which packets move, is not permitted here "
                    f"({os.strerror(err)}): allow it in the filter of system calls (docker run "
                    "--security-opt seccomp=, systemd: SystemCallFilter=@network-io)"
                )


def _send_socket(family: _Family, interface_name: str, address: IPAddress) -> socket.socket:
    send = _udp_socket(family)
    try:
        # Before bind: nothing that is sent to our source port may queue up here.
        _drop_all_received(send)
        if address.version == 6 and address.is_link_local:
            send.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface_name.encode())
        for option in family.send:
            send.setsockopt(*option)
        # At boot an address may be too young to be bound to; the kernel's device sends from it too.
        if address.version == 6 and is_tentative(address):
            send.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        send.bind((str(address), 0))
    except OSError as error:
        send.close()
        if error.errno == errno.ENODEV:
            raise Refusal(
                f"the underlay interface {interface_name} does not exist: correct --iface"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise Refusal(
                f"{address} is not an address of this host, so nothing can be sent from it: "
                f"put it on {interface_name} or correct --iface"
            ) from None
        if error.errno == errno.EPERM:
            raise Refusal(
                f"binding a socket to interface {interface_name} is not permitted: run as root "
                "or with CAP_NET_RAW"
            ) from None
        raise
    return send


def _agree(
    wanted: Offload | None, one: Offload, sockets: Sequence[socket.socket], option: int, value: int
) -> Offload:
    """Set an option of sockets if its offload is wanted; what is in use then."""
    if wanted is not None and one not in wanted:
        return NO_OFFLOAD
    try:
        for udp in sockets:
            udp.setsockopt(socket.IPPROTO_UDP, option, value)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        if wanted is not None:
            raise Refusal(
                f"this kernel's UDP has no {one}: take it out of --offload, or use auto"
            ) from None
        return NO_OFFLOAD
    return one


def _udp_socket(family: _Family) -> socket.socket:
    try:
        return socket.socket(family.number, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        raise Refusal(
            "this kernel has no IPv6: boot it without ipv6.disable=1, or set EnableIPv6 to false"
        ) from None


def _receive_buffer(udp: socket.socket) -> int:
    # The kernel doubles what it is asked for, and tells that.
    return udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def _drops(receive: socket.socket) -> int:
    words = struct.Struct(f"={_SK_MEMINFO_DROPS + 1}I")
    try:
        told = receive.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, words.size)
    except OSError:  # before Linux 4.12
        return 0
    return int(words.unpack(told)[_SK_MEMINFO_DROPS])


def _widen(receive: socket.socket) -> None:
    """Give a receive socket its buffer, also one that was opened when less was granted."""
    if _receive_buffer(receive) >= RECEIVE_BUFFER_BYTES:
        return
    try:
        receive.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    except PermissionError:
        receive.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)


def grantable_receive_buffer() -> int:
    """Return how many bytes a receive socket of this process would be given."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        _widen(udp)
        return _receive_buffer(udp)


def _drop_all_received(udp: socket.socket) -> None:
    """Attach the classic BPF program `ret #0` (linux/filter.h: sock_filter, sock_fprog)."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN_CONSTANT, 0, 0, 0), 8)
    fprog = struct.pack("HP", 1, ctypes.addressof(program))
    udp.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


def _port_taken(family: _Family, port: int, vxlan_devices: Collection[str]) -> Refusal:
    if vxlan_devices:
        name = min(vxlan_devices)
        return Refusal(
            f"UDP port {port} is held by the kernel vxlan device "
            f"{', '.join(sorted(vxlan_devices))}: stop what made it (flanneld?) and delete it "
            f"with `ip link delete {name}`"
        )
    holders = processes(udp_inodes(port, family.proc_tables))
    if holders:
        return Refusal(f"UDP port {port} is held by {', '.join(holders)}: stop it first")
    return Refusal(
        f"UDP port {port} is taken by the kernel or by a process that cannot be seen from here: "
        f"look with `ss -uanp sport = :{port}` and `ip -d link show type vxlan` on the host"
    )


def _in_brackets(processes: list[str]) -> str:
    return f" ({', '.join(processes)})" if processes else ""
