"""Notices that somebody changed the firewall, so that our rules are looked at within a second.

nftables, and iptables on top of it, tell every change by nfnetlink. The old iptables tells nothing:
there a digest that the kernel gives without a fork is compared twice a second. What is missed by
either is found by the periodic check, which is not this module's business.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from pyflannel.dataplane.traffic_rules import CHAINS, nft_table

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NETLINK_NO_ENOBUFS = 270, 1, 5
_NETLINK_NETFILTER, _NFNLGRP_NFTABLES, _NFNL_SUBSYS_NFTABLES = 12, 7, 10
_NFT_MSG_NEWTABLE, _NFT_MSG_DELTABLE = 0, 2
_NFTA_TABLE, _NFTA_RULE_CHAIN, _NFTA_CHAIN_NAME = 1, 2, 3
_NFPROTO = {4: socket.AF_INET, 6: socket.AF_INET6}
_NLA_TYPE_MASK = 0x3FFF
# linux/netfilter_ipv4/ip_tables.h; IPv6 has the same number and structure
_SO_GET_INFO = 64
_INFO = struct.Struct("=32s13I")
_LEVEL = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}

POLL_SECONDS = 0.5
READ_BYTES = 1 << 16

Interest = Mapping[tuple[int, str], frozenset[str] | None]
"""The chains of interest by (address family, table); None means all of the table."""


def nftables_interest() -> Interest:
    """Return what concerns us where the rules are in nftables: the tables of both families."""
    return {(_NFPROTO[x], nft_table(x).split()[1]): None for x in _NFPROTO}


def iptables_interest(versions: Iterable[int]) -> Interest:
    """Return what concerns us where iptables writes to nf_tables.

    Only our chains and the ones that jump to them: kube-proxy rewrites others all the time.
    """
    return {
        (_NFPROTO[version], chain.table): frozenset((chain.name, chain.hook))
        for version in versions
        for chain in CHAINS
    }


def concerns_us(messages: bytes, interest: Interest) -> bool:
    """Whether one of the kernel's messages tells of a table or chain of interest."""
    while len(messages) >= 20:
        length, kind, _, _, _, family = struct.unpack_from("=IHHIIB", messages)
        if length < 20:
            break
        message, messages = messages[20:length], messages[(length + 3) & ~3 :]
        if kind >> 8 != _NFNL_SUBSYS_NFTABLES:
            continue
        names = _attributes(message)
        table = (family, names.get(_NFTA_TABLE, ""))
        if table not in interest:
            continue
        chains = interest[table]
        if chains is None or kind & 0xFF in (_NFT_MSG_NEWTABLE, _NFT_MSG_DELTABLE):
            return True
        if chains & {names.get(_NFTA_RULE_CHAIN), names.get(_NFTA_CHAIN_NAME)}:
            return True
    return False


def _attributes(message: bytes) -> dict[int, str]:
    """Return the first attributes, which are strings in all messages about tables and chains."""
    found = {}
    while len(message) >= 4:
        length, kind = struct.unpack_from("=HH", message)
        if length < 4:
            break
        if kind & _NLA_TYPE_MASK <= _NFTA_CHAIN_NAME:
            found[kind & _NLA_TYPE_MASK] = message[4:length].rstrip(b"\0").decode("latin-1")
        message = message[(length + 3) & ~3 :]
    return found


def watch_events(interest: Interest, on_change: Callable[[], None], stack: ExitStack) -> None:
    """Call `on_change` on the event loop after changes of interest, until the stack is left.

    A kernel without nfnetlink has no nftables, so nothing changes there.
    """
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        netlink = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return
    stack.enter_context(netlink)
    # An overrun would be a socket error, after which uvloop never reads the socket again.
    netlink.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    # Without a port number the kernel takes us for itself and tells us nothing.
    netlink.bind((0, 0))
    netlink.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)

    def read() -> None:
        try:
            while True:
                if concerns_us(netlink.recv(READ_BYTES), interest):
                    on_change()
        except BlockingIOError:
            return

    loop = asyncio.get_running_loop()
    loop.add_reader(netlink.fileno(), read)
    stack.callback(loop.remove_reader, netlink.fileno())


def watch_legacy(versions: Iterable[int], on_change: Callable[[], None], stack: ExitStack) -> None:
    """Call `on_change` when the size or layout of a table changes, until the stack is left."""
    watched = [
        (
            stack.enter_context(socket.socket(_NFPROTO[version], socket.SOCK_DGRAM)),
            version,
            chain.table,
        )
        for version in versions
        for chain in CHAINS
    ]

    async def poll() -> None:
        last = None
        while True:
            now = [_legacy_digest(*one) for one in watched]
            if last is not None and now != last:
                on_change()
            last = now
            await asyncio.sleep(POLL_SECONDS)

    stack.callback(asyncio.ensure_future(poll()).cancel)


_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt


def _legacy_digest(sock: socket.socket, version: int, table: str) -> bytes | None:
    """Return number, size and offsets of a table's rules; None where there is no such table.

    By way of ctypes, because Python's own getsockopt cannot tell the kernel the table's name.
    """
    buffer = ctypes.create_string_buffer(_INFO.pack(table.encode(), *[0] * 13), _INFO.size)
    size = ctypes.c_uint32(_INFO.size)
    failed = _getsockopt(sock.fileno(), _LEVEL[version], _SO_GET_INFO, buffer, ctypes.byref(size))
    return None if failed else buffer.raw
