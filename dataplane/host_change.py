"""What a change on the host means for us, and what is to be done about it. Pure.

`concern` sorts the kernel's events, so that a host with much traffic in routes or links costs next
to nothing. `diagnose` compares what we use with what is there now; it looks at the state, never at
the event, so a lost or repeated event does no harm.

 event                              concern
 overrun                            everything
 underlay interface                 UNDERLAY; ROUTES, as the kernel drops the routes of an interface
                                    that goes down without telling
 an address on it, or the one that
 is sent from on another            UNDERLAY, ROUTES
 our device, an address on it       DEVICE, ROUTES
 route to a peer's subnet           ROUTES, unless it was added to our device (we do that)
 another route on our device        nothing
 any other route                    ROUTES, as it may be the way to a peer
 anything else                      nothing
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Flag, auto
from typing import Union

from pyflannel.dataplane.interface import Interface, best_address
from pyflannel.dataplane.route import IPAddress, IPNetwork

TUN_KIND = "tun"


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """A device came, went or is not what it was; `mtu` in bytes."""

    index: int
    name: str
    is_gone: bool
    is_up: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class AddressChanged:
    """A device got or lost an address."""

    index: int
    address: IPAddress
    is_gone: bool


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """A unicast route came or went; `index` is 0 where it names no single device."""

    destination: IPNetwork
    index: int
    is_gone: bool


@dataclass(frozen=True, slots=True)
class Overrun:
    """Changes were lost."""


HostEvent = Union[LinkChanged, AddressChanged, RouteChanged, Overrun]


class Concern(Flag):
    """What must be looked at."""

    NOTHING = 0
    UNDERLAY = auto()
    """The interface that carries the overlay: there, up, address, MTU."""
    DEVICE = auto()
    """Our TUN: there, up, address, MTU."""
    ROUTES = auto()
    """The kernel's routes to the peers' subnets, and the way to each peer that they depend on."""


EVERYTHING = Concern.UNDERLAY | Concern.DEVICE | Concern.ROUTES


@dataclass(frozen=True, slots=True)
class InUse:
    """What one address family's half of the node uses of the host; MTUs in bytes."""

    device: str
    device_index: int
    device_address: IPAddress
    device_mtu: int
    interface: str
    interface_index: int
    interface_mtu: int
    address: IPAddress
    forwards: bool = True
    """Whether packets are moved, or are not to be for now."""


class Repair(Flag):
    """What is to be done."""

    NOTHING = 0
    REOPEN = auto()
    """Make the device again, and all that was on it."""
    RESTART = auto()
    """Forward again on the same device."""
    CONFIGURE = auto()
    """Set the device's address, MTU and state, and its routes."""
    REBIND = auto()
    """Send from the new address, or by the new interface, and tell the peers."""
    RESIZE = auto()
    """Derive the overlay's MTU anew."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Repairs, the underlay to use from now on, and what is amiss that only the host can mend.

    All but the first and the last are what we use already where nothing better is there.
    """

    repair: Repair
    address: IPAddress
    interface: str
    index: int
    mtu: int
    trouble: str = ""


def concern(event: HostEvent, used: InUse, is_peers: Callable[[IPNetwork], bool]) -> Concern:
    """Return what an event makes worth a look; `is_peers` tells a peer's subnet."""
    if isinstance(event, Overrun):
        return EVERYTHING
    if isinstance(event, LinkChanged):
        if event.index == used.interface_index or event.name == used.interface:
            return Concern.UNDERLAY | Concern.ROUTES
        if event.index == used.device_index or event.name == used.device:
            return Concern.DEVICE | Concern.ROUTES
        return Concern.NOTHING
    if isinstance(event, AddressChanged):
        if event.index == used.interface_index or event.address == used.address:
            return Concern.UNDERLAY | Concern.ROUTES
        if event.index == used.device_index:
            return Concern.DEVICE | Concern.ROUTES
        return Concern.NOTHING
    assert isinstance(event, RouteChanged)
    if event.destination.version != used.address.version:
        return Concern.NOTHING
    if event.index != used.device_index or (event.is_gone and is_peers(event.destination)):
        return Concern.ROUTES
    return Concern.NOTHING


def diagnose(used: InUse, interfaces: Collection[Interface]) -> Diagnosis:
    """Compare what is used with all interfaces as they are now."""
    repair = _device_repair(used, next((x for x in interfaces if x.name == used.device), None))
    interface = _underlay(used, interfaces)
    if interface is None:
        return Diagnosis(
            repair,
            used.address,
            used.interface,
            used.interface_index,
            used.interface_mtu,
            trouble=f"the underlay interface {used.interface} is gone",
        )
    address, trouble = used.address, ""
    if not _has(interface, address):
        found = best_address(interface, used.address.version)
        # While an interface is renumbered its link-local address is all it has: none for peers.
        if found is not None and found.is_link_local and not used.address.is_link_local:
            found = None
        address = found or address
        family = f"IPv{used.address.version}"
        trouble = "" if found else f"{interface.name} has no usable {family} address"
    # A socket cannot be bound to an address that is not there.
    now = (address, interface.name, interface.index)
    if not trouble and now != (used.address, used.interface, used.interface_index):
        repair |= Repair.REBIND
    if not interface.up:
        trouble = f"the underlay interface {interface.name} is down"
    if interface.mtu != used.interface_mtu:
        repair |= Repair.RESIZE
    return Diagnosis(
        repair, address, interface.name, interface.index, interface.mtu, trouble=trouble
    )


def _underlay(used: InUse, interfaces: Collection[Interface]) -> Interface | None:
    """Return what has our address, else the interface of the name, else what that was renamed to.

    The address may have moved, as to a bridge of which the interface has become a port. A
    link-local one may be on several, each its own: a VLAN has that of the interface below.
    """
    is_followed = not used.address.is_link_local

    def likeness(interface: Interface) -> tuple[bool, bool, bool]:
        return (
            is_followed and _has(interface, used.address),
            interface.name == used.interface,
            interface.index == used.interface_index,
        )

    return max(filter(lambda x: any(likeness(x)), interfaces), key=likeness, default=None)


def _has(interface: Interface, address: IPAddress) -> bool:
    return any(owned.address == address for owned in interface.addresses)


def _device_repair(used: InUse, device: Interface | None) -> Repair:
    if device is None or device.kind != TUN_KIND or device.index != used.device_index:
        return Repair.REOPEN
    repair = Repair.NOTHING if used.forwards else Repair.RESTART
    if device.up and device.mtu == used.device_mtu and _has(device, used.device_address):
        return repair
    return repair | Repair.CONFIGURE
