"""A successor takes over a node without losing a packet, and one that fails does no harm.

c1 -- h1 (ours, taken over) --+
                              +-- switch, etcd
c2 -- h2 (ours) --------------+
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyflannel.command_line.options import parse_options
from pyflannel.control.lease import KeyValue
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.dataplane.refusal import Refusal
from pyflannel.node.overlay import Overlay
from pyflannel.node.parts import Node
from pyflannel.node.takeover import Handover
from tests.lab.flows import flows
from tests.lab.hosts import (
    DEADLINE_SECONDS,
    PREFIX,
    Host,
    Lab,
    container_address,
    lab,
    ping,
    wait_until,
)
from tests.lab.require import require_program, require_root
from tests.lab.supervisor import Supervisor

pytestmark = pytest.mark.alone

HEALTH_PORT = 8081
PACKETS_PER_SECOND = 10_000
FEW_PER_SECOND = 1000


@pytest.fixture(scope="module")
def nodes() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        for host in made.hosts:
            made.start_daemon(host, *_flags(host))
            made.add_container(host)
        wait_until(lambda: _reaches(made), "a ping")
        yield made


def _flags(host: Host) -> tuple[str, ...]:
    return ("--control-dir", str(host.folder), "--healthz-port", str(HEALTH_PORT))


def _readyz(host: Host) -> str:
    """What the one that serves the port says."""
    url = f"http://127.0.0.1:{HEALTH_PORT}/readyz"
    script = f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())"
    return host.exec(sys.executable, "-c", script)


def _reaches(nodes: Lab) -> bool:
    first, second = nodes.hosts
    assert first.container is not None
    return ping(first.container, container_address(second))


def _take_over(nodes: Lab, host: Host) -> None:
    """Start a successor on a host and wait until it is ready and the old process has ended."""
    old = next(x for x in host.processes if x.poll() is None)
    nodes.start_daemon(host, *_flags(host), "--takeover")
    assert old.wait(DEADLINE_SECONDS) == 0


def _state(nodes: Lab, host: Host) -> object:
    (link,) = json.loads(host.ip("-d", "-j", "addr", "show", "flannel.1"))
    return nodes.leases(), host.ip("route"), link["ifindex"], host.subnet_file.read_text()


def test_ten_takeovers_lose_nothing_at_10000_packets_per_second(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(nodes, host)
    with flows(nodes, PACKETS_PER_SECOND) as counts:
        for _ in range(10):
            _take_over(nodes, host)
            assert "is ready" in _readyz(host)
    for count in counts:
        assert count.sent > PACKETS_PER_SECOND
        assert (count.lost, count.duplicate, count.reordered) == (0, 0, 0), counts
    assert _state(nodes, host) == before


class _FakeSuccessor:
    """Speaks like a successor, up to the word behind which it dies."""

    def __init__(self, host: Host) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(DEADLINE_SECONDS)
        self._connection.connect(str(host.folder / "pyflannel-1.sock"))
        self.ask(b'{"request":"takeover"}\n')
        line, self._fds, _, _ = socket.recv_fds(self._connection, 65536, 253)
        self.said = line.decode()

    def ask(self, line: bytes) -> None:
        self._connection.sendall(line)

    def answer(self) -> bytes:
        return self._connection.recv(100)

    def die(self) -> None:
        self._connection.close()
        for fd in self._fds:
            socket.close(fd)


def _next_successor(host: Host) -> _FakeSuccessor:
    """Be served as a successor, as soon as the death of the one before has been noticed."""
    served: list[_FakeSuccessor] = []

    def is_served() -> bool:
        successor = _FakeSuccessor(host)
        if "another successor" in successor.said:
            successor.die()
            return False
        served.append(successor)
        return True

    wait_until(is_served, "the old one goes on")
    return served[0]


@pytest.mark.parametrize("says_ready", [False, True])
def test_successor_that_dies_leaves_the_old_process_at_work(nodes: Lab, says_ready: bool) -> None:
    host = nodes.hosts[0]
    with flows(nodes, PACKETS_PER_SECOND) as counts:
        for _ in range(5):
            successor = _next_successor(host)
            if says_ready:
                successor.ask(b"ready\n")
                assert successor.answer() == b"stopped\n"
            successor.die()
        _next_successor(host).die()
    assert [(x.lost, x.duplicate, x.reordered) for x in counts] == [(0, 0, 0)] * 2, counts
    _take_over(nodes, host)


def test_more_descriptors_than_one_message_carries_are_told() -> None:
    class Crowd(Overlay):
        def __init__(self) -> None:
            pass

        def descriptors(self) -> list[int]:
            return [0] * 127

    class Keeper(LeaseKeeper):
        def __init__(self) -> None:
            pass

        def to_hand_over(self) -> tuple[KeyValue, float | None]:
            return KeyValue(b"", b"", 0, 0, 0, 0), None

    node = Node(parse_options([], {}), overlays=[Crowd(), Crowd()], keeper=Keeper())
    node.readiness.clear("starting")
    with socket.socket() as connection, pytest.raises(Refusal, match="254 descriptors are open"):
        asyncio.run(Handover(node).takeover({}, connection))


def test_a_device_that_cannot_go_on_is_left_to_repairs() -> None:
    class Device(Overlay):
        def __init__(self) -> None:
            self.ended: list[Exception] = []
            self._on_ended = self.ended.append
            self._is_paused = True

        def _start(self) -> None:
            raise refusal

    refusal = Refusal("no thread for packets can be started")
    device = Device()
    device.resume()
    assert device.ended == [refusal]
    assert not device._is_paused


@contextmanager
def _supervised(nodes: Lab, host: Host) -> Iterator[Supervisor]:
    """A host whose daemon has a supervisor; another one without is there at the end."""
    old = next(x for x in host.processes if x.poll() is None)
    old.terminate()
    old.wait(DEADLINE_SECONDS)
    supervisor = Supervisor(host.folder)
    try:
        _start(nodes, host, supervisor)
        yield supervisor
    finally:
        for index in range(len(host.processes)):
            host.stop(index)
        supervisor.close()
    nodes.start_daemon(host, *_flags(host))


def _start(nodes: Lab, host: Host, supervisor: Supervisor) -> None:
    ready = supervisor.collect().count("READY=1")
    index = nodes.start_daemon(host, *_flags(host), wrapper=supervisor.wrapper, wait=False)
    supervisor.give()
    process = host.processes[index]
    wait_until(
        lambda: supervisor.collect().count("READY=1") > ready or process.poll() is not None,
        "READY=1",
    )
    assert process.poll() is None, host.log.read_text()[-2000:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_packets_queue_while_a_supervisor_restarts_the_daemon(nodes: Lab, number: int) -> None:
    host = nodes.hosts[0]
    with _supervised(nodes, host) as supervisor:
        before = _state(nodes, host)
        with flows(nodes, FEW_PER_SECOND) as counts:
            for _ in range(2):
                host.stop(len(host.processes) - 1, number)
                _start(nodes, host, supervisor)
        assert _state(nodes, host) == before
    for count in counts:
        # A process that is killed takes with it what it has in its hands: one, or what has come
        # while it waited for a core.
        assert count.lost <= (20 if number == signal.SIGKILL else 0), counts
        assert (count.duplicate, count.reordered) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_gap_of_a_restart_without_kept_descriptors(nodes: Lab, number: int) -> None:
    """Nothing of the node is lost but the packets of this time; README says how long it is."""
    host = nodes.hosts[0]
    before = _state(nodes, host)
    with flows(nodes, FEW_PER_SECOND) as counts:
        began = time.monotonic()
        index = next(i for i, x in enumerate(host.processes) if x.poll() is None)
        host.stop(index, number)
        # Linux calls the routes of a TUN that nobody serves linkdown, now or soon, and keeps them.
        wait_until(lambda: _is_told_as_down(host), "the device and its routes are told as down")
        nodes.start_daemon(host, *_flags(host))
        away = time.monotonic() - began
    assert _state(nodes, host) == before
    for count in counts:
        print(f"gap {count.lost / FEW_PER_SECOND:.2f} s")
        assert 0 < count.lost < (away + 1) * FEW_PER_SECOND


def _is_told_as_down(host: Host) -> bool:
    routes = host.ip("route", "show", "dev", "flannel.1").splitlines()
    assert routes
    return "NO-CARRIER" in host.ip("link", "show", "flannel.1") and all(
        "linkdown" in line for line in routes
    )


def _reload(host: Host) -> str:
    command = (sys.executable, "-m", "pyflannel", "reload", "--control-dir", str(host.folder))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_reload_starts_a_successor_and_tells_the_supervisor(nodes: Lab) -> None:
    host = nodes.hosts[0]
    with _supervised(nodes, host) as supervisor:
        old = host.processes[-1]
        ready = supervisor.collect().count("READY=1")
        with flows(nodes, PACKETS_PER_SECOND) as counts:
            said = _reload(host)
        assert old.wait(DEADLINE_SECONDS) == 0
        wait_until(lambda: supervisor.collect().count("READY=1") > ready, "the new one is ready")
        found = re.fullmatch(rf"process (\d+) has taken over from {old.pid}\n", said)
        assert found, said
        new = int(found.group(1))
        states = supervisor.collect()
        assert states.index(f"MAINPID={new}") < len(states) - 1 - states[::-1].index("READY=1")
        assert "STOPPING=1" not in states
        assert [(x.lost, x.duplicate, x.reordered) for x in counts] == [(0, 0, 0)] * 2, counts
        # It goes on: nobody else holds the address, the lock and the socket.
        successor = _FakeSuccessor(host)
        successor.die()
        assert "another" not in successor.said
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{new}").exists(), "the successor has ended")


def test_reload_that_fails_says_why_and_changes_nothing(nodes: Lab) -> None:
    host = nodes.hosts[0]
    nodes.put_config('{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}')
    try:
        with flows(nodes, PACKETS_PER_SECOND) as counts:
            said = _reload(host)
    finally:
        nodes.put_config()
    assert "the successor ended with code 1, so this process goes on" in said
    assert [(x.lost, x.duplicate, x.reordered) for x in counts] == [(0, 0, 0)] * 2, counts
    wait_until(lambda: _reaches(nodes), "pings")


def test_a_takeover_after_etcd_was_wiped_keeps_the_peers_that_it_lost(nodes: Lab) -> None:
    """And one whose value turned bad; a peer that is a flanneld is away from etcd for hours."""
    host = nodes.hosts[0]
    lost, broken = "10.244.100.0", "10.244.101.0"
    value = {"PublicIP": "192.168.77.99", "BackendType": "vxlan"}
    for number, subnet in enumerate((lost, broken), 1):
        data = {"VNI": 1, "VtepMAC": f"0a:00:00:00:01:{number:02x}"}
        nodes.etcdctl(
            "put", f"{PREFIX}/subnets/{subnet}-24", json.dumps({**value, "BackendData": data})
        )
    wait_until(lambda: {lost, broken} <= _peers(host), "both peers are known")
    assert nodes.etcd is not None
    nodes.switch.stop(nodes.etcd, signal.SIGKILL)
    shutil.rmtree(nodes.folder / "etcd")
    nodes.start_etcd()
    nodes.put_config()
    nodes.etcdctl("put", f"{PREFIX}/subnets/{broken}-24", "{bad")
    host.wait_for_log("wiped or rolled back")
    wait_until(lambda: _unconfirmed(host) == 1, "the other node's lease is back")
    before = _peers(host)
    assert {lost, broken} <= before
    for _ in range(2):
        _take_over(nodes, host)
        assert _peers(host) == before
        assert _unconfirmed(host) == 1


def _unconfirmed(host: Host) -> int:
    return int(host.ask("status")["etcd"]["view"]["unconfirmed"])


def _peers(host: Host) -> set[str]:
    """The bases of the subnets that a node and its kernel have a route to."""
    known = {x["subnet"].partition("/")[0] for x in host.ask("status")["peers"]}
    routed = {
        line.partition("/")[0] for line in host.ip("route", "show", "dev", "flannel.1").splitlines()
    }
    return known & routed
