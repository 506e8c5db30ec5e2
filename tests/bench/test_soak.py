"""The soak in short: h1 (pyflannel-udp) eth1 ---- eth1 (pyflannel-udp) h2, every byte checked."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import closing

import pytest

from bench.counters import read_counters
from bench.soak import BENIGN_DROPS, LOADS, SoakError, run, soak, wrong_drops
from bench.variants import build, compile_tools, parse_variant
from tests.lab.hosts import wait_until
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

PACKETS = 300_000


@pytest.fixture(autouse=True)
def needs() -> None:
    require_root()
    for program in ("etcd", "etcdctl", "ethtool", "gcc", "iperf3", "make", "nft"):
        require_program(program)


@pytest.mark.parametrize("variant", ["ours", "one-queue=--tun-queues=1", "from-kernel"])
def test_nothing_is_changed_on_the_way(variant: str) -> None:
    progress = run(PACKETS, parse_variant(variant))
    assert progress.total >= PACKETS
    assert set(progress.received) == {*LOADS, "TCP"}


def test_a_drop_is_found() -> None:
    send = "import socket, sys; socket.socket(2, 2).sendto(b'no', (sys.argv[1], 8472))"
    with closing(build(parse_variant("ours"), "wire-nocsum")) as stack:
        before = read_counters(stack)
        stack.source.exec(sys.executable, "-c", send, str(stack.sink.address))
        wait_until(
            lambda: wrong_drops(read_counters(stack) - before) == {"drop:short": 1},
            "the drop is counted",
        )


def test_which_counters_may_move() -> None:
    allowed = Counter(dict.fromkeys((*BENIGN_DROPS, "Udp:RcvbufErrors"), 1))
    assert wrong_drops(allowed) == {}
    wrong = {"drop:vtep_mac": 2, "Udp:InCsumErrors": 1, "Tcp:InCsumErrors": 1}
    assert wrong_drops(allowed + Counter(wrong)) == wrong


def test_a_changed_byte_is_found() -> None:
    compile_tools()
    with closing(build(parse_variant("plain"), "wire-nocsum")) as stack:
        nft = stack.sink.exec
        nft("nft", "add table ip t { chain c { type filter hook input priority 0; }; }")
        nft("nft", "add rule ip t c udp dport 9000 numgen inc mod 1000 == 7 @th,200,8 set 7")
        with pytest.raises(SoakError, match="UDP, 8 flows"):
            list(soak(stack, PACKETS))
