"""`python -m bench.control_plane`: how the control plane bears many leases and many changes.

         switch   etcd, and a program that changes leases
         |    |
       eth0   eth0
        h1    h2   a flannel node of the kernel's vxlan device
    pyflannel-udp

One node of ours among so many leases; packets flow between it and h2, the other hosts do not exist.
Start, memory and the way from etcd to the FIB are measured, and what the same leases cost a node of
flanneld's design, from the steps that it takes for each.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from statistics import median, quantiles

from bench.machine import TICKS, describe, wait_for_quiet
from bench.program import begin, positive, run_program, say
from tests.lab.hosts import PREFIX, Lab, lab, ping, wait_until
from tests.lab.kernel_node import program_kernel_node, start_kernel_node

CONFIG = '{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}'
PEER_SUBNET, PEER_MAC = IPv4Network("10.244.202.0/24"), "0a:00:00:00:00:02"
UNUSABLE = (
    ("10.16.0.128/25", "198.19.255.1", "vxlan"),  # inside another's
    ("10.249.1.0/24", "10.249.1.9", "vxlan"),  # of a host inside the overlay
    ("10.249.2.0/24", "198.19.255.2", "host-gw"),
)
READY_SECONDS = 60.0
PING_SECONDS = 0.002
PROBE_SECONDS = 0.05
SETTLE_SECONDS = 3.0
DESIGN_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: what was measured, and what it should be."""

    title: str
    seen: str
    target: str = ""


def milliseconds(latencies: list[float]) -> str:
    """Return median, 99th percentile and the longest."""
    cuts = quantiles(latencies, n=100, method="inclusive")
    return f"{cuts[49] * 1e3:.1f} (p99 {cuts[98] * 1e3:.1f}, longest {max(latencies) * 1e3:.1f})"


def lease_key(subnet: IPv4Network) -> str:
    """Return the key of a lease."""
    return f"{PREFIX}/subnets/{subnet.network_address}-{subnet.prefixlen}"


class Node:
    """The node under test."""

    def __init__(self, made: Lab) -> None:
        self._made = made
        self.host = made.hosts[0]
        self._index = 0

    @property
    def subnet(self) -> IPv4Network:
        """Its subnet, when it is ready."""
        return IPv4Network(self.host.subnet_env()["FLANNEL_SUBNET"], strict=False)

    @property
    def _proc(self) -> Path:
        return Path(f"/proc/{self.host.processes[self._index].pid}")

    def start(self) -> float:
        """Start it and return the seconds from there to READY=1."""
        path = self._made.folder / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(path))
            notified.settimeout(READY_SECONDS)
            began = time.monotonic()
            wrapper = ("env", f"NOTIFY_SOCKET={path}")
            self._index = self._made.start_daemon(self.host, wait=False, wrapper=wrapper)
            while b"READY=1" not in notified.recv(4096):
                continue
            ready = time.monotonic() - began
        path.unlink()
        return ready

    def forget(self) -> None:
        """End it and leave nothing of it on the host and in etcd."""
        self.host.stop(self._index)
        self.host.ip("link", "del", "flannel.1")
        self._made.etcdctl("del", lease_key(self.subnet))
        for path in (self.host.subnet_file, *(self.host.folder / "state").iterdir()):
            path.unlink()

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self) -> str:
        """Return its memory in MB (proc(5), smaps_rollup)."""
        text = (self._proc / "smaps_rollup").read_text()
        found = dict(re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE))
        rss, pss = (int(found[name]) / 1000 for name in ("Rss", "Pss"))
        return f"{rss:.0f} resident ({pss:.0f} proportional)"


