"""A lone network namespace, and functions of this process run inside one."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pyflannel.dataplane.tun import Tun
from tests.lab.hosts import Namespace, run

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns is there from Python 3.12 on only


def inside(namespace: Namespace, work: Callable[[], T]) -> T:
    """Return what a function returns in a namespace; the thread it ran in is gone afterwards.

    Sockets and threads that it made stay in the namespace.
    """

    def enter_and_work() -> T:
        fd = os.open(Path("/run/netns") / namespace.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(fd, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_work).result()


@contextmanager
def lone_namespace() -> Iterator[Namespace]:
    """Make a namespace without a lab around it."""
    namespace = Namespace(f"pfu-{secrets.token_hex(3)}-one")
    run("ip", "netns", "add", namespace.name)
    try:
        namespace.ip("link", "set", "lo", "up")
        yield namespace
    finally:
        namespace.close()


@contextmanager
def namespace_with_tun(device: str) -> Iterator[Namespace]:
    """Make a namespace with an underlay, eth0 192.0.2.11/24, and a TUN that somebody serves."""
    with lone_namespace() as made:
        made.ip("link", "add", "eth0", "type", "veth", "peer", "name", "veth0")
        for name in ("eth0", "veth0"):
            made.ip("link", "set", name, "up")
        made.ip("addr", "add", "192.0.2.11/24", "dev", "eth0")
        tun = inside(made, lambda: Tun.open(device))
        try:
            yield made
        finally:
            tun.close()
