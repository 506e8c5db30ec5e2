"""A load in each direction between the containers of a lab's first two hosts, and its fate."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tests.lab.load
from tests.lab.hosts import Host, Lab, Namespace, container_address, wait_until

PORT = 7000
_PROGRAM = (sys.executable, tests.lab.load.__file__)


@dataclass
class Count:
    """Of one family and direction; complete once the load has ended."""

    sent: int = 0
    received: int = 0
    duplicate: int = 0
    reordered: int = 0

    @property
    def lost(self) -> int:
        """How many never came."""
        return self.sent - self.received


@contextmanager
def flows(made: Lab, rate: int, versions: Sequence[int] = (4,)) -> Iterator[list[Count]]:
    """Send so many packets a second in each direction and family; the counts are there at the end.

    There are two counts for each of `versions`.
    """
    first, second = made.hosts[:2]
    pairs = ((first, second), (second, first))
    ways = [(source, target, version) for version in versions for source, target in pairs]
    counts = [Count() for _ in ways]
    started: list[tuple[Namespace, int]] = []

    def start(host: Host, log: Path, *words: str) -> None:
        assert host.container is not None
        log.unlink(missing_ok=True)
        started.append((host.container, host.container.start(*_PROGRAM, *words, log=log)))
        wait_until(lambda: log.exists() and "ready" in log.read_text(), "the load is there")

    receivers = [made.folder / f"receive{number}.log" for number in range(len(ways))]
    senders = [made.folder / f"send{number}.log" for number in range(len(ways))]
    for (_, target, version), log in zip(ways, receivers):
        start(target, log, "receive", str(container_address(target, version)), str(PORT))
    for (source, target, version), log in zip(ways, senders):
        start(source, log, "send", str(container_address(target, version)), str(PORT), str(rate))
    began = time.monotonic()
    try:
        yield counts
    finally:
        took = time.monotonic() - began
        # Those who send first; those who count then wait for the last ones all at once.
        for container, index in started[len(ways) :]:
            container.stop(index)
        for container, index in started[: len(ways)]:
            container.processes[index].terminate()
        for container, index in started[: len(ways)]:
            container.stop(index)
    for count, receiver, sender in zip(counts, receivers, senders):
        count.sent = int(sender.read_text().split()[-1])
        assert count.sent > rate * took / 4, f"only {count.sent} packets were sent in {took:.1f} s"
        count.received, count.duplicate, count.reordered = (
            int(word) for word in receiver.read_text().split()[-3:]
        )
