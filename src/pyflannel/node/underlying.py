"""What carries the overlay of each family: interface, address, what peers are told, MTU.

It chooses by what the operator said and the host has, and opens nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass

from pyflannel.command_line.options import Options
from pyflannel.control.network_config import NetworkConfig
from pyflannel.dataplane.interface import Choice, Host, Wish, choose_interface
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, MacAddress, Vni

log = logging.getLogger(__name__)

OVERHEAD_BYTES = {4: 50, 6: 70}
"""Outer IP, UDP, VXLAN and inner Ethernet header by family, counted against the underlay MTU."""

MTU_MIN_BYTES = {4: 68, 6: 1280}
"""The smallest MTU that a device can have (RFC 791; RFC 8200, section 5)."""

_PACKET_MAX_BYTES = 65535
"""The longest IPv4 packet (RFC 791), one byte less than what `lo` takes."""

_DEVICE = {4: "flannel", 6: "flannel-v6"}


def device_name(version: int, vni: Vni) -> str:
    """Return the name of a family's device, the one that flannel gives it."""
    return f"{_DEVICE[version]}.{vni}"


@dataclass(frozen=True, slots=True)
class Underlying:
    """The interface that carries one family's overlay, and the address that peers are told.

    `mtu` is that of packets inside the overlay, in bytes.
    """

    choice: Choice
    public_ip: IPAddress
    mtu: int

    @property
    def version(self) -> int:
        """The address family, 4 or 6."""
        return self.choice.address.version


async def choose_underlay(
    options: Options, netlink: Netlink, config: NetworkConfig
) -> tuple[Underlying, ...]:
    """Choose interface, address and MTU for each family; Refusal when none fits (section 10)."""
    versions = [subnets.network.version for subnets in config.ranges]
    choices = await _choose_interfaces(options, netlink, versions)
    if config.ipv6 is None and options.public_ipv6 is not None:
        log.warning("--public-ipv6 is ignored: the network config does not enable IPv6")
    found = []
    for choice in choices:
        log.info("Using interface with name %s and address %s", choice.name, choice.address)
        told = told_address(options, choice.address.version)
        flag = "--public-ip" if choice.address.version == 4 else "--public-ipv6"
        peers = "the same" if told is None else f"{told} ({flag})"
        log.info("Chose %s: it %s; peers are told %s", choice.name, choice.why, peers)
        if told is None:
            log.info("Defaulting external address to interface address (%s)", choice.address)
        else:
            log.info("Using %s as external address", told)
        for subnets in config.ranges:
            if (told or choice.address) in subnets.network:
                log.warning(
                    "%s lies inside the overlay network %s, so pyflannel-udp on other hosts does "
                    "not use our lease; set another network in etcd, or another --iface or %s",
                    told or choice.address,
                    subnets.network,
                    flag,
                )
        found.append(Underlying(choice, told or choice.address, overlay_mtu(choice, config)))
    return tuple(found)


async def foresee_refusal(options: Options, netlink: Netlink, start: str, version: int = 4) -> None:
    """Warn if no interface fits now, in the family that every network has unless told another.

    `start` says which start would end.
    """
    try:
        await _choose_interfaces(options, netlink, [version])
    except Refusal as error:
        log.warning("unless that changes, %s will end: %s", start, error)


async def _choose_interfaces(
    options: Options, netlink: Netlink, versions: Sequence[int]
) -> Sequence[Choice]:
    reachable = None
    if options.iface_can_reach is not None:
        reachable = await netlink.route_to(options.iface_can_reach)
    told = (told_address(options, 4), told_address(options, 6))
    return choose_interface(
        Host(await netlink.interfaces(), await netlink.default_routes(), lambda _: reachable),
        Wish(
            options.iface,
            options.iface_regex,
            options.iface_can_reach,
            [address for address in told if address is not None],
        ),
        versions,
    )


def told_address(options: Options, version: int) -> IPAddress | None:
    """Return what peers are to be told in a family, None for the address that we send from."""
    return options.public_ip if version == 4 else options.public_ipv6


def overlay_mtu(choice: Choice, config: NetworkConfig) -> int:
    """Return the MTU inside the overlay; Refusal where too little is left (spec section 9.4)."""
    version, outer = choice.address.version, min(choice.mtu, _PACKET_MAX_BYTES)
    if config.backend.mtu is not None:
        if config.backend.mtu > outer:
            log.warning(
                "Backend.MTU %d is above %s's %d; using %d",
                config.backend.mtu,
                choice.name,
                outer,
                outer,
            )
        outer = min(outer, config.backend.mtu)
    mtu = outer - OVERHEAD_BYTES[version]
    if mtu < MTU_MIN_BYTES[version]:
        raise Refusal(
            f"an outer MTU of {outer} leaves {max(mtu, 0)} bytes for packets, and IPv{version} "
            f"needs {MTU_MIN_BYTES[version]}; check Backend.MTU and {choice.name}"
        )
    return mtu


async def remove_kernel_device(
    device: str, netlink: Netlink, *, replace: bool
) -> MacAddress | None:
    """Delete the kernel's vxlan device of our name and return its MAC, None if there is none.

    Refusal unless `replace` (`--replace-kernel-device`), or when the device is of another kind.
    """
    link = await netlink.link(device)
    if link is None or link.kind == "tun":
        return None
    if link.kind != "vxlan":
        raise Refusal(
            f"{device} exists and is a {link.kind} device; remove it: ip link del {device}"
        )
    if not replace:
        raise Refusal(
            f"{device} is a kernel vxlan device left by flanneld and holds our name and UDP port; "
            f"stop flanneld, then `ip link del {device}` or start with --replace-kernel-device"
        )
    await netlink.delete_link(device)
    log.warning("deleted the kernel vxlan device %s (--replace-kernel-device)", device)
    return link.mac


async def remove_idle_devices(
    netlink: Netlink, config: NetworkConfig, inherited: Container[str]
) -> None:
    """Delete what we left for a family that the network has no more, its routes with it.

    A TUN that a program holds stays, unless we inherited its queues. One that nobody holds is
    persistent, or it would be gone.
    """
    used = [subnets.network.version for subnets in config.ranges]
    for version in _DEVICE:
        device = device_name(version, config.backend.vni)
        link = await netlink.link(device) if version not in used else None
        if link is None or link.kind != "tun" or link.mac is not None:  # a TAP has a MAC
            continue
        if link.carrier and device not in inherited:
            continue
        await netlink.delete_link(device)
        log.warning("deleted %s: the network config has no IPv%d now", device, version)
