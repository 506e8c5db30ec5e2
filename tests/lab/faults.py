"""Two of our nodes, three members of etcd, and what is done to etcd while packets flow.

    c1 -- h1 (ours) --+
    c2 -- h2 (ours) --+-- switch (etcdctl runs here)
    h3 etcd m0 -------+
    h4 etcd m1 -------+
    h5 etcd m2 -------+

The cluster has users, and tokens that end after three seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import trustme

import tests.lab.stream
from tests.lab.etcd import PREFIX, SUBNETS, EtcdCluster, Member
from tests.lab.hosts import (
    CONFIG,
    Host,
    Lab,
    Namespace,
    container_address,
    wait_until,
)

CPU_SHARE = 0.15
"""A few times what it takes, as cores differ; a loop without a pause takes a whole one."""
CPU_WINDOW_SECONDS = 10.0
FOLLOW_SECONDS = 5.0
TICKS = os.sysconf("SC_CLK_TCK")
STREAM = tests.lab.stream.__file__
AWAY = "etcd does not answer, forwarding goes on"


class Cpu(threading.Thread):
    """Reads the processor time of processes twice a second."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.samples: dict[int, list[tuple[float, float]]] = {pid: [] for pid in pids}
        self._ended = threading.Event()

    def run(self) -> None:
        """Read until the end."""
        while not self._ended.wait(0.5):
            for pid, samples in self.samples.items():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                samples.append((time.monotonic(), ticks / TICKS))

    def end(self) -> None:
        """Read no more."""
        self._ended.set()
        self.join()

    def worst_shares(self) -> list[float]:
        """The largest share of a core over any window, of each process."""
        return [_worst_share(samples) for samples in self.samples.values()]


def _worst_share(samples: list[tuple[float, float]]) -> float:
    worst, first = 0.0, 0
    for now, used in samples:
        while now - samples[first][0] > CPU_WINDOW_SECONDS:
            first += 1
        if first:
            before, used_before = samples[first - 1]
            worst = max(worst, (used - used_before) / (now - before))
    return worst


class Faults:
    """The lab of this module, and what is done to it."""

    def __init__(self, made: Lab, cluster: EtcdCluster) -> None:
        self.lab = made
        self.cluster = cluster
        self.nodes = made.hosts[:2]
        self.etcds = made.hosts[2:]
        self._numbers = count(100)

    def provision(self) -> None:
        """Give an empty store its users and the network's configuration."""
        self.cluster.ctl = ()
        self.cluster.run("put", f"{PREFIX}/config", CONFIG)
        self.cluster.run("user", "add", "root:secret")
        self.cluster.run("user", "grant-role", "root", "root")
        self.cluster.run("auth", "enable")
        self.cluster.ctl = ("--user", "root:secret")

    def put_peer(self, *, not_at: Member | None = None) -> str:
        """Put the lease of a new peer, by way of some members; return its subnet."""
        number = next(self._numbers)
        value = {
            "PublicIP": f"192.168.77.{number}",
            "PublicIPv6": None,
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{number:02x}"},
        }
        endpoints = ",".join(x.client_url for x in self.cluster.members if x is not not_at)
        words = ("put", f"{SUBNETS}10.244.{number}.0-24", json.dumps(value))
        # What a leader had in hand when it froze is lost; etcdctl does not ask again.
        wait_until(
            lambda: self.cluster.run(*words, endpoint=endpoints, check=False) == "OK\n",
            "the lease of a new peer is put",
        )
        return f"10.244.{number}.0/24"

    def has_route(self, host: Host, subnet: str) -> bool:
        """Whether a node routes a subnet into the overlay."""
        return subnet in host.ip("route", "show", "dev", "flannel.1")

    def wait_for_route(self, subnet: str, *hosts: Host, seconds: float = FOLLOW_SECONDS) -> None:
        """Wait until these nodes, or both, do."""
        wait_until(
            lambda: all(self.has_route(host, subnet) for host in hosts or self.nodes),
            f"{subnet} in the routes",
            seconds,
        )

    def followed(self) -> None:
        """A new peer must be in both nodes' routes in time."""
        self.cluster.wait_healthy()
        self.wait_for_route(self.put_peer())

    @contextmanager
    def stream(self) -> Iterator[Callable[[int], None]]:
        """Send 100 packets a second from c1 to c2; the body can wait for a number of them."""
        source, target = self.nodes[0].container, container_address(self.nodes[1])
        assert source is not None
        log = self.lab.folder / "stream.log"
        log.unlink(missing_ok=True)
        index = source.start(sys.executable, STREAM, str(target), "7", log=log)

        def more(packets: int) -> None:
            goal = log.read_text().count("\n") + packets
            wait_until(lambda: log.read_text().count("\n") >= goal, f"{packets} more packets")

        more(20)
        started = time.monotonic()
        yield more
        more(20)
        took = time.monotonic() - started
        assert source.stop(index) == 0
        *numbers, last = log.read_text().splitlines()
        sent = int(last.removeprefix("sent "))
        missing = set(range(sent)) - {int(number) for number in numbers}
        assert not missing, f"{len(missing)} of {sent} lost, from {min(missing)} to {max(missing)}"
        assert sent > 90 * (took - 1)

    def status(self, host: Host) -> dict[str, Any]:
        """What the node says about etcd."""
        words = ("-m", "pyflannel", "status", "--json", "--control-dir", str(host.folder))
        found: dict[str, Any] = json.loads(host.exec(sys.executable, *words))["etcd"]
        return found

    def said(self, host: Host, text: str) -> int:
        """How often a node's log has a text."""
        return host.log.read_text().count(text)

    @contextmanager
    def noticed(self, *hosts: Host, text: str = AWAY) -> Iterator[None]:
        """Wait at the end until these nodes, or all, have said something once more."""
        before = {host.name: self.said(host, text) for host in hosts or self.nodes}
        yield
        for host in hosts or self.nodes:
            wait_until(
                lambda host=host: self.said(host, text) > before[host.name],  # type: ignore[misc]
                f"{host.name} says: {text}",
            )


@contextmanager
def cut(host: Namespace, *addresses: str) -> Iterator[None]:
    """Drop all TCP packets between a host and addresses, silently."""
    listed = ", ".join(addresses)
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; "
        f"ip {end} {{ {listed} }} ip protocol tcp drop; }}\n"
        for hook, end in (("output", "daddr"), ("input", "saddr"))
    )
    rules = f"table ip fault {{\n{chains}}}\n"
    subprocess.run(
        ["ip", "netns", "exec", host.name, "nft", "-f", "-"], input=rules, text=True, check=True
    )
    try:
        yield
    finally:
        host.exec("nft", "delete", "table", "ip", "fault")


def tokens_cluster(made: Lab) -> EtcdCluster:
    """Make, not start, three members on the last three hosts; their tokens last 3 s."""
    # Any key will do to sign tokens with.
    cert = trustme.CA().issue_cert("token.example.org")
    (made.folder / "token.pub").write_bytes(cert.cert_chain_pems[0].bytes())
    cert.private_key_pem.write_to_path(made.folder / "token.key")
    keys = f"pub-key={made.folder / 'token.pub'},priv-key={made.folder / 'token.key'}"
    return EtcdCluster(
        made.folder,
        [(str(host.address), 2379, 2380) for host in made.hosts[2:]],
        flags=["--auth-token", f"jwt,{keys},sign-method=ES256,ttl=3s", "--bcrypt-cost", "4"],
        wrappers=[("ip", "netns", "exec", host.name) for host in made.hosts[2:]],
        ctl_wrapper=("ip", "netns", "exec", made.switch.name),
    )
