"""What went wrong during a sample: error counters of both hosts, drops of the daemons."""

from __future__ import annotations

import re
import sys
from collections import Counter

from bench.variants import METRICS_PORT, Stack
from tests.lab.hosts import Host

# snmp(5) names; InCsumErrors and InErrors must not move, the rest explains a number.
NETWORK = (
    "Tcp:RetransSegs",
    "Tcp:InCsumErrors",
    "Udp:InErrors",
    "Udp:InCsumErrors",
    "Udp:RcvbufErrors",
    "Udp:SndbufErrors",
    "Ip:InHdrErrors",
    "Ip:InDiscards",
)
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"


def read_counters(stack: Stack) -> Counter[str]:
    """Return all counters, those of both hosts added up."""
    counters: Counter[str] = Counter()
    for host in (stack.source, stack.sink):
        counters.update(_network(host))
    for host in stack.daemons:
        counters.update(_drops(host))
    return counters


def _network(host: Host) -> dict[str, int]:
    """Read /proc/net/snmp: for each protocol a line of names and a line of values."""
    lines = host.exec("cat", "/proc/net/snmp").splitlines()
    values: dict[str, int] = {}
    for names, numbers in zip(lines[::2], lines[1::2]):
        protocol, *fields = names.split()
        values |= {protocol + field: int(n) for field, n in zip(fields, numbers.split()[1:])}
    return {name: values.get(name, 0) for name in NETWORK}


def _drops(host: Host) -> Counter[str]:
    page = host.exec(sys.executable, "-c", FETCH, f"http://127.0.0.1:{METRICS_PORT}/metrics")
    found = re.findall(r'^pyflannel_drops_total\{.*\breason="(\w+)"\} (\S+)$', page, re.MULTILINE)
    assert found, f"no drops on the metrics page: {page}"
    drops: Counter[str] = Counter()
    for reason, count in found:
        drops[f"drop:{reason}"] += int(count)
    return drops
