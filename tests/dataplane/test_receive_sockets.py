"""Which receive socket a datagram comes by: source ports are spread, and each stays with one."""

from __future__ import annotations

import os
import socket

import pytest

from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.underlay import RECEIVE_BUFFER_BYTES, Underlay
from tests.dataplane.test_underlay import held, readable
from tests.dataplane.test_underlay_ipv6 import LOOPBACK, port

__all__ = ["port"]

PEERS = 200
SENT = 50
SO_COOKIE = 57


@pytest.mark.parametrize("version", [4, 6])
def test_source_ports_are_spread_and_stay(port: int, version: int) -> None:
    underlay = Underlay.open("lo", LOOPBACK[version], port, 1)
    try:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        used: set[bytes] = set()
        for _ in range(PEERS):
            with socket.socket(family, socket.SOCK_DGRAM) as peer:
                peer.connect((str(LOOPBACK[version]), port))
                arrivals: set[bytes] = set()
                for _ in range(3):
                    peer.send(b"x")
                    with readable(underlay) as receive:
                        assert receive.recv(10) == b"x"
                        arrivals.add(receive.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
                assert len(arrivals) == 1
                used |= arrivals
        assert len(used) > 0.8 * len(underlay.receive_fds)
    finally:
        underlay.close()


@pytest.mark.parametrize("version", [4, 6])
def test_what_finds_no_room_is_counted(port: int, version: int) -> None:
    underlay = Underlay.open("lo", LOOPBACK[version], port, 1)
    try:
        assert (underlay.receive_buffer, underlay.drops()) == (RECEIVE_BUFFER_BYTES, 0)
        for fd in underlay.receive_fds:
            with held(fd) as receive:
                receive.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        assert underlay.receive_buffer < RECEIVE_BUFFER_BYTES
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as peer:
            peer.connect((str(LOOPBACK[version]), port))
            for _ in range(SENT):
                peer.send(bytes(1000))
        with readable(underlay) as receive:
            queued = 0
            while queued + underlay.drops() < SENT:
                receive.recv(2000)
                queued += 1
            with pytest.raises(BlockingIOError):
                receive.recv(2000)
        assert 0 < queued < SENT
    finally:
        underlay.close()


def test_inherited_sockets_get_their_whole_buffer(port: int) -> None:
    before = Underlay.open("lo", LOOPBACK[4], port, 1)
    for fd in before.receive_fds:
        with held(fd) as receive:
            receive.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    fds = [os.dup(fd) for fd in (before.lock_fd, *before.receive_fds)]
    before.close()
    underlay = Underlay.open("lo", LOOPBACK[4], port, 1, inherited=Inheritance(fds))
    try:
        assert (underlay.is_adopted, underlay.receive_buffer) == (True, RECEIVE_BUFFER_BYTES)
    finally:
        underlay.close()


def test_the_port_is_not_shared_with_a_program_that_would(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", port))
        with pytest.raises(Refusal, match=f"UDP port {port} is held by"):
            Underlay.open("lo", LOOPBACK[4], port, 1)
