"""Which interface of this host carries the underlay, and which of its addresses.

Pure: the interfaces, the default route and the route lookup are parameters. It does not know
netlink, and it does not decide what is *advertised* (`--public-ip` may differ from the address).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from typing import NamedTuple

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

logger = logging.getLogger(__name__)

_BROADCAST = IPv4Address("255.255.255.255")


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An IPv4 address of an interface, as the kernel reports it.

    `scope` is the kernel's (0 global, 253 link, 254 host). `temporary` is the kernel's flag 0x01,
    which on an IPv4 address means secondary; flannel sorts by it all the same.
    """

    address: IPv4Address
    prefixlen: int
    scope: int
    deprecated: bool
    permanent: bool
    temporary: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface with its IPv4 addresses in kernel order; `mtu` in bytes.

    `kind` is the kernel's link kind ("veth", "vxlan", …), empty for hardware and loopback.
    """

    index: int
    name: str
    mtu: int
    kind: str
    up: bool
    addresses: tuple[InterfaceAddress, ...]


class Reach(NamedTuple):
    """How the kernel would send to an address; `gateway` is None on a directly connected one."""

    name: str
    source: IPv4Address | None
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The underlay interface, its MTU in bytes, the address to send from, and why this one."""

    name: str
    index: int
    mtu: int
    address: IPv4Address
    why: str


class _Mismatch(Exception):
    """One way of choosing led nowhere; `str()` is a clause that says why."""


def choose_interface(
    interfaces: Sequence[Interface],
    *,
    names: Sequence[str],
    regexes: Sequence[str],
    can_reach: IPv4Address | None,
    public_ip: IPv4Address | None,
    default_route_name: str | None,
    reach: Callable[[IPv4Address], Reach | None],
) -> Choice:
    """Choose the underlay interface as flannel does (spec section 10); Refusal when none fits.

    `interfaces` are in kernel order. `names` hold interface names or addresses (`--iface`);
    `reach` is the kernel's route lookup, None where there is no route.
    """
    if not names and not regexes and can_reach is None:
        try:
            if public_ip is not None:
                return _by_address(interfaces, public_ip, f"has --public-ip={public_ip}")
            return _by_default_route(interfaces, default_route_name)
        except _Mismatch as mismatch:
            raise Refusal(
                f"no interface for the underlay: {mismatch}; name one with --iface"
            ) from None

    mismatches: list[str] = []
    for attempt in _attempts(interfaces, names, regexes, can_reach, reach):
        try:
            return attempt()
        except _Mismatch as mismatch:
            logger.info("Interface selection: %s", mismatch)
            mismatches.append(str(mismatch))
    raise Refusal(
        f"no interface for the underlay: {'; '.join(mismatches)} "
        f"(this host has {_inventory(interfaces)}); correct --iface, --iface-regex or "
        "--iface-can-reach"
    )


def _attempts(
    interfaces: Sequence[Interface],
    names: Sequence[str],
    regexes: Sequence[str],
    can_reach: IPv4Address | None,
    reach: Callable[[IPv4Address], Reach | None],
) -> Iterator[Callable[[], Choice]]:
    for name in names:
        yield partial(_by_name_or_address, interfaces, name)
    for regex in regexes:
        yield partial(_by_regex, interfaces, regex)
    if can_reach is not None:
        yield partial(_by_reach, interfaces, can_reach, reach)


def _by_default_route(interfaces: Sequence[Interface], default_route_name: str | None) -> Choice:
    if default_route_name is None:
        raise _Mismatch("this host has no IPv4 default route")
    interface = _named(interfaces, default_route_name)
    return _choice(interface, None, "carries the IPv4 default route")


def _by_name_or_address(interfaces: Sequence[Interface], name: str) -> Choice:
    try:
        address = IPv4Address(name)
    except ValueError:
        return _choice(_named(interfaces, name), None, f"is named by --iface={name}")
    return _by_address(interfaces, address, f"has the address of --iface={name}")


def _by_address(interfaces: Sequence[Interface], address: IPv4Address, why: str) -> Choice:
    for interface in interfaces:
        if any(owned.address == address for owned in interface.addresses):
            return _choice(interface, address, why)
    raise _Mismatch(f"no interface has the address {address}")


def _by_regex(interfaces: Sequence[Interface], regex: str) -> Choice:
    why = f"matches --iface-regex={regex}"
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise Refusal(f"--iface-regex={regex} is not a regular expression: {error}") from None
    for interface in interfaces:
        for address in _usable_addresses(interface):
            if pattern.search(str(address)):
                return _choice(interface, address, f"{why} with its address {address}")
    for interface in interfaces:
        if pattern.search(interface.name):
            return _choice(interface, None, f"{why} with its name")
    raise _Mismatch(f"--iface-regex={regex} matches no address and no name of an interface")


def _by_reach(
    interfaces: Sequence[Interface],
    can_reach: IPv4Address,
    reach: Callable[[IPv4Address], Reach | None],
) -> Choice:
    found = reach(can_reach)
    if found is None:
        raise _Mismatch(f"the kernel has no route to --iface-can-reach={can_reach}")
    return _choice(
        _named(interfaces, found.name), found.source, f"reaches --iface-can-reach={can_reach}"
    )


def _named(interfaces: Sequence[Interface], name: str) -> Interface:
    for interface in interfaces:
        if interface.name == name:
            return interface
    raise _Mismatch(f"there is no interface {name}")


def _choice(interface: Interface, address: IPv4Address | None, why: str) -> Choice:
    if interface.mtu == 0:
        raise _Mismatch(f"the MTU of interface {interface.name} is 0")
    if address is not None:
        why += f"; sending from {address}"
    else:
        usable = _usable_addresses(interface)
        if not usable:
            raise _Mismatch(f"interface {interface.name} has no usable IPv4 address")
        address = usable[0]
        count = f"the first of its {len(usable)} usable addresses"
        which = count if len(usable) > 1 else "its only usable address"
        why += f"; sending from {address}, {which}"
    return Choice(interface.name, interface.index, interface.mtu, address, why)


def best_address(interface: Interface) -> IPv4Address | None:
    """Return the address to send from where none is asked for, None if it has none (section 10)."""
    return next(iter(_usable_addresses(interface)), None)


def _usable_addresses(interface: Interface) -> list[IPv4Address]:
    """Candidates, best first: global before link-local, permanent, non-temporary, kernel order."""
    usable = [owned for owned in interface.addresses if _is_usable(owned)]
    usable.sort(
        key=lambda owned: (owned.address.is_link_local, not owned.permanent, owned.temporary)
    )
    return [owned.address for owned in usable]


def _is_usable(owned: InterfaceAddress) -> bool:
    address = owned.address
    return not (
        owned.deprecated
        or address.is_loopback
        or address.is_multicast
        or address.is_unspecified
        or address == _BROADCAST
    )


def _inventory(interfaces: Iterable[Interface]) -> str:
    described = [
        " ".join((interface.name, *(str(owned.address) for owned in interface.addresses)))
        for interface in interfaces
    ]
    return ", ".join(described) or "no interfaces"
