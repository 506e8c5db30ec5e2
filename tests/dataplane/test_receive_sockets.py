"""Which receive socket a datagram comes by: source ports are spread, and each stays with one."""

from __future__ import annotations

import socket

import pytest

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.underlay import Underlay
from tests.dataplane.test_underlay import readable
from tests.dataplane.test_underlay_ipv6 import LOOPBACK, port

__all__ = ["port"]

PEERS = 200
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


def test_the_port_is_not_shared_with_a_program_that_would(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", port))
        with pytest.raises(Refusal, match=f"UDP port {port} is held by"):
            Underlay.open("lo", LOOPBACK[4], port, 1)
