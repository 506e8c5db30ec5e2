"""Which interface and which address carry the underlay: spec section 10, rule by rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address

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


def address(
    text: str, *, deprecated: bool = False, permanent: bool = True, temporary: bool = False
) -> InterfaceAddress:
    return InterfaceAddress(IPv4Address(text), 24, 0, deprecated, permanent, temporary)


def interface(index: int, name: str, *addresses: InterfaceAddress, mtu: int = 1500) -> Interface:
    return Interface(index, name, mtu, "", True, addresses)


LO = interface(1, "lo", address("127.0.0.1"), mtu=65536)
ETH0 = interface(2, "eth0", address("192.0.2.11"), address("192.0.2.12"))
ETH1 = interface(3, "eth1", address("198.51.100.11"), mtu=9000)
WG0 = interface(4, "wg0", address("203.0.113.11"), mtu=1420)
BARE = interface(5, "bare0")
ALL = (LO, ETH0, ETH1, WG0, BARE)


def choose(
    *,
    interfaces: Sequence[Interface] = ALL,
    names: Sequence[str] = (),
    regexes: Sequence[str] = (),
    can_reach: str | None = None,
    public_ip: str | None = None,
    default: str | None = "eth0",
    reach: Reach | None = None,
) -> Choice:
    wish = Wish(
        names,
        regexes,
        IPv4Address(can_reach) if can_reach else None,
        [IPv4Address(public_ip)] if public_ip else [],
    )
    host = Host(interfaces, {4: default} if default else {}, lambda _: reach)
    (choice,) = choose_interface(host, wish)
    return choice


def chosen(choice: Choice) -> tuple[str, str]:
    return choice.name, str(choice.address)


def only(*addresses: InterfaceAddress) -> str:
    """Return which of an interface's addresses is taken."""
    return str(choose(interfaces=[interface(2, "eth0", *addresses)], names=["eth0"]).address)


def test_without_a_flag_the_default_route_decides() -> None:
    choice = choose()
    why = (
        "carries the IPv4 default route; sending from 192.0.2.11, "
        "the first of its 2 usable addresses"
    )
    assert choice == Choice("eth0", 2, 1500, IPv4Address("192.0.2.11"), why)


def test_no_default_route_is_refused() -> None:
    with pytest.raises(Refusal, match="no IPv4 default route; name one with --iface"):
        choose(default=None)


def test_the_public_ip_alone_decides_by_its_owner() -> None:
    assert chosen(choose(public_ip="192.0.2.12")) == ("eth0", "192.0.2.12")
    assert chosen(choose(public_ip="198.51.100.11", default=None)) == ("eth1", "198.51.100.11")


def test_a_public_ip_of_no_interface_is_refused() -> None:
    with pytest.raises(Refusal, match=r"no interface has the address 203\.0\.113\.200"):
        choose(public_ip="203.0.113.200")


def test_a_public_ip_beside_another_flag_decides_nothing() -> None:
    assert choose(public_ip="203.0.113.200", names=["eth1"]).name == "eth1"


def test_iface_is_a_name_or_an_address() -> None:
    assert choose(names=["wg0"]).mtu == 1420
    assert chosen(choose(names=["192.0.2.12"])) == ("eth0", "192.0.2.12")


def test_the_first_iface_that_works_is_taken_and_the_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    names = ["nope0", "203.0.113.200", "bare0", "eth1", "eth0"]
    assert choose(names=names).name == "eth1"
    assert [record.getMessage() for record in caplog.records] == [
        "Interface selection: there is no interface nope0",
        "Interface selection: no interface has the address 203.0.113.200",
        "Interface selection: interface bare0 has no usable IPv4 address",
    ]


def test_iface_comes_before_regex_before_can_reach() -> None:
    reach = Reach("wg0", IPv4Address("203.0.113.11"), None)
    flags = {"names": ["eth0"], "regexes": ["^eth1$"], "can_reach": "203.0.113.1", "reach": reach}
    assert choose(**flags).name == "eth0"  # type: ignore[arg-type] # one dict for all flags
    flags["names"] = ["nope0"]
    assert choose(**flags).name == "eth1"  # type: ignore[arg-type] # as above
    flags["regexes"] = ["^nope"]
    assert choose(**flags).name == "wg0"  # type: ignore[arg-type] # as above


