"""What a change on the host means: every event, every state of the two devices; no privileges."""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyflannel.dataplane.host_change import (
    EVERYTHING,
    AddressChanged,
    Concern,
    Diagnosis,
    HostEvent,
    InUse,
    LinkChanged,
    Overrun,
    Repair,
    RouteChanged,
    concern,
    diagnose,
)
from pyflannel.dataplane.host_events import parse_events
from pyflannel.dataplane.interface import Interface, InterfaceAddress
from pyflannel.dataplane.route import IPAddress, IPNetwork

DEVICE, INTERFACE, OTHER = 7, 2, 3
OWN, UNDERLAY, SPARE = IPv4Address("10.5.1.0"), IPv4Address("192.0.2.1"), IPv4Address("192.0.2.9")
PEER, FOREIGN = IPv4Network("10.5.2.0/24"), IPv4Network("198.51.100.0/24")
OTHER_FAMILY = IPv6Network("2001:db8:42:22::/64")
USED = InUse(
    device="flannel.1",
    device_index=DEVICE,
    device_address=OWN,
    device_mtu=1450,
    interface="eth0",
    interface_index=INTERFACE,
    interface_mtu=1500,
    address=UNDERLAY,
)

NOTHING, ROUTES = Concern.NOTHING, Concern.ROUTES
UNDERLAY_LINK = Concern.UNDERLAY | ROUTES


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize("is_up", [False, True])
@pytest.mark.parametrize(
    ("index", "name", "expected"),
    [
        (INTERFACE, "eth0", UNDERLAY_LINK),
        (INTERFACE, "renamed", UNDERLAY_LINK),
        (OTHER, "eth0", UNDERLAY_LINK),
        (DEVICE, "flannel.1", Concern.DEVICE | ROUTES),
        (DEVICE, "renamed", Concern.DEVICE | ROUTES),
        (OTHER, "flannel.1", Concern.DEVICE | ROUTES),
        (OTHER, "veth1", NOTHING),
    ],
)
def test_concern_of_a_link(
    index: int, name: str, is_gone: bool, is_up: bool, expected: Concern
) -> None:
    event = LinkChanged(index, name, is_gone, is_up, 1500)
    assert concern(event, USED, lambda _: False) == expected


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (INTERFACE, Concern.UNDERLAY | ROUTES),
        (DEVICE, Concern.DEVICE | ROUTES),
        (OTHER, NOTHING),
    ],
)
def test_concern_of_an_address(index: int, is_gone: bool, expected: Concern) -> None:
    assert concern(AddressChanged(index, SPARE, is_gone), USED, lambda _: False) == expected


@pytest.mark.parametrize("is_gone", [False, True])
def test_the_address_that_is_sent_from_concerns_wherever_it_is(is_gone: bool) -> None:
    event = AddressChanged(OTHER, UNDERLAY, is_gone)
    assert concern(event, USED, lambda _: False) == UNDERLAY_LINK


@pytest.mark.parametrize(
    ("destination", "index", "is_gone", "expected"),
    [
        (PEER, DEVICE, False, NOTHING),
        (PEER, DEVICE, True, ROUTES),
        (PEER, INTERFACE, False, ROUTES),
        (PEER, INTERFACE, True, ROUTES),
        (PEER, 0, False, ROUTES),
        (PEER, 0, True, ROUTES),
        (FOREIGN, DEVICE, False, NOTHING),
        (FOREIGN, DEVICE, True, NOTHING),
        (FOREIGN, INTERFACE, False, ROUTES),
        (FOREIGN, INTERFACE, True, ROUTES),
        (FOREIGN, 0, False, ROUTES),
        (FOREIGN, 0, True, ROUTES),
        # Of the other family, as of its device in dual stack, whose peers come and go as well.
        (OTHER_FAMILY, OTHER, False, NOTHING),
        (OTHER_FAMILY, OTHER, True, NOTHING),
        (OTHER_FAMILY, INTERFACE, False, NOTHING),
    ],
)
def test_concern_of_a_route(
    destination: IPNetwork, index: int, is_gone: bool, expected: Concern
) -> None:
    event = RouteChanged(destination, index, is_gone)
    assert concern(event, USED, lambda subnet: subnet == PEER) == expected


def test_overrun_concerns_everything() -> None:
    assert concern(Overrun(), USED, lambda _: False) == EVERYTHING
    assert all(one in EVERYTHING for one in Concern)


def _address(address: IPAddress) -> InterfaceAddress:
    return InterfaceAddress(address, 24, 0, deprecated=False, permanent=True, temporary=False)


def _interface(name: str, index: int, mtu: int, up: bool, *addresses: IPv4Address) -> Interface:
    kind = "tun" if name == "flannel.1" else "veth"
    return Interface(index, name, mtu, kind, up, tuple(_address(x) for x in addresses))


GOOD_DEVICE = _interface("flannel.1", DEVICE, 1450, True, OWN)
GOOD_INTERFACE = _interface("eth0", INTERFACE, 1500, True, UNDERLAY)


def _diagnose(used: InUse, *interfaces: Interface | None) -> Diagnosis:
    return diagnose(used, [x for x in interfaces if x is not None])


