"""Which interface of this host carries the underlay, and which of its addresses.

Pure: the interfaces, the default route and the route lookup are parameters. It does not know
netlink, and it does not decide what is *advertised* (`--public-ip` may differ from the address).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, ip_address
from typing import NamedTuple

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress

logger = logging.getLogger(__name__)

_BROADCAST = IPv4Address("255.255.255.255")


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address of an interface, as the kernel reports it.

    `scope` is the kernel's (0 global, 253 link, 254 host). `temporary` is the kernel's flag 0x01,
    which on an IPv4 address means secondary; flannel sorts by it all the same.
    """

    address: IPAddress
    prefixlen: int
    scope: int
    deprecated: bool
    permanent: bool
    temporary: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface with its addresses in kernel order; `mtu` in bytes.

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
    source: IPAddress | None
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The underlay interface, its MTU in bytes, the address to send from, and why this one."""

    name: str
    index: int
    mtu: int
    address: IPAddress
    why: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator said about the underlay; nothing, and the default route decides.

    `names` hold interface names or addresses (`--iface`); `public_ips` are `--public-ip` and
    `--public-ipv6`.
    """

    names: Sequence[str] = ()
    regexes: Sequence[str] = ()
    can_reach: IPAddress | None = None
    public_ips: Sequence[IPAddress] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """What is to choose from: interfaces in kernel order, and what the kernel says of routes.

    `default_routes` names the interface of each family's first default route; `reach` is the
    route lookup, None where there is no route.
    """

    interfaces: Sequence[Interface]
    default_routes: Mapping[int, str]
    reach: Callable[[IPAddress], Reach | None]


class _Mismatch(Exception):
    """One way of choosing led nowhere; `str()` is a clause that says why."""


def choose_interface(host: Host, wish: Wish, versions: Sequence[int] = (4,)) -> tuple[Choice, ...]:
    """Choose the underlay interface as flannel does (spec section 10); Refusal when none fits.

    It is the same one for each of the address families `versions` (4, 6), and has an address of
    each; they come in this order.
    """
    chooser = _Chooser(host, wish, versions)
    if not wish.names and not wish.regexes and wish.can_reach is None:
        try:
            return chooser.by_public_ips() or chooser.by_default_route()
        except _Mismatch as mismatch:
            raise Refusal(
                f"no interface for the underlay: {mismatch}; name one with --iface"
            ) from None

    mismatches: list[str] = []
    for attempt in chooser.attempts():
        try:
            return attempt()
        except _Mismatch as mismatch:
            logger.info("Interface selection: %s", mismatch)
            mismatches.append(str(mismatch))
    raise Refusal(
        f"no interface for the underlay: {'; '.join(mismatches)} "
        f"(this host has {_inventory(host.interfaces)}); correct --iface, --iface-regex or "
        "--iface-can-reach"
    )


