"""Open descriptors that we did not open: those of the process before us, or kept by systemd.

Nothing is believed about them: each is recognised by asking the kernel what it is. Queued packets
come with them, so whoever takes them over loses none.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

# linux/if_tun.h
_TUNGETIFF = 0x800454D2
_IFF_DETACH_QUEUE = 0x0400
_IFREQ = struct.Struct("16sH14x")


class Inheritance:
    """Descriptors to be taken by who knows them; `close` closes the rest."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._tuns: list[tuple[int, str, bool]] = []
        self._sockets: list[socket.socket] = []
        for fd in fds:
            os.set_inheritable(fd, False)
            tun = _tun_queue(fd)
            if tun is not None:
                self._tuns.append((fd, *tun))
                continue
            try:
                self._sockets.append(socket.socket(fileno=fd))
            except OSError:
                os.close(fd)

    @property
    def devices(self) -> set[str]:
        """Names of the TUN devices whose queues nobody took yet."""
        return {device for _, device, _ in self._tuns}

    def take_tun(self, device: str) -> list[int]:
        """Take the queues of a device, those that are read first, then the detached one."""
        taken = [one for one in self._tuns if one[1] == device]
        self._tuns = [one for one in self._tuns if one[1] != device]
        return [fd for fd, _, _ in sorted(taken, key=lambda one: one[2])]

    def take_sockets(
        self, family: int, kind: int, is_wanted: Callable[[Any], bool]
    ) -> list[socket.socket]:
        """Take the sockets of a family and type whose own address is wanted, in their order."""
        taken = [
            one
            for one in self._sockets
            if (one.family, one.type) == (family, kind) and is_wanted(one.getsockname())
        ]
        self._sockets = [one for one in self._sockets if one not in taken]
        return taken

    def close(self) -> None:
        """Close what nobody took; may be called again."""
        for fd, _, _ in self._tuns:
            os.close(fd)
        for one in self._sockets:
            one.close()
        self._tuns, self._sockets = [], []


def _tun_queue(fd: int) -> tuple[str, bool] | None:
    """Return the device of a TUN queue and whether it is detached; None if it is none, or gone."""
    request = bytearray(_IFREQ.size)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
    except OSError:
        return None
    name, flags = _IFREQ.unpack(request)
    return name.split(b"\0", 1)[0].decode(errors="replace"), bool(flags & _IFF_DETACH_QUEUE)