def test_nothing_is_done_where_all_is_well() -> None:
    found = _diagnose(USED, GOOD_DEVICE, GOOD_INTERFACE)
    assert (found.repair, found.trouble) == (Repair.NOTHING, "")
    assert (found.address, found.index, found.mtu) == (UNDERLAY, INTERFACE, 1500)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, Repair.REOPEN),
        (replace(GOOD_DEVICE, kind="vxlan"), Repair.REOPEN),
        (replace(GOOD_DEVICE, index=OTHER), Repair.REOPEN),
        (replace(GOOD_DEVICE, up=False), Repair.CONFIGURE),
        (replace(GOOD_DEVICE, mtu=1200), Repair.CONFIGURE),
        (replace(GOOD_DEVICE, addresses=()), Repair.CONFIGURE),
        (replace(GOOD_DEVICE, addresses=(_address(SPARE),)), Repair.CONFIGURE),
        (replace(GOOD_DEVICE, addresses=(_address(SPARE), _address(OWN))), Repair.NOTHING),
    ],
)
def test_repair_of_the_device(device: Interface | None, expected: Repair) -> None:
    assert _diagnose(USED, device, GOOD_INTERFACE).repair == expected


def test_what_does_not_forward_is_restarted_on_a_device_that_is_there() -> None:
    stuck = replace(USED, forwards=False)
    assert _diagnose(stuck, GOOD_DEVICE, GOOD_INTERFACE).repair == Repair.RESTART
    assert _diagnose(stuck, None, GOOD_INTERFACE).repair == Repair.REOPEN
    down = replace(GOOD_DEVICE, up=False)
    assert _diagnose(stuck, down, GOOD_INTERFACE).repair == Repair.RESTART | Repair.CONFIGURE


def test_a_missing_interface_is_waited_for() -> None:
    found = _diagnose(USED, GOOD_DEVICE, None)
    assert found.repair == Repair.NOTHING
    assert found.trouble == "the underlay interface eth0 is gone"


ADDRESSES = ((), (UNDERLAY,), (SPARE,), (SPARE, UNDERLAY))


@pytest.mark.parametrize(
    ("index", "mtu", "up", "addresses"),
    list(itertools.product((INTERFACE, OTHER), (1500, 1400), (True, False), ADDRESSES)),
)
def test_every_state_of_the_interface(
    index: int, mtu: int, up: bool, addresses: tuple[IPv4Address, ...]
) -> None:
    found = _diagnose(USED, GOOD_DEVICE, _interface("eth0", index, mtu, up, *addresses))
    assert (Repair.RESIZE in found.repair, found.mtu) == (mtu != 1500, mtu)
    assert found.index == index
    kept = UNDERLAY in addresses
    assert found.address == (UNDERLAY if kept or not addresses else SPARE)
    # Sockets can be bound anew only where there is an address.
    assert (Repair.REBIND in found.repair) == (bool(addresses) and (not kept or index != INTERFACE))
    if not up:
        assert found.trouble == "the underlay interface eth0 is down"
    else:
        assert found.trouble == ("" if addresses else "eth0 has no usable IPv4 address")


BRIDGE = _interface("br0", OTHER, 1400, True)
WITH_OUR_ADDRESS = replace(BRIDGE, addresses=(_address(UNDERLAY),))
WITHOUT = replace(GOOD_INTERFACE, addresses=())
RENAMED = replace(GOOD_INTERFACE, name="wan0")


@pytest.mark.parametrize(
    ("interfaces", "expected"),
    [
        ((GOOD_INTERFACE, WITH_OUR_ADDRESS), (UNDERLAY, "eth0", INTERFACE, 1500, "")),
        ((WITHOUT, WITH_OUR_ADDRESS), (UNDERLAY, "br0", OTHER, 1400, "")),
        (
            (WITHOUT, BRIDGE),
            (UNDERLAY, "eth0", INTERFACE, 1500, "eth0 has no usable IPv4 address"),
        ),
        ((WITH_OUR_ADDRESS,), (UNDERLAY, "br0", OTHER, 1400, "")),
        ((BRIDGE, RENAMED), (UNDERLAY, "wan0", INTERFACE, 1500, "")),
        (
            (BRIDGE, replace(RENAMED, addresses=(_address(SPARE),))),
            (SPARE, "wan0", INTERFACE, 1500, ""),
        ),
        (
            (replace(RENAMED, addresses=()), replace(GOOD_INTERFACE, index=OTHER)),
            (UNDERLAY, "eth0", OTHER, 1500, ""),
        ),
    ],
)
def test_the_interface_is_followed(
    interfaces: tuple[Interface, ...], expected: tuple[IPAddress, str, int, int, str]
) -> None:
    for order in itertools.permutations((GOOD_DEVICE, *interfaces)):
        found = _diagnose(USED, *order)
        now = (found.address, found.interface, found.index, found.mtu, found.trouble)
        assert now == expected
        moved = now[:3] != (UNDERLAY, "eth0", INTERFACE)
        assert (Repair.REBIND in found.repair, Repair.REOPEN in found.repair) == (moved, False)