class ControlPlane:
    """Measures on a lab of two hosts with so many leases."""

    def __init__(self, made: Lab, given: argparse.Namespace) -> None:
        self._made = made
        self._given = given
        self._node = Node(made)
        self._peer = made.hosts[1]
        self.lines: list[Line] = []

    def _add(self, title: str, seen: str, target: str = "") -> None:
        self.lines.append(Line(title, seen, target))

    def prepare(self) -> None:
        """Put the leases, among them some that no node may use."""
        made = self._made
        made.put_config(CONFIG)
        made.add_leases(self._given.leases - 2)
        for subnet, address, kind in UNUSABLE:
            value = {
                "PublicIP": address,
                "PublicIPv6": None,
                "BackendType": kind,
                "BackendData": {"VNI": 1, "VtepMAC": PEER_MAC},
            }
            made.etcdctl("put", lease_key(IPv4Network(subnet)), json.dumps(value))
        # What goes to hosts that do not exist ends here in silence.
        made.switch.ip("route", "add", "blackhole", "198.18.0.0/15")
        start_kernel_node(made, self._peer, PEER_SUBNET, PEER_MAC)

    def start(self) -> None:
        """Measure cold starts; the last one stays."""
        taken = []
        for turn in range(self._given.rounds):
            if turn:
                self._node.forget()
            taken.append(self._node.start())
            say(f"start {turn + 1}: {taken[-1]:.2f} s")
        routes = self._node.host.ip("route", "show", "dev", "flannel.1").count("onlink")
        assert routes == self._given.leases - 1, f"{routes} routes"
        spread = f"{median(taken):.2f} ({min(taken):.2f}..{max(taken):.2f})"
        self._add("cold start to READY, s", spread, "< 3")
        self._add("memory after the start, MB", self._node.memory(), "< 150")

    def changes(self) -> None:
        """Measure single changes in quiet, then under a stream of changes, packets flowing."""
        given = self._given
        self._introduce()
        alone = self._probe(given.probes)
        self._add("one change to the FIB, ms", milliseconds(alone["latencies"]), "median < 10")
        with self._pings() as quiet:
            time.sleep(given.seconds / 4)
        with self._pings() as busy:
            before, began = self._node.cpu_seconds(), time.monotonic()
            # fmt: off
            churning = subprocess.Popen(
                ["ip", "netns", "exec", self._made.switch.name, sys.executable, "-m",
                 "bench.lease_load", "churn", str(given.rate), str(given.seconds),
                 str(given.leases - 2)],
                stdout=subprocess.PIPE, text=True,
            )
            # fmt: on
            # Beside a program that starts, two cores have no time left for a while.
            time.sleep(SETTLE_SECONDS)
            among = self._probe(int(given.seconds * 0.6 / PROBE_SECONDS / 2))
            report = json.loads(churning.communicate()[0])
            used = (self._node.cpu_seconds() - before) / (time.monotonic() - began)
        title = f"changes a second, for {given.seconds:.0f} s"
        late = f"the latest by {report['latest']:.1f} s"
        self._add(title, f"{report['per_second']:.0f} ({late})", f"{given.rate:.0f}")
        latencies = milliseconds(among["latencies"])
        self._add("one change to the FIB among those, ms", latencies, "median < 10")
        self._add("etcd's event of it among those, ms", milliseconds(among["told"]))
        self._add("pyflannel-udp's CPU meanwhile, cores", f"{used:.2f}")
        lost = f"{busy['lost']:.0f} of {busy['sent']:.0f}"
        self._add("round trips lost among those", lost, "0")
        means = f"{quiet['mean']:.2f} / {busy['mean']:.2f}"
        longest = f"longest {quiet['longest']:.1f} / {busy['longest']:.1f}"
        self._add("round trip before / among those, ms", f"{means} ({longest})")
        self._add("memory after those, MB", self._node.memory(), "< 150")

    def _introduce(self) -> None:
        """Tell the kernel node of ours alone, and wait until packets flow."""
        node, peer, subnet = self._node, self._peer, self._node.subnet
        value = json.loads(self._made.etcdctl("get", "--print-value-only", lease_key(subnet)))
        base, mac = str(subnet.network_address), value["BackendData"]["VtepMAC"]
        # fmt: off
        peer.ip("neigh", "replace", base, "lladdr", mac, "dev", "flannel.1", "nud", "permanent")
        peer.exec("bridge", "fdb", "replace", mac, "dev", "flannel.1", "dst",
                  str(node.host.address), "self", "permanent")
        peer.ip("route", "replace", str(subnet), "via", base, "dev", "flannel.1", "onlink")
        # fmt: on
        wait_until(lambda: ping(node.host, PEER_SUBNET.network_address), "packets flow")

    def _probe(self, times: int) -> dict[str, list[float]]:
        words = ("probe", str(times), str(PROBE_SECONDS))
        report = self._node.host.exec(sys.executable, "-m", "bench.lease_load", *words)
        found: dict[str, list[float]] = json.loads(report)
        return found

    @contextmanager
    def _pings(self) -> Iterator[dict[str, float]]:
        """Ping the kernel node for the time of the context; filled at its end, times in ms."""
        # fmt: off
        pinging = subprocess.Popen(
            ["ip", "netns", "exec", self._node.host.name, "ping", "-q", "-i", str(PING_SECONDS),
             str(PEER_SUBNET.network_address)],
            stdout=subprocess.PIPE, text=True,
        )
        # fmt: on
        report: dict[str, float] = {}
        try:
            yield report
        finally:
            pinging.send_signal(signal.SIGINT)
            text = pinging.communicate()[0]
        counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
        times = re.search(r"= [\d.]+/([\d.]+)/([\d.]+)/", text)
        assert counts and times, text
        report.update(sent=float(counts[1]), lost=float(counts[1]) - float(counts[2]))
        report.update(mean=float(times[1]), longest=float(times[2]))

    def design(self) -> None:
        """Measure the steps that flanneld takes for each lease, one after the other."""
        began = time.monotonic()
        program_kernel_node(self._made, self._peer)
        programmed = (time.monotonic() - began) / self._given.leases
        words = ("ttl", str(DESIGN_STEPS))
        printed = self._made.switch.exec(sys.executable, "-m", "bench.lease_load", *words)
        asked = float(json.loads(printed)["seconds"])
        one = programmed + asked
        self._add("flanneld: neighbour, FDB, route of a lease, ms", f"{programmed * 1e3:.2f}")
        self._add("flanneld: LeaseTimeToLive of a lease, ms", f"{asked * 1e3:.2f}")
        self._add("flanneld: so its start, s", f"{one * self._given.leases:.1f}")
        self._add("flanneld: so its changes a second, at most", f"{1 / one:.0f}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.control_plane")
    parser.add_argument("--quick", action="store_true", help="1,000 leases, in half a minute")
    parser.add_argument("--leases", type=int, help="all leases (10000; quick 1000)")
    parser.add_argument("--rate", type=float, default=1000, help="changes a second (1000)")
    parser.add_argument("--seconds", type=float, help="of the stream of changes (30; quick 10)")
    parser.add_argument("--rounds", type=positive, help="cold starts (5; quick 2)")
    parser.add_argument("--probes", type=int, help="single changes (200; quick 50)")
    given = parser.parse_args()
    given.leases = given.leases or (1000 if given.quick else 10000)
    given.seconds = given.seconds or (10 if given.quick else 30)
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.probes = given.probes or (50 if given.quick else 200)
    return given


def table(lines: list[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = [Line("", "seen", "target"), Line("---", "---", "---"), *lines]
    return "\n".join(f"| {one.title} | {one.seen} | {one.target} |" for one in rows)


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    begin()
    wait_for_quiet()
    with lab(2) as made:
        if not made.has_kernel_vxlan():
            say("this kernel has no vxlan device, which the other node would be")
            return 1
        bench = ControlPlane(made, given)
        bench.prepare()
        bench.start()
        bench.changes()
        bench.design()
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    say(f"\n{given.leases:,} leases, etcd on the same machine; {machine}\n\n{table(bench.lines)}")
    return 0


if __name__ == "__main__":
    run_program(main)
