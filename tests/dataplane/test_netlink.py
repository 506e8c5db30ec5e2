"""Links, addresses and route lookups by netlink, in a namespace with real ones.

lone namespace:   eth0 === veth0        flannel.1 (TUN)
               192.0.2.11/24           10.244.5.0/32
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_interface
from typing import TypeVar

import pytest

from pyflannel.dataplane.interface import Reach
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.route import IPAddress
from tests.lab.hosts import Namespace, wait_until
from tests.lab.inside import inside, namespace_with_tun
from tests.lab.require import require_program, require_root

T = TypeVar("T")

DEVICE = "flannel.1"
NETWORK = IPv4Network("10.244.0.0/16")
OWN = IPv4Address("10.244.5.0")


@pytest.fixture
def host() -> Iterator[Namespace]:
    require_root()
    require_program("ip")
    with namespace_with_tun(DEVICE) as made:
        configure(made, OWN)
        yield made


def ask(host: Namespace, question: Callable[[Netlink], Awaitable[T]]) -> T:
    """Return what one question to a connection inside the namespace gives."""

    async def connect_and_ask() -> T:
        async with Netlink() as netlink:
            return await question(netlink)

    return inside(host, lambda: asyncio.run(connect_and_ask()))


def configure(host: Namespace, address: IPv4Address, mtu: int = 1450) -> None:
    ask(host, lambda netlink: netlink.configure_device(DEVICE, address, mtu, 5000, NETWORK))


def test_interfaces_are_told_in_kernel_order_with_their_addresses(host: Namespace) -> None:
    host.ip("addr", "add", "192.0.2.12/24", "dev", "eth0")
    host.ip("addr", "add", "198.51.100.7/32", "dev", "eth0", "preferred_lft", "0", "valid_lft", "9")
    host.ip("addr", "add", "203.0.113.9/24", "dev", "veth0", "scope", "link")
    wait_until(lambda: "fe80:" in host.ip("addr", "show", "eth0"), "a link-local address")
    host.ip("link", "set", "veth0", "mtu", "1400", "down")
    found = {x.name: x for x in ask(host, lambda netlink: netlink.interfaces())}
    names = [
        line.split(":")[1].split("@")[0].strip() for line in host.ip("-o", "link").splitlines()
    ]
    assert list(found) == names
    eth0, veth0 = found["eth0"], found["veth0"]
    assert (eth0.kind, eth0.mtu, eth0.up) == ("veth", 1500, True)
    assert (veth0.mtu, veth0.up, found[DEVICE].kind) == (1400, False, "tun")
    ipv4 = [x for x in eth0.addresses if x.address.version == 4]
    first, second, third = sorted(ipv4, key=lambda x: str(x.address))
    assert [x.address.is_link_local for x in eth0.addresses if x not in ipv4] == [True]
    assert (str(first.address), first.prefixlen, first.scope) == ("192.0.2.11", 24, 0)
    assert (first.permanent, first.deprecated, first.temporary) == (True, False, False)
    assert (str(second.address), second.temporary) == ("192.0.2.12", True)
    assert (str(third.address), third.permanent, third.deprecated) == ("198.51.100.7", False, True)
    assert veth0.addresses[0].scope == 253


@pytest.mark.parametrize(
    ("version", "near", "far"),
    [(4, "192.0.2.1", "203.0.113.1"), (6, "2001:db8::1", "2001:db8:1::1")],
)
def test_default_route_is_the_first_that_leaves_the_host(
    host: Namespace, version: int, near: str, far: str
) -> None:
    def default() -> Mapping[int, str]:
        return ask(host, lambda netlink: netlink.default_routes())

    family = f"-{version}"
    assert default() == {}
    host.ip(family, "route", "add", "blackhole", "default", "metric", "1")
    assert default() == {}
    host.ip("addr", "add", "203.0.113.9/24", "dev", "veth0")
    host.ip("addr", "add", "2001:db8:1::9/64", "dev", "veth0", "nodad")
    host.ip("addr", "add", "2001:db8::9/64", "dev", "eth0", "nodad")
    host.ip(family, "route", "add", "default", "via", far, "metric", "200")
    assert default() == {version: "veth0"}
    host.ip(family, "route", "add", "default", "via", near, "metric", "100")
    assert default() == {version: "eth0"}


def test_route_lookup(host: Namespace) -> None:
    def reach(address: str) -> Reach | None:
        return ask(host, lambda netlink: netlink.route_to(IPv4Address(address)))

    source = IPv4Address("192.0.2.11")
    assert reach("192.0.2.77") == Reach("eth0", source, None)
    assert reach("203.0.113.1") is None
    host.ip("route", "add", "203.0.113.0/24", "via", "192.0.2.1")
    assert reach("203.0.113.1") == Reach("eth0", source, IPv4Address("192.0.2.1"))
    for kind in ("unreachable", "prohibit", "blackhole"):
        host.ip("route", "replace", kind, "203.0.113.0/24")
        assert reach("203.0.113.1") is None, kind


@pytest.mark.parametrize(
    ("first", "second", "far"),
    [
        ("192.0.2.11/24", "192.0.2.13/24", "203.0.113.1"),
        ("2001:db8::11/64", "2001:db8::13/64", "2001:db8:1::1"),
    ],
)
def test_route_lookup_from_an_address_that_rules_look_at(
    host: Namespace, first: str, second: str, far: str
) -> None:
    sources = [ip_interface(x).ip for x in (first, second)]
    family = f"-{sources[0].version}"
    for address in (first, second)[sources[0].version == 4 :]:
        nodad = ("nodad",) if sources[0].version == 6 else ()
        host.ip("addr", "add", address, "dev", "eth0", *nodad)
    gateway = ip_interface(first).network[1]
    host.ip(family, "rule", "add", "from", str(sources[1]), "lookup", "100")
    host.ip(family, "route", "add", far, "via", str(gateway), "dev", "eth0", "table", "100")

    def reach(source: IPAddress | None) -> Reach | None:
        return ask(host, lambda netlink: netlink.route_to(ip_address(far), source))

    assert reach(None) is None
    assert reach(sources[0]) is None
    assert reach(sources[1]) == Reach("eth0", sources[1], gateway)
    assert reach(ip_interface(first).network[99]) is None


def test_links_of_each_kind(host: Namespace) -> None:
    mac = "0a:00:00:00:00:05"
    # fmt: off
    host.ip("link", "add", "kernel0", "address", mac, "type", "vxlan", "id", "7", "dev", "eth0",
            "dstport", "8472")
    # fmt: on
    link = ask(host, lambda netlink: netlink.link("kernel0"))
    assert link is not None
    assert (link.kind, str(link.mac), link.up) == ("vxlan", mac, False)
    assert (link.vxlan_id, link.vxlan_port) == (7, 8472)
    tun = ask(host, lambda netlink: netlink.link(DEVICE))
    assert tun is not None
    assert (tun.kind, tun.mac, tun.vxlan_id, tun.vxlan_port) == ("tun", None, None, None)
    assert ask(host, lambda netlink: netlink.link("nope0")) is None

    assert ask(host, lambda netlink: netlink.vxlan_devices_on_port(8472)) == ()
    host.ip("link", "set", "kernel0", "up")
    assert ask(host, lambda netlink: netlink.vxlan_devices_on_port(8472)) == ("kernel0",)
    assert ask(host, lambda netlink: netlink.vxlan_devices_on_port(4789)) == ()

    ask(host, lambda netlink: netlink.delete_link("kernel0"))
    assert "kernel0" not in host.ip("link")
    with pytest.raises(OSError) as caught:
        ask(host, lambda netlink: netlink.delete_link("kernel0"))
    assert caught.value.errno == errno.ENODEV


def test_device_is_configured_once_and_again(host: Namespace) -> None:
    for _ in range(2):
        configure(host, OWN)
        (link,) = json.loads(host.ip("-j", "addr", "show", DEVICE))
        assert (link["mtu"], link["txqlen"]) == (1450, 5000)
        assert "UP" in link["flags"]
        (address,) = [x for x in link["addr_info"] if x["family"] == "inet"]
        assert (address["local"], address["prefixlen"]) == (str(OWN), 32)
        assert address["scope"] == "global"
    assert host.exec("sysctl", "-n", f"net.ipv6.conf.{DEVICE.replace('.', '/')}.accept_ra") == "0\n"


def test_another_address_takes_the_place_of_the_old_and_no_route_is_lost(host: Namespace) -> None:
    for base in ("10.244.6.0", "10.244.7.0"):
        host.ip("route", "add", f"{base}/24", "via", base, "dev", DEVICE, "onlink")
    routes = host.ip("route")
    for address in ("10.244.9.0", "10.244.5.0"):
        host.ip("addr", "add", f"{address}/24", "dev", DEVICE, "noprefixroute")
        configure(host, IPv4Address(address))
        assert host.ip("route") == routes
        (link,) = json.loads(host.ip("-j", "-4", "addr", "show", DEVICE))
        assert [(x["local"], x["prefixlen"]) for x in link["addr_info"]] == [(address, 32)]
    host.ip("addr", "add", "203.0.113.5/32", "dev", DEVICE)
    configure(host, OWN)
    assert "203.0.113.5" in host.ip("addr", "show", DEVICE)


def test_what_the_kernel_refuses_is_an_os_error(host: Namespace) -> None:
    with pytest.raises(OSError) as caught:
        configure(host, OWN, mtu=10)
    assert caught.value.errno == errno.EINVAL
    host.ip("link", "del", DEVICE)
    with pytest.raises(OSError) as caught:
        configure(host, OWN)
    assert caught.value.errno == errno.ENODEV