class _Chooser:
    """The ways of choosing; each raises _Mismatch when it leads nowhere."""

    def __init__(self, host: Host, wish: Wish, versions: Sequence[int]) -> None:
        self._interfaces = host.interfaces
        self._default_routes = host.default_routes
        self._reach = host.reach
        self._wish = wish
        self._versions = versions
        self._public_ips = [x for x in wish.public_ips if x.version in versions]

    def attempts(self) -> Iterator[Callable[[], tuple[Choice, ...]]]:
        for name in self._wish.names:
            yield partial(self._by_name_or_address, name)
        for regex in self._wish.regexes:
            yield partial(self._by_regex, regex)
        if self._wish.can_reach is not None:
            yield partial(self._by_reach, self._wish.can_reach)

    def by_default_route(self) -> tuple[Choice, ...]:
        for version in self._versions:
            if version not in self._default_routes:
                raise _Mismatch(f"this host has no IPv{version} default route")
        names = [self._default_routes[version] for version in self._versions]
        if len(set(names)) > 1:
            raise _Mismatch(
                f"the IPv4 default route leaves by {names[0]} and the IPv6 one by {names[1]}"
            )
        families = " and ".join(f"IPv{version}" for version in self._versions)
        why = f"carries the {families} default route{'s' if len(names) > 1 else ''}"
        return self._choices(self._named(names[0]), (), why)

    def by_public_ips(self) -> tuple[Choice, ...] | None:
        if not self._public_ips:
            return None
        flags = [
            f"{'--public-ip' if x.version == 4 else '--public-ipv6'}={x}" for x in self._public_ips
        ]
        return self._owning(self._public_ips, f"has {' and '.join(flags)}")

    def _by_name_or_address(self, name: str) -> tuple[Choice, ...]:
        try:
            address = ip_address(name)
        except ValueError:
            return self._choices(self._named(name), (), f"is named by --iface={name}")
        owned = [address]
        if address.version == 4:
            # flannel wants --public-ipv6 on the same interface then, and only then.
            owned += [x for x in self._public_ips if x.version == 6]
        return self._owning(owned, f"has the address of --iface={name}")

    def _owning(self, addresses: Sequence[IPAddress], why: str) -> tuple[Choice, ...]:
        for interface in self._interfaces:
            owned = {x.address for x in interface.addresses}
            if owned.issuperset(addresses):
                return self._choices(interface, addresses, why)
        wanted = " and ".join(str(address) for address in addresses)
        raise _Mismatch(f"no interface has the address {wanted}")

    def _by_regex(self, regex: str) -> tuple[Choice, ...]:
        why = f"matches --iface-regex={regex}"
        try:
            pattern = re.compile(regex)
        except re.error as error:
            raise Refusal(f"--iface-regex={regex} is not a regular expression: {error}") from None
        for interface in self._interfaces:
            found = [
                next((x for x in _usable(interface, version) if pattern.search(str(x))), None)
                for version in self._versions
            ]
            matching = [address for address in found if address is not None]
            if len(matching) == len(self._versions):
                told = " and ".join(str(address) for address in matching)
                return self._choices(interface, matching, f"{why} with its address {told}")
        for interface in self._interfaces:
            if pattern.search(interface.name):
                return self._choices(interface, (), f"{why} with its name")
        raise _Mismatch(f"--iface-regex={regex} matches no address and no name of an interface")

    def _by_reach(self, target: IPAddress) -> tuple[Choice, ...]:
        found = self._reach(target)
        if found is None:
            raise _Mismatch(f"the kernel has no route to --iface-can-reach={target}")
        fixed = () if found.source is None else (found.source,)
        return self._choices(self._named(found.name), fixed, f"reaches --iface-can-reach={target}")

    def _named(self, name: str) -> Interface:
        for interface in self._interfaces:
            if interface.name == name:
                return interface
        raise _Mismatch(f"there is no interface {name}")

    def _choices(
        self, interface: Interface, fixed: Iterable[IPAddress], why: str
    ) -> tuple[Choice, ...]:
        """Choose an interface, with the addresses in `fixed` and else its best of a family."""
        if interface.mtu == 0:
            raise _Mismatch(f"the MTU of interface {interface.name} is 0")
        given: dict[int, IPAddress] = {address.version: address for address in fixed}
        choices = []
        for version in self._versions:
            address = given.get(version)
            usable = _usable(interface, version)
            if address is not None:
                which = ""
            elif usable:
                address = usable[0]
                count = f", the first of its {len(usable)} usable addresses"
                which = count if len(usable) > 1 else ", its only usable address"
            else:
                raise _Mismatch(f"interface {interface.name} has no usable IPv{version} address")
            said = f"{why}; sending from {address}{which}"
            choices.append(Choice(interface.name, interface.index, interface.mtu, address, said))
        return tuple(choices)


def best_address(interface: Interface, version: int) -> IPAddress | None:
    """Return the address to send from where none is asked for, None if it has none (section 10)."""
    return next(iter(_usable(interface, version)), None)


def _usable(interface: Interface, version: int) -> list[IPAddress]:
    """Candidates, best first: global before link-local, permanent, non-temporary, kernel order."""
    usable = [
        owned
        for owned in interface.addresses
        if owned.address.version == version and _is_usable(owned)
    ]
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
