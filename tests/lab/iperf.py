"""iperf3 between two namespaces of a lab, and what it lost by its own fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyflannel.dataplane.route import IPAddress
from tests.lab.hosts import DEADLINE_SECONDS, Namespace, wait_until


def serve_iperf3(sink: Namespace, log: Path, *flags: str) -> int:
    """Start a server, which listens when this returns; return its number, for `stop`."""
    server = sink.start("iperf3", "-s", *flags, log=log)
    wait_until(lambda: ":5201" in sink.exec("ss", "-ltn"), "iperf3 listens")
    return server


def iperf3(
    source: Namespace, sink: Namespace, address: IPAddress, folder: Path, *flags: str
) -> dict[str, Any]:
    """Load the way to an address of the sink for a second; return the sums of the report.

    `unread` is added to them.
    """
    before = _unread(source) + _unread(sink)
    server = serve_iperf3(sink, folder / "iperf3.log", "-1")
    report = source.exec("iperf3", "-J", "-c", str(address), "-t", "1", *flags)
    sink.processes[server].wait(DEADLINE_SECONDS)
    end: dict[str, Any] = json.loads(report)["end"]
    return {**end, "unread": _unread(source) + _unread(sink) - before}


def _unread(namespace: Namespace) -> int:
    """How many datagrams found no room in a socket, as its program did not read in time."""
    counters = namespace.exec("nstat", "-asz", "UdpRcvbufErrors", "Udp6RcvbufErrors")
    return sum(int(line.split()[1]) for line in counters.splitlines()[1:])