def test_a_regex_is_searched_in_all_addresses_before_any_name() -> None:
    assert chosen(choose(regexes=[r"\.100\."])) == ("eth1", "198.51.100.11")
    assert chosen(choose(regexes=["th1"])) == ("eth1", "198.51.100.11")
    # "2" is in no name, "0" is in eth0's name but in eth1's address as well.
    assert chosen(
        choose(interfaces=[BARE, LO, replace(ETH0, addresses=()), ETH1], regexes=["0"])
    ) == (
        "eth1",
        "198.51.100.11",
    )


def test_of_several_hits_the_first_in_kernel_order_wins_and_its_matching_address() -> None:
    assert chosen(choose(regexes=[r"\.1[12]$"])) == ("eth0", "192.0.2.11")
    assert chosen(choose(regexes=[r"\.12$"])) == ("eth0", "192.0.2.12")
    assert choose(regexes=["^(wg|eth)"]).name == "eth0"


def test_the_first_regex_that_works_is_taken() -> None:
    assert choose(regexes=["^nope", "^wg"]).name == "wg0"


def test_a_broken_regex_is_refused() -> None:
    with pytest.raises(Refusal, match=r"--iface-regex=\( is not a regular expression"):
        choose(regexes=["("])


def test_can_reach_takes_the_kernels_way_and_its_source() -> None:
    reach = Reach("eth0", IPv4Address("192.0.2.12"), IPv4Address("192.0.2.1"))
    assert chosen(choose(can_reach="8.8.8.8", reach=reach)) == ("eth0", "192.0.2.12")
    without = Reach("eth0", None, None)
    assert chosen(choose(can_reach="8.8.8.8", reach=without)) == ("eth0", "192.0.2.11")
    with pytest.raises(Refusal, match=r"no route to --iface-can-reach=8\.8\.8\.8"):
        choose(can_reach="8.8.8.8")


def test_none_that_fits_is_refused_with_what_there_is() -> None:
    with pytest.raises(Refusal) as caught:
        choose(names=["nope0"], regexes=["^x"], can_reach="8.8.8.8")
    sentence = str(caught.value)
    for part in (
        "there is no interface nope0",
        "--iface-regex=^x matches no address and no name",
        "no route to --iface-can-reach=8.8.8.8",
        "eth0 192.0.2.11 192.0.2.12, eth1 198.51.100.11",
        "correct --iface, --iface-regex or --iface-can-reach",
    ):
        assert part in sentence


def test_global_comes_before_link_local() -> None:
    assert only(address("169.254.7.7"), address("192.0.2.1", permanent=False)) == "192.0.2.1"
    assert only(address("169.254.7.7")) == "169.254.7.7"


def test_permanent_comes_before_dynamic_before_temporary() -> None:
    dynamic = address("192.0.2.1", permanent=False)
    temporary = address("192.0.2.2", temporary=True)
    both = address("192.0.2.4", permanent=False, temporary=True)
    assert only(dynamic, temporary) == "192.0.2.2"
    assert only(both, dynamic) == "192.0.2.1"
    assert only(temporary, address("192.0.2.3")) == "192.0.2.3"


def test_among_equals_the_kernels_order_counts() -> None:
    assert only(address("192.0.2.9"), address("192.0.2.1")) == "192.0.2.9"


@pytest.mark.parametrize(
    "unusable",
    [
        address("192.0.2.1", deprecated=True),
        address("127.0.0.5"),
        address("224.0.0.5"),
        address("0.0.0.0"),
        address("255.255.255.255"),
    ],
)
def test_an_address_that_nobody_could_answer_is_not_taken(unusable: InterfaceAddress) -> None:
    assert only(unusable, address("192.0.2.7")) == "192.0.2.7"
    with pytest.raises(Refusal, match="interface eth0 has no usable IPv4 address"):
        only(unusable)


def test_an_mtu_of_0_is_refused() -> None:
    with pytest.raises(Refusal, match="the MTU of interface eth0 is 0"):
        choose(interfaces=[replace(ETH0, mtu=0)])


def test_the_reason_for_the_address_is_told() -> None:
    assert "its only usable address" in choose(names=["eth1"]).why
    assert "the first of its 2 usable addresses" in choose(names=["eth0"]).why
