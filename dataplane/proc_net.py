"""What the kernel tells in /proc of the network: who holds a socket, what a device dropped."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from ipaddress import IPv6Address
from pathlib import Path

# Not /proc/net, which is that of the process: a thread may be in another network namespace.
_PROC_NET = Path("/proc/thread-self/net")
_NAMESPACE = Path("/proc/thread-self/ns/net")
# Fields of a row of `udp` and `udp6`, and of `dev`.
_LOCAL, _INODE = 1, 9
_TRANSMIT_DROPS = 12
# Fields of a row of `if_inet6`, and of its flags (linux/if_addr.h).
_ADDRESS, _FLAGS = 0, 4
_DAD_FAILED, _TENTATIVE = 0x08, 0x40


def network_namespace() -> str:
    """Return the name of this network namespace, which no other on this machine has."""
    return os.readlink(_NAMESPACE)


def udp_inodes(port: int, tables: Sequence[str] = ("udp", "udp6")) -> set[str]:
    """Return the inodes of the UDP sockets on the port that these tables list (proc(5))."""
    inodes = set()
    for table in tables:
        for fields in _rows(table):
            if int(fields[_LOCAL].rpartition(":")[2], 16) == port:
                inodes.add(fields[_INODE])
    return inodes


def unix_inodes(name: str) -> set[str]:
    """Return the inodes of the unix sockets of this name, @ before one that is abstract."""
    return {fields[6] for fields in _rows("unix") if fields[7:] == [name]}


def is_tentative(address: IPv6Address) -> bool:
    """Whether this host has an address and still looks for duplicates of it (RFC 4862)."""
    wanted = address.packed.hex()
    flags = (int(x[_FLAGS], 16) for x in _rows("if_inet6", titles=0) if x[_ADDRESS] == wanted)
    return any(one & (_DAD_FAILED | _TENTATIVE) == _TENTATIVE for one in flags)


def _rows(table: str, titles: int = 1) -> list[list[str]]:
    try:
        lines = (_PROC_NET / table).read_text(errors="replace").splitlines()
    except (FileNotFoundError, PermissionError):  # as `udp6` without IPv6; a locked-down host
        return []
    return [line.split() for line in lines[titles:]]


def processes(inodes: Collection[str]) -> list[str]:
    """Return name and pid of each visible process that has one of these sockets open."""
    links = {f"socket:[{inode}]" for inode in inodes}
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        if _has_open(process, links):
            try:
                name = (process / "comm").read_text(errors="replace").strip()
            except OSError:
                continue
            found.append(f"{name} (pid {process.name})")
    return found


def _has_open(process: Path, links: Collection[str]) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        # The process went away, or we may not look.
        return False
    return any(_link(descriptor) in links for descriptor in descriptors)


def _link(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


def transmit_drops(device: str) -> int:
    """Return how many packets a device has dropped that it was to send; 0 where there is none."""
    rows = (row for row in _rows("dev") if row[0] == f"{device}:")
    return next((int(row[_TRANSMIT_DROPS]) for row in rows), 0)
