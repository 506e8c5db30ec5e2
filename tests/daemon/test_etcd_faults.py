"""Nothing that etcd does stops a packet: three members, two of our nodes, a stream between them.

    c1 -- h1 (ours) --+
    c2 -- h2 (ours) --+-- switch (etcdctl runs here)
    h3 etcd m0 -------+
    h4 etcd m1 -------+
    h5 etcd m2 -------+

The cluster has users, and tokens that end after three seconds. Each test sends 100 packets a second
while it does something to etcd, and wants every one answered, and a new peer in the routes of both
nodes within 5 s of etcd being well. The last test looks at what all of it cost.
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
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.lab.etcd import PREFIX, SUBNETS, EtcdCluster, Member
from tests.lab.hosts import Host, Lab, Namespace, container_address, lab, ping, wait_until
from tests.lab.require import require_program, require_root

CPU_SHARE = 0.05
CPU_WINDOW_SECONDS = 10.0
FOLLOW_SECONDS = 5.0
CONFIG = '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'
TICKS = os.sysconf("SC_CLK_TCK")
STREAM = str(Path(__file__).parent.parent / "lab" / "stream.py")
AWAY = "etcd does not answer, forwarding goes on"


class Cpu(threading.Thread):
    """Reads the processor time of processes twice a second."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.samples: dict[int, list[tuple[float, float]]] = {pid: [] for pid in pids}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            for pid, samples in self.samples.items():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                samples.append((time.monotonic(), ticks / TICKS))

    def end(self) -> None:
        self._ended.set()
        self.join()

    def worst_share(self, pid: int) -> float:
        """The largest share of a core over any window."""
        samples, worst, first = self.samples[pid], 0.0, 0
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

    def followed(self) -> None:
        """A new peer must be in both nodes' routes in time."""
        self.cluster.wait_healthy()
        started = time.monotonic()
        subnet = self.put_peer()
        for host in self.nodes:
            wait_until(partial(_has_route, host, subnet), f"{subnet} at {host.name}")
        took = time.monotonic() - started
        assert took < FOLLOW_SECONDS, f"followed after {took:.1f} s"

    @contextmanager
    def stream(self) -> Iterator[Callable[[int], None]]:
        """Send 100 packets a second from c1 to c2; the body can wait for a number of them."""
        source, target = self.nodes[0].container, container_address(self.nodes[1])
        assert source is not None
        log = self.lab.folder / "stream.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        index = source.start(sys.executable, STREAM, str(target), "7", log=log)

        def more(packets: int) -> None:
            goal = log.read_text().count("\n") + packets
            wait_until(lambda: log.read_text().count("\n") >= goal, f"{packets} more packets")

        more(20)
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


def _has_route(host: Host, subnet: str) -> bool:
    return subnet in host.ip("route", "show", "dev", "flannel.1")


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


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "nft", "ping"):
        require_program(program)
    with lab(5) as made:
        cluster = tokens_cluster(made)
        try:
            cluster.start()
            faults = Faults(made, cluster)
            faults.provision()
            # fmt: off
            flags = ["--etcd-endpoints", ",".join(cluster.endpoints),
                     "--etcd-username", "root", "--etcd-password", "secret"]
            # fmt: on
            for host in faults.nodes:
                made.start_daemon(host, *flags)
            source, target = (made.add_container(host) for host in faults.nodes)
            target.start(sys.executable, STREAM, "echo", "7", log=made.folder / "echo.log")
            wait_until(lambda: ping(source, container_address(faults.nodes[1])), "a ping")
            yield faults
        finally:
            for host in made.hosts[:2]:
                # Shown with a failure only.
                print(host.log.read_text() if host.log.exists() else "no log")
            cluster.close()


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


@pytest.fixture(scope="module", autouse=True)
def cpu(faults: Faults) -> Iterator[Cpu]:
    made = Cpu([host.processes[0].pid for host in faults.nodes])
    made.start()
    yield made
    made.end()


@pytest.fixture(autouse=True)
def alive(faults: Faults) -> Iterator[None]:
    """Both daemons outlive each test, and forget nobody."""
    before = {host.name: set(host.ip("route").splitlines()) for host in faults.nodes}
    yield
    for host in faults.nodes:
        assert host.processes[0].poll() is None, host.log.read_text()
        assert "Traceback" not in host.log.read_text()
        assert set(host.ip("route").splitlines()) >= before[host.name]


def test_the_member_in_use_is_killed(faults: Faults) -> None:
    member = faults.cluster.members[0]
    with faults.stream() as more:
        with faults.noticed(text="leaving an etcd endpoint"):
            member.kill()
        faults.followed()
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "well"
            assert status["endpoint"] in faults.cluster.endpoints[1:]
            # If it led the others, a word about their new leader may have come last.
            assert status["last_error"].startswith(tuple(faults.cluster.endpoints))
            left = [x for x in host.log.read_text().splitlines() if "leaving an etcd endpoint" in x]
            assert any(f": {member.client_url}: " in line for line in left), left
        more(100)
        faults.cluster.start(member)
        faults.followed()


