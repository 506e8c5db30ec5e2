"""The TUN device, opened for real in a namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.tun import VNET_HEADER_BYTES, Tun
from tests.lab.hosts import Namespace, wait_until
from tests.lab.inside import inside, lone_namespace
from tests.lab.require import require_program, require_root

DEVICE = "flannel.1"
ROOM, SENT = 10, 50


@pytest.fixture
def host() -> Iterator[Namespace]:
    require_root()
    require_program("ip")
    with lone_namespace() as made:
        yield made


def refused(host: Namespace, name: str = DEVICE) -> str:
    with pytest.raises(Refusal) as caught:
        inside(host, lambda: Tun.open(name))
    return str(caught.value)


def test_the_device_outlives_its_descriptors_with_its_routes(host: Namespace) -> None:
    tun = inside(host, lambda: Tun.open(DEVICE))
    assert (tun.created, tun.name) == (True, DEVICE)
    host.ip("link", "set", DEVICE, "up")
    host.ip("route", "add", "10.244.6.0/24", "via", "10.244.6.0", "dev", DEVICE, "onlink")
    tun.close()
    tun.close()
    tun.delete()
    route = "10.244.6.0/24 via 10.244.6.0 dev flannel.1 onlink"
    wait_until(lambda: f"{route} linkdown" in host.ip("route"), "the route is told as down")
    again = inside(host, lambda: Tun.open(DEVICE))
    assert not again.created
    assert route in host.ip("route")
    wait_until(lambda: "linkdown" not in host.ip("route"), "the route is up")
    again.close()


def test_a_deleted_device_is_gone_with_the_last_descriptor(host: Namespace) -> None:
    inside(host, lambda: Tun.open(DEVICE)).delete()
    assert DEVICE not in host.ip("link")


def test_packets_leave_without_blocking_and_behind_a_virtio_header(host: Namespace) -> None:
    tun = inside(host, lambda: Tun.open(DEVICE))
    host.exec("sysctl", "-qw", "net.ipv6.conf.flannel/1.disable_ipv6=1")
    host.ip("addr", "add", "10.244.5.0/32", "dev", DEVICE)
    host.ip("link", "set", DEVICE, "up")
    host.ip("route", "add", "10.244.6.0/24", "via", "10.244.6.0", "dev", DEVICE, "onlink")
    (fd,) = tun.read_fds
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    host.exec("ping", "-c", "1", "-W", "0.001", "10.244.6.2", check=False)
    packet = os.read(fd, 2000)[VNET_HEADER_BYTES:]
    assert (packet[0], packet[16:20]) == (0x45, bytes([10, 244, 6, 2]))
    tun.delete()


def test_what_finds_no_room_in_a_queue_is_counted(host: Namespace) -> None:
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for _ in range(SENT):
                udp.sendto(b"x", ("10.244.6.2", 9))

    tun = inside(host, lambda: Tun.open(DEVICE))
    host.exec("sysctl", "-qw", "net.ipv6.conf.flannel/1.disable_ipv6=1")
    host.ip("link", "set", DEVICE, "txqueuelen", str(ROOM), "up")
    host.ip("addr", "add", "10.244.5.0/32", "dev", DEVICE)
    host.ip("route", "add", "10.244.6.0/24", "via", "10.244.6.0", "dev", DEVICE, "onlink")
    assert inside(host, tun.drops) == 0
    inside(host, send)
    (fd,) = tun.read_fds
    for _ in range(ROOM):
        os.read(fd, 2000)
    with pytest.raises(BlockingIOError):
        os.read(fd, 2000)
    assert inside(host, tun.drops) == SENT - ROOM
    tun.delete()
    assert inside(host, tun.drops) == 0


@pytest.mark.parametrize("name", ["", "flannel.10000000"])
def test_a_name_linux_cannot_have_is_refused(host: Namespace, name: str) -> None:
    assert "use a smaller VNI" in refused(host, name)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("link add flannel.1 type veth peer name other0", "a veth device named flannel.1"),
        ("link add flannel.1 type vxlan id 1 dstport 8472", "kernel vxlan device"),
        ("tuntap add flannel.1 mode tap", "made by another program with other flags"),
        ("tuntap add flannel.1 mode tun", "made by another program with other flags"),
    ],
)
def test_a_device_of_another_kind_is_left_alone_and_named(
    host: Namespace, words: str, named: str
) -> None:
    host.ip(*words.split())
    before = host.ip("-d", "link", "show", DEVICE)
    sentence = refused(host)
    assert named in sentence
    assert "ip link delete flannel.1" in sentence
    assert host.ip("-d", "link", "show", DEVICE) == before


def test_a_kernel_whose_tun_lacks_what_is_needed(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says EINVAL to what it does not know."""
    monkeypatch.setattr("pyflannel.dataplane.tun._TUNSETVNETHDRSZ", 0x400454FF)
    assert f"makes no TUN device {DEVICE} with several queues" in refused(host)


def test_a_refused_device_leaves_no_descriptor(host: Namespace) -> None:
    host.ip("tuntap", "add", DEVICE, "mode", "tap")
    before = len(os.listdir("/proc/self/fd"))
    refused(host)
    assert len(os.listdir("/proc/self/fd")) == before
