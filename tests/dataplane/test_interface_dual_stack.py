"""The choice of the underlay interface and its addresses: spec section 10, pure."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from pyflannel.dataplane.interface import (
    Choice,
    Host,
    Interface,
    InterfaceAddress,
    Reach,
    Wish,
    choose_interface,
)
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

BOTH = (4, 6)


def owned(text: str, *, deprecated: bool = False, permanent: bool = True) -> InterfaceAddress:
    return InterfaceAddress(ip_address(text), 64, 0, deprecated, permanent, temporary=False)


def interface(index: int, name: str, *addresses: InterfaceAddress, mtu: int = 1500) -> Interface:
    return Interface(index, name, mtu, "veth", up=True, addresses=addresses)


LO = interface(1, "lo", owned("127.0.0.1"), owned("::1"), mtu=65536)
ETH0 = interface(2, "eth0", owned("192.0.2.1"), owned("fe80::1"), owned("2001:db8::1"))
ETH1 = interface(
    3,
    "eth1",
    owned("198.51.100.9", deprecated=True),
    owned("198.51.100.8", permanent=False),
    owned("198.51.100.7"),
    owned("2001:db8:1::9", deprecated=True),
    owned("2001:db8:1::8", permanent=False),
    owned("2001:db8:1::7"),
)
ETH2 = interface(4, "eth2", owned("203.0.113.1"))


def _reach(address: IPAddress) -> Reach | None:
    if address.version == 4:
        return Reach("eth1", ip_address("198.51.100.8"), None)
    return Reach("eth0", ip_address("2001:db8::1"), None)


def choose(
    wish: Wish, versions: tuple[int, ...] = (4,), routes: dict[int, str] | None = None
) -> tuple[Choice, ...]:
    host = Host((LO, ETH0, ETH1, ETH2), {4: "eth0"} if routes is None else routes, _reach)
    return choose_interface(host, wish, versions)


def _ips(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(ip_address(text) for text in texts)


@pytest.mark.parametrize(
    ("wish", "versions", "name", "addresses"),
    [
        (Wish(), (4,), "eth0", ["192.0.2.1"]),
        (Wish(public_ips=_ips("198.51.100.7")), (4,), "eth1", ["198.51.100.7"]),
        (Wish(public_ips=_ips("2001:db8:1::8")), (4,), "eth0", ["192.0.2.1"]),
        (Wish(names=["eth1"]), (4,), "eth1", ["198.51.100.7"]),
        (Wish(names=["nope", "198.51.100.8"]), (4,), "eth1", ["198.51.100.8"]),
        (Wish(regexes=["^198"]), (4,), "eth1", ["198.51.100.7"]),
        (Wish(regexes=["th1"]), (4,), "eth1", ["198.51.100.7"]),
        (Wish(names=["nope"], regexes=["eth2"]), (4,), "eth2", ["203.0.113.1"]),
        (Wish(can_reach=ip_address("10.0.0.1")), (4,), "eth1", ["198.51.100.8"]),
        (Wish(names=["eth0"], public_ips=_ips("203.0.113.99")), (4,), "eth0", ["192.0.2.1"]),
        (Wish(names=["eth1"]), BOTH, "eth1", ["198.51.100.7", "2001:db8:1::7"]),
        (Wish(names=["198.51.100.8"]), BOTH, "eth1", ["198.51.100.8", "2001:db8:1::7"]),
        (Wish(names=["2001:db8:1::8"]), BOTH, "eth1", ["198.51.100.7", "2001:db8:1::8"]),
        (
            Wish(names=["198.51.100.8"], public_ips=_ips("2001:db8:1::8")),
            BOTH,
            "eth1",
            ["198.51.100.8", "2001:db8:1::8"],
        ),
        (
            Wish(public_ips=_ips("198.51.100.7")),
            BOTH,
            "eth1",
            ["198.51.100.7", "2001:db8:1::7"],
        ),
        (
            Wish(public_ips=_ips("2001:db8:1::8")),
            BOTH,
            "eth1",
            ["198.51.100.7", "2001:db8:1::8"],
        ),
        (Wish(regexes=["^(198|2001:db8:1)"]), BOTH, "eth1", ["198.51.100.7", "2001:db8:1::7"]),
        (Wish(can_reach=ip_address("2001:db8:9::1")), BOTH, "eth0", ["192.0.2.1", "2001:db8::1"]),
    ],
)
def test_choice(wish: Wish, versions: tuple[int, ...], name: str, addresses: list[str]) -> None:
    choices = choose(wish, versions)
    assert [(choice.name, str(choice.address)) for choice in choices] == [
        (name, address) for address in addresses
    ]
    # One reason for the interface; each family says which address it sends from.
    assert len({choice.why.partition("; sending from ")[0] for choice in choices}) == 1
    assert all(f"; sending from {choice.address}" in choice.why for choice in choices)


def test_both_default_routes_leave_by_one_interface() -> None:
    choices = choose(Wish(), BOTH, {4: "eth1", 6: "eth1"})
    assert choices[0].why == (
        "carries the IPv4 and IPv6 default routes; sending from 198.51.100.7, "
        "the first of its 2 usable addresses"
    )


@pytest.mark.parametrize(
    ("wish", "routes", "named"),
    [
        (Wish(), {4: "eth0"}, "no IPv6 default route"),
        (Wish(), {4: "eth0", 6: "eth1"}, "leaves by eth0 and the IPv6 one by eth1"),
        (Wish(names=["eth2"]), {}, "eth2 has no usable IPv6 address"),
        (
            Wish(names=["198.51.100.7"], public_ips=_ips("2001:db8::1")),
            {},
            "no interface has the address 198.51.100.7 and 2001:db8::1",
        ),
        (Wish(public_ips=_ips("192.0.2.1", "2001:db8:1::7")), {}, "192.0.2.1 and 2001:db8:1::7"),
        (Wish(regexes=["^198"]), {}, "matches no address and no name"),
    ],
)
def test_dual_stack_needs_both_families_on_one_interface(
    wish: Wish, routes: dict[int, str], named: str
) -> None:
    with pytest.raises(Refusal, match=named):
        choose(wish, BOTH, routes)


def test_the_refusal_tells_what_there_is() -> None:
    with pytest.raises(Refusal, match=r"no interface eth9 \(this host has lo 127.0.0.1 ::1, eth0"):
        choose(Wish(names=["eth9"]))
