"""The measuring tools on two hosts and a cable: h1 eth1 ---- eth1 h2."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from bench import transfer
from bench.cases import CASES, UDP_LOAD, what_lacks
from bench.counters import read_counters
from bench.machine import CpuWindow
from bench.placement import CORES, hosts_apart
from bench.transfer import transfer_is_intact
from bench.variants import Stack, build, compile_tools, parse_variant
from tests.lab.hosts import wait_until
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    require_root()
    for program in ("ethtool", "gcc", "iperf3", "make"):
        require_program(program)
    compile_tools()
    made = build(parse_variant("plain"), "wire-nocsum")
    yield made
    made.close()


def _load(stack: Stack, *flags: str) -> dict[str, float]:
    # fmt: off
    done = subprocess.run(
        [UDP_LOAD, "--from", stack.source.name, "--to", stack.sink.name,
         "--address", str(stack.target), *flags],
        check=True, capture_output=True, text=True,
    )
    # fmt: on
    report: dict[str, float] = json.loads(done.stdout)
    return report


SETTLE = ("--settle", "1000")
CHECKED = (
    *("--check", "--size", "20-3000", "--flows", "4", "--count", "20000", "--rate", "40000"),
    *SETTLE,
)


def test_udp_load_counts_every_packet(stack: Stack) -> None:
    report = _load(stack, *CHECKED)
    assert report["sent"] == report["received"] == 20000
    assert report["reordered"] == report["duplicated"] == report["corrupt"] == 0
    # A busy machine may send slower than asked, never faster.
    assert 0 < report["rate"] < 40000 * 1.05


@contextmanager
def rules(stack: Stack, *texts: str) -> Iterator[Callable[[], str]]:
    """Have nft rules for the load's packets that arrive; yield what lists them."""
    nft = partial(stack.sink.exec, "nft")
    nft("add table ip t { chain c { type filter hook input priority 0; }; }")
    try:
        for text in texts:
            nft(f"add rule ip t c udp dport 9 {text}")
        yield partial(nft, "list table ip t")
    finally:
        nft("delete table ip t")


def test_udp_load_sees_loss_and_changed_bytes(stack: Stack) -> None:
    # Bytes 40..43 behind the UDP header, in packets that have them.
    changed = "numgen inc mod 9 == 0 @th,320,32 set 7"
    with rules(stack, "numgen inc mod 10 == 0 drop", changed):
        report = _load(stack, *CHECKED, "--size", "64")
    assert report["sent"] - report["received"] - report["corrupt"] == 2000
    assert report["corrupt"] == 2000


LATE = """
import socket, struct
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for trial in range(0, 65536, 4096):
    sink.sendto(struct.pack("=IHHQ", 0x70667564, trial, 0, 7), ("{address}", 9))
"""


def test_udp_load_knows_its_own_packets(stack: Stack) -> None:
    with ThreadPoolExecutor(1) as pool:
        # For five seconds, in which the others come.
        loading = pool.submit(_load, stack, *CHECKED, "--size", "64", "--rate", "4000")
        wait_until(lambda: bool(stack.sink.exec("ss", "-Hlun", "sport = :9")), "the sink is open")
        stack.source.exec(sys.executable, "-c", LATE.format(address=stack.target))
        report = loading.result()
    # One of them may have the number of the trial that runs.
    assert report["late"] >= 15
    assert report["sent"] == report["received"] == 20000


AGAIN = """
import socket, struct
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for trial in 2 * list(range(65536)):
    sink.sendto(struct.pack("=IHHQ", 0x70667564, trial, 0, {sequence}), ("{address}", 9))
"""


def test_udp_load_sees_packets_too_late_and_twice(stack: Stack) -> None:
    sequence = 1000
    octets = sequence.to_bytes(8, "little").hex()
    with ThreadPoolExecutor(1) as pool:
        flags = ("--size", "64", "--flows", "1", "--count", "30000", "--rate", "4000", *SETTLE)
        with rules(stack, f"@th,128,64 0x{octets} counter drop") as listed:
            loading = pool.submit(_load, stack, *flags)
            wait_until(lambda: "counter packets 1 " in listed(), "the packet is held back")
        stack.source.exec(
            sys.executable, "-c", AGAIN.format(sequence=sequence, address=stack.target)
        )
        report = loading.result()
    assert report["sent"] == report["received"] == 30000
    assert (report["reordered"], report["duplicated"], report["corrupt"]) == (1, 1, 0)


def test_cases_measure(stack: Stack) -> None:
    tcp, udp, rtt = (CASES[name].measure(stack, 1) for name in ("tcp1", "udp64", "rtt"))
    assert tcp.values["throughput"] > 0.1
    assert udp.values["rate"] > 1
    assert rtt.values["rtt_p50"] > 1


def _cores(stack: Stack) -> list[set[int]]:
    """Return those of what we start, which is the source's, and of the sink's program."""
    return [os.sched_getaffinity(pid) for pid in (0, stack.sink.processes[0].pid)]


def test_hosts_apart_have_a_core_each(stack: Stack) -> None:
    if len(CORES) < 2:
        assert what_lacks("rtt-apart") == "a second core"
        return
    steering = "/sys/class/net/eth1/queues/rx-0/rps_cpus"
    with hosts_apart(stack):
        assert _cores(stack) == [{CORES[0]}, {CORES[1]}]
        assert int(stack.sink.exec("cat", steering), 16) == 1 << CORES[1]
    assert _cores(stack) == [set(CORES), set(CORES)]
    assert int(stack.sink.exec("cat", steering), 16) == 0
    assert CASES["rtt-apart"].measure(stack, 1).values["rtt_p50"] > 1


def test_cpu_window_tells_foreign_from_own() -> None:
    # Of nobody's, as its parent has ended; most of its time is that of children that have ended.
    command = "timeout 60 sh -c 'while :; do /bin/true; done' >/dev/null & echo $!"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True)
    try:
        window = CpuWindow()
        wait_until(lambda: window.end().foreign > 0.5, "the time of others is told")
        assert window.end().disturbed
    finally:
        os.kill(int(done.stdout), signal.SIGTERM)


def test_cpu_window_tells_own_from_foreign() -> None:
    window, began = CpuWindow(), time.process_time()
    # Not a time of the wall: on a busy machine that may be others' time.
    while time.process_time() - began < 0.4:
        pass
    assert window.end().used > 0.3


def test_a_transfer_is_compared(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_counters(stack)
    assert transfer_is_intact(stack, 3)
    assert not (read_counters(stack) - before)["Tcp:InCsumErrors"]
    receive = transfer._receive

    def receive_another(listening: socket.socket) -> str:
        return receive(listening)[::-1]

    monkeypatch.setattr(transfer, "_receive", receive_another)
    assert not transfer_is_intact(stack, 3)


@pytest.mark.parametrize("name", ["null", "null-flat", "null-gaps", "naive", "udp-backend"])
def test_yardsticks_carry_a_transfer(name: str) -> None:
    require_root()
    compile_tools()
    made = build(parse_variant(name), "wire-nocsum")
    try:
        assert transfer_is_intact(made, 20)
    finally:
        made.close()