def test_a_link_local_address_is_no_substitute_for_one_that_peers_know() -> None:
    known, new, link_local = (IPv6Address(x) for x in ("fd77::11", "fd77::22", "fe80::1"))
    own = IPv6Address("2001:db8:42:3a::")
    used = replace(USED, device_address=own, address=known)
    device = replace(GOOD_DEVICE, addresses=(_address(own),))

    def look(used: InUse, *addresses: IPv6Address) -> Diagnosis:
        interface = replace(GOOD_INTERFACE, addresses=tuple(_address(x) for x in addresses))
        return _diagnose(used, device, interface)

    gone = look(used, link_local)
    assert (gone.repair, gone.address) == (Repair.NOTHING, known)
    assert gone.trouble == "eth0 has no usable IPv6 address"
    back = look(used, link_local, new)
    assert (back.repair, back.address, back.trouble) == (Repair.REBIND, new, "")
    # Whoever began with one goes on with one.
    moved = look(replace(used, address=IPv6Address("fe80::2")), link_local)
    assert (moved.repair, moved.address) == (Repair.REBIND, link_local)


def test_a_link_local_address_on_another_interface_is_not_ours() -> None:
    """A VLAN has the MAC of the interface below, and with it the same link-local address."""
    shared = IPv6Address("fe80::1")
    used = replace(USED, address=shared, device_address=IPv6Address("fd00::"))
    vlan = replace(_interface("eth0.5", OTHER, 1500, True), addresses=(_address(shared),))
    found = _diagnose(used, _interface("eth0", INTERFACE, 1500, True), vlan)
    assert (found.interface, found.index) == ("eth0", INTERFACE)
    assert "eth0 has no usable IPv6 address" in found.trouble
    assert "eth0 is gone" in _diagnose(used, vlan).trouble


def _message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _link(family: int = socket.AF_UNSPEC) -> bytes:
    body = struct.pack("=BxHiII", family, 1, 5, 1, 0)
    return body + _attribute(3, b"eth0\0") + _attribute(4, struct.pack("=I", 1400))


def _route(family: int, length: int, kind: int = 1, flags: int = 0) -> bytes:
    return struct.pack("=BBBBBBBBI", family, length, 0, 0, 254, 3, 0, kind, flags)


DST4, DST6 = _attribute(1, FOREIGN.network_address.packed), _attribute(1, bytes(16))
OIF = _attribute(4, struct.pack("=I", 5))
ADDRESS4 = struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 5)
EVENTS: list[tuple[bytes, list[HostEvent]]] = [
    (_message(16, _link()), [LinkChanged(5, "eth0", False, True, 1400)]),
    (_message(17, _link()), [LinkChanged(5, "eth0", True, True, 1400)]),
    (_message(17, _link(socket.AF_BRIDGE)), []),
    (
        _message(20, ADDRESS4 + _attribute(1, SPARE.packed) + _attribute(2, UNDERLAY.packed)),
        [AddressChanged(5, UNDERLAY, False)],
    ),
    (_message(21, ADDRESS4 + _attribute(1, SPARE.packed)), [AddressChanged(5, SPARE, True)]),
    (
        _message(20, ADDRESS4 + _attribute(1, IPv6Address("2001:db8::1").packed)),
        [AddressChanged(5, IPv6Address("2001:db8::1"), False)],
    ),
    (_message(20, ADDRESS4), []),
    (_message(24, _route(socket.AF_INET, 24) + DST4 + OIF), [RouteChanged(FOREIGN, 5, False)]),
    (_message(25, _route(socket.AF_INET, 24) + DST4), [RouteChanged(FOREIGN, 0, True)]),
    (
        _message(24, _route(socket.AF_INET, 0) + OIF),
        [RouteChanged(IPv4Network("0.0.0.0/0"), 5, False)],
    ),
    (
        _message(24, _route(socket.AF_INET6, 0) + DST6),
        [RouteChanged(IPv6Network("::/0"), 0, False)],
    ),
    (_message(24, _route(socket.AF_INET, 24, kind=2) + DST4 + OIF), []),
    (_message(24, _route(socket.AF_INET, 24, flags=0x200) + DST4 + OIF), []),
    (_message(28, bytes(12)), []),
]


@pytest.mark.parametrize(("message", "expected"), EVENTS)
def test_messages_of_the_kernel(message: bytes, expected: list[HostEvent]) -> None:
    assert list(parse_events(message)) == expected


def test_several_messages_at_once() -> None:
    messages = b"".join(message + bytes(-len(message) % 4) for message, _ in EVENTS)
    assert list(parse_events(messages)) == [event for _, found in EVENTS for event in found]


@given(st.lists(st.sampled_from([message for message, _ in EVENTS])), st.integers(0, 40))
def test_a_message_that_is_cut_off_ends_the_reading(messages: list[bytes], cut: int) -> None:
    whole, expected = b"", []
    kept = max(0, sum(len(x) + -len(x) % 4 for x in messages) - cut)
    for message in messages:
        if len(whole) + len(message) <= kept:
            expected += dict(EVENTS)[message]
        whole += message + bytes(-len(message) % 4)
    assert list(parse_events(whole[:kept])) == expected
