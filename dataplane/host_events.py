"""What changes on the host, as the kernel tells it: links, addresses and routes, by rtnetlink.

It turns messages into the values of `host_change`, which decides what they mean for us, and calls
back on the event loop. When the kernel had more to tell than the socket holds, the value is
Overrun: whoever listens must look for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network

from pyflannel.dataplane.host_change import (
    AddressChanged,
    HostEvent,
    LinkChanged,
    Overrun,
    RouteChanged,
)
from pyflannel.dataplane.kernel_routes import attributes

# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_RTM_NEWLINK, _RTM_DELLINK = 16, 17
_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25
_IFLA_IFNAME, _IFLA_MTU = 3, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF = 1, 4
_RTN_UNICAST = 1
_RTM_F_CLONED = 0x200
_IFF_UP = 1
_GROUPS = 1 << 0 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10
"""RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")

# linux/socket.h
_SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 4 << 20
READ_BYTES = 1 << 16
READS_PER_TURN = 32


def parse_events(messages: bytes, own_port: int = 0) -> Iterator[HostEvent]:
    """Read the kernel's messages; those that are none of ours are passed over.

    So are those that answer to `own_port`, the netlink port of what we changed ourselves; 0 is the
    kernel's own.
    """
    while len(messages) >= _HEADER.size:
        length, kind, _, _, author = _HEADER.unpack_from(messages)
        if not _HEADER.size <= length <= len(messages):
            return
        if not author or author != own_port:
            event = _event(kind, messages[_HEADER.size : length])
            if event is not None:
                yield event
        messages = messages[(length + 3) & ~3 :]


def _event(kind: int, body: bytes) -> HostEvent | None:
    if kind in (_RTM_NEWLINK, _RTM_DELLINK):
        return _link(body, is_gone=kind == _RTM_DELLINK)
    if kind in (_RTM_NEWADDR, _RTM_DELADDR):
        return _address(body, is_gone=kind == _RTM_DELADDR)
    if kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
        return _route(body, is_gone=kind == _RTM_DELROUTE)
    return None


def _u32(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


def _link(body: bytes, *, is_gone: bool) -> HostEvent | None:
    family, _, index, flags, _ = _LINK.unpack_from(body)
    # A port that leaves a bridge is a deleted "link" of AF_BRIDGE.
    if family != socket.AF_UNSPEC:
        return None
    found = attributes(body, _LINK.size)
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
    return LinkChanged(index, name, is_gone, bool(flags & _IFF_UP), _u32(found.get(_IFLA_MTU)))


def _address(body: bytes, *, is_gone: bool) -> HostEvent | None:
    _, _, _, _, index = _ADDRESS.unpack_from(body)
    found = attributes(body, _ADDRESS.size)
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    return AddressChanged(index, ip_address(packed), is_gone) if packed else None


def _route(body: bytes, *, is_gone: bool) -> HostEvent | None:
    family, length, _, _, _, _, _, kind, flags = _ROUTE.unpack_from(body)
    if kind != _RTN_UNICAST or flags & _RTM_F_CLONED:
        return None
    found = attributes(body, _ROUTE.size)
    packed = found.get(_RTA_DST) or bytes(4 if family == socket.AF_INET else 16)
    return RouteChanged(ip_network((packed, length)), _u32(found.get(_RTA_OIF)), is_gone)


def watch_host(on_event: Callable[[HostEvent], None], own_port: int, stack: ExitStack) -> None:
    """Call `on_event` on the event loop for every change by others, until the stack is left."""
    kinds = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    netlink = stack.enter_context(socket.socket(socket.AF_NETLINK, kinds, socket.NETLINK_ROUTE))
    with contextlib.suppress(PermissionError):
        netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    netlink.bind((0, _GROUPS))
    # An overrun is a socket error, after which uvloop would never read the socket again.
    epoll = stack.enter_context(contextlib.closing(select.epoll()))
    epoll.register(netlink.fileno(), select.EPOLLIN)

    def read() -> None:
        for _ in range(READS_PER_TURN):
            try:
                messages = netlink.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                on_event(Overrun())
                continue
            for event in parse_events(messages, own_port):
                on_event(event)

    loop = asyncio.get_running_loop()
    loop.add_reader(epoll.fileno(), read)
    stack.callback(loop.remove_reader, epoll.fileno())
