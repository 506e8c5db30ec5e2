"""Which core a host works on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.variants import Stack
from tests.lab.hosts import Host

CORES = sorted(os.sched_getaffinity(0))


@contextmanager
def hosts_apart(stack: Stack) -> Iterator[None]:
    """Give each host one core, for its programs and for what arrives by the cable, as two machines.

    What is started meanwhile belongs to the source. The frames of both still pass the device driver
    on the core that sends. It takes two cores.
    """
    source, sink, *_ = CORES
    try:
        os.sched_setaffinity(0, {source})
        for host, core in ((stack.source, source), (stack.sink, sink)):
            _keep_on(host, {core})
            _receive_on(host, {core})
        yield
    finally:
        os.sched_setaffinity(0, CORES)
        for host in (stack.source, stack.sink):
            _keep_on(host, set(CORES))
            _receive_on(host, set())


def _keep_on(host: Host, cores: set[int]) -> None:
    for process in host.processes:
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread.name), cores)


def _receive_on(host: Host, cores: set[int]) -> None:
    """Have the kernel take in what the cable brings there (receive packet steering)."""
    mask = f"{sum(1 << core for core in cores):x}"
    host.exec("sh", "-c", f"echo {mask} >/sys/class/net/{host.iface}/queues/rx-0/rps_cpus")