def test_all_members_are_killed(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members:
                member.kill()
        more(500)
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "lost"
            assert not status["view"]["is_following"]
            assert status["view"]["age_seconds"] > 4
            assert status["silence_seconds"] > 4
            assert "Connection refused" in status["last_error"]
            assert status["last_error_seconds"] < 2
        faults.cluster.start()
        faults.followed()
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "well"
            assert status["view"]["is_following"]
            assert status["view"]["age_seconds"] < 6
            assert status["revision"] >= status["view"]["revision"]


def test_all_members_hang(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members:
                member.freeze()
        more(200)
        for member in faults.cluster.members:
            member.thaw()
        faults.followed()


def test_the_member_in_use_hangs(faults: Faults) -> None:
    """Each in turn, so that whichever a node uses is among them."""
    for member in faults.cluster.members:
        with faults.stream():
            member.freeze()
            try:
                subnet = faults.put_peer(not_at=member)
                started = time.monotonic()
                for host in faults.nodes:
                    wait_until(partial(_has_route, host, subnet), f"{subnet} at {host.name}")
                # Up to 5 s until the next probe, and 3 s that it waits for its answer.
                assert time.monotonic() - started < 5 + 3 + FOLLOW_SECONDS
            finally:
                member.thaw()


def test_the_nodes_are_cut_off(faults: Faults) -> None:
    addresses = [str(host.address) for host in faults.etcds]
    with faults.stream() as more:
        with cut(faults.nodes[0], *addresses), cut(faults.nodes[1], *addresses):
            with faults.noticed():
                more(100)
            more(200)
        faults.followed()


def test_one_member_is_cut_off_from_the_others(faults: Faults) -> None:
    """Clients still reach it, but it can answer nothing that needs a quorum."""
    member = faults.etcds[0]
    others = [str(host.address) for host in faults.etcds[1:]]
    with faults.stream() as more:
        with cut(member, *others):
            more(600)
            subnet = faults.put_peer(not_at=faults.cluster.members[0])
            for host in faults.nodes:
                wait_until(partial(_has_route, host, subnet), f"{subnet} at {host.name}", 10)
        faults.followed()


def test_the_quorum_is_lost(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members[1:]:
                member.kill()
        more(300)
        faults.cluster.start(*faults.cluster.members[1:])
        faults.followed()


def test_the_leader_changes(faults: Faults) -> None:
    with faults.stream() as more:
        leader = faults.cluster.leader()
        leader.kill()
        more(200)
        faults.followed()
        faults.cluster.start(leader)
        faults.followed()


def test_history_is_compacted_while_a_node_is_away(faults: Faults) -> None:
    node, addresses = faults.nodes[0], [str(host.address) for host in faults.etcds]
    with faults.stream():
        with cut(node, *addresses), faults.noticed(node):
            subnets = [faults.put_peer() for _ in range(3)]
            faults.cluster.run("compaction", str(faults.cluster.revision()))
        for subnet in subnets:
            wait_until(
                partial(_has_route, node, subnet), f"{subnet} at {node.name}", FOLLOW_SECONDS
            )
        faults.followed()


def test_etcd_stutters(faults: Faults) -> None:
    """Frozen for a second, awake for a tenth of one, again and again."""
    ended = threading.Event()

    def stutter() -> None:
        while not ended.is_set():
            for member in faults.cluster.members:
                member.freeze()
            ended.wait(1)
            for member in faults.cluster.members:
                member.thaw()
            ended.wait(0.1)

    stuttering = threading.Thread(target=stutter)
    with faults.stream() as more:
        stuttering.start()
        more(800)
        ended.set()
        stuttering.join()
        faults.followed()


def test_the_store_is_restored_from_a_snapshot(faults: Faults) -> None:
    faults.cluster.save(faults.lab.folder / "backup")
    with faults.stream():
        newer = faults.put_peer()
        for host in faults.nodes:
            wait_until(partial(_has_route, host, newer), f"{newer} at {host.name}")
        with faults.noticed(text="etcd was wiped or rolled back"):
            faults.cluster.restore(faults.lab.folder / "backup")
            faults.cluster.start()
        faults.followed()
    for host in faults.nodes:
        assert _has_route(host, newer)


def test_the_store_is_wiped(faults: Faults) -> None:
    with faults.stream():
        with faults.noticed(text="etcd was wiped or rolled back"):
            faults.cluster.wipe()
            faults.cluster.start()
            faults.provision()
        faults.followed()
        for host in faults.nodes:
            subnet = host.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
            wait_until(
                lambda subnet=subnet: any(  # type: ignore[misc]  # bound at once
                    kv["key"] for kv in faults.cluster.kvs(SUBNETS + subnet)
                ),
                f"the lease of {host.name} is back",
                FOLLOW_SECONDS,
            )


def test_a_wrong_password_is_one_sentence_and_no_noise(faults: Faults) -> None:
    """On a host of its own, for longer than an etcd that is merely away is retried."""
    host = faults.etcds[0]
    # fmt: off
    index = faults.lab.start_daemon(
        host, "--etcd-endpoints", ",".join(faults.cluster.endpoints),
        "--etcd-username", "root", "--etcd-password", "guess", wait=False,
    )
    # fmt: on
    with faults.stream() as more:
        wait_until(lambda: host.log.exists() and "refuses us" in host.log.read_text(), "a line")
        more(500)
    (line,) = host.log.read_text().splitlines()
    assert line.startswith("E")
    assert line.endswith("wrong --etcd-username or --etcd-password")
    assert host.stop(index) == 0


def test_all_that_cost_less_than_a_twentieth_of_a_core(faults: Faults, cpu: Cpu) -> None:
    for host in faults.nodes:
        worst = cpu.worst_share(host.processes[0].pid)
        assert 0 < worst < CPU_SHARE, f"{host.name}: {worst:.1%} of a core"
