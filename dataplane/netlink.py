"""Programs and reads the host by netlink: links, addresses, single routes.

pyroute2 in one worker thread, because its asyncio flavour does not run under uvloop; the routes to
peers are `kernel_routes`, which runs in the same thread. It decides nothing.

Every method raises OSError when the kernel says no, ENODEV when the device is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyflannel.dataplane.interface import Interface, InterfaceAddress, Reach
from pyflannel.dataplane.kernel_routes import device_index
from pyflannel.dataplane.route import IPAddress, IPNetwork, MacAddress

T = TypeVar("T")

# linux/if_addr.h
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80
# linux/rtnetlink.h
_RT_TABLE_MAIN, _RTN_UNICAST = 254, 1
_IFF_UP = 1
_LAST_METRIC = 0xFFFFFFFF
# What a route lookup answers for no route and for routes of type unreachable, prohibit, blackhole.
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL)
_LINK = 253
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Link:
    """A network device: `mtu` in bytes; `kind` empty for hardware, `mac` None without Ethernet.

    The vxlan fields, VNI and UDP port, are None for other kinds. `carrier` of a TUN tells whether a
    program holds it.
    """

    index: int
    name: str
    kind: str
    mac: MacAddress | None
    mtu: int
    up: bool
    carrier: bool
    vxlan_id: int | None = None
    vxlan_port: int | None = None


def _link(message: Any) -> Link:
    info = message.get("linkinfo")
    detail = info.get("data") if info else None
    kind = (info.get("kind") if info else None) or ""
    vxlan = detail if kind == "vxlan" else None
    mac = message.get("address")
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=kind,
        mac=MacAddress.parse(mac) if mac and len(mac) == 17 else None,
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & _IFF_UP),
        carrier=bool(message.get("carrier")),
        vxlan_id=vxlan.get("vxlan_id") if vxlan else None,
        vxlan_port=vxlan.get("vxlan_port") if vxlan else None,
    )


def _address(message: Any) -> InterfaceAddress:
    flags = message.get("flags") or 0
    return InterfaceAddress(
        address=ip_address(message.get("local") or message.get("address")),
        prefixlen=message["prefixlen"],
        scope=message["scope"],
        deprecated=bool(flags & _IFA_F_DEPRECATED),
        permanent=bool(flags & _IFA_F_PERMANENT),
        temporary=bool(flags & _IFA_F_TEMPORARY),
    )


class Netlink:
    """An open netlink connection to the namespace it was made in; use as `async with`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "netlink")
        self._ipr: Any = None

    async def __aenter__(self) -> Netlink:
        self._ipr = await self.run(IPRoute)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.run(self._ipr.close)
        self._thread.shutdown()

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run something that blocks in netlink's thread, one after another."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error

    async def interfaces(self) -> tuple[Interface, ...]:
        """Return all interfaces with their addresses, in kernel order."""
        return await self.run(self._interfaces)

    def _interfaces(self) -> tuple[Interface, ...]:
        addresses: dict[int, list[InterfaceAddress]] = {}
        for message in self._ipr.get_addr():
            addresses.setdefault(message["index"], []).append(_address(message))
        links = [_link(message) for message in self._ipr.get_links()]
        return tuple(
            Interface(
                index=link.index,
                name=link.name,
                mtu=link.mtu,
                kind=link.kind,
                up=link.up,
                addresses=tuple(addresses.get(link.index, ())),
            )
            for link in links
        )

    async def default_routes(self) -> Mapping[int, str]:
        """Return the interface of the first default route of each family that has one."""
        return await self.run(self._default_routes)

    def _default_routes(self) -> Mapping[int, str]:
        found: dict[int, str] = {}
        for version, family in _FAMILY.items():
            for route in self._ipr.get_routes(family=family, table=_RT_TABLE_MAIN):
                # An IPv6 route that leads nowhere has an interface all the same.
                if route["dst_len"] == 0 and route["type"] == _RTN_UNICAST and route.get("oif"):
                    found.setdefault(version, self._name_of(route.get("oif")))
        return found

    def _name_of(self, index: int) -> str:
        return str(self._ipr.get_links(index)[0].get("ifname"))

    async def route_to(self, address: IPAddress, source: IPAddress | None = None) -> Reach | None:
        """Return how the kernel would send to an address, None where it cannot or must not.

        `source` is the one to send from, by which rules may choose; None if it is not chosen yet.
        """
        return await self.run(self._route_to, address, source)

    def _route_to(self, address: IPAddress, source: IPAddress | None) -> Reach | None:
        bound = {} if source is None else {"src": str(source)}
        try:
            routes = self._ipr.route("get", dst=str(address), **bound)
        except NetlinkError as error:
            if error.code in _NO_WAY:
                return None
            raise
        chosen, gateway = routes[0].get("prefsrc"), routes[0].get("gateway")
        return Reach(
            self._name_of(routes[0].get("oif")),
            ip_address(chosen) if chosen else source,
            ip_address(gateway) if gateway else None,
        )

    async def link(self, name: str) -> Link | None:
        """Return a device by name, None where there is none."""
        return next((x for x in await self.links() if x.name == name), None)

    async def links(self) -> list[Link]:
        """Return all devices."""
        return await self.run(lambda: [_link(message) for message in self._ipr.get_links()])

    async def vxlan_devices_on_port(self, port: int) -> tuple[str, ...]:
        """Return the names of the kernel vxlan devices that are up on a UDP port."""
        return tuple(x.name for x in await self.links() if x.vxlan_port == port and x.up)

    async def delete_link(self, name: str) -> None:
        """Delete a device; its routes go with it."""
        await self.run(lambda: self._ipr.link("del", index=device_index(name)))

    async def configure_device(
        self,
        name: str,
        address: IPAddress,
        mtu: int,
        queue_length: int,
        network: IPNetwork,
    ) -> None:
        """Give our device its /32 or /128, MTU (bytes) and queue (packets); bring it up.

        Other addresses on it are removed, of IPv4 those inside `network`, of IPv6 all but the
        link-local ones (spec section 9.5), after ours is there: with the last address of a device
        the kernel removes its routes. IPv6 router advertisements are ignored.
        """
        await self.run(self._configure_device, name, address, mtu, queue_length, network)

    def _configure_device(
        self, name: str, address: IPAddress, mtu: int, queue_length: int, network: IPNetwork
    ) -> None:
        index = device_index(name)
        # First, as a device whose MTU is below 1280 has no IPv6 at all.
        self._ipr.link("set", index=index, mtu=mtu, txqlen=queue_length)
        accept_ra = Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra")
        # Read-only inside most containers, where nobody sends advertisements into our TUN either.
        with contextlib.suppress(OSError):
            accept_ra.write_text("0")
        family, length = _FAMILY[address.version], address.max_prefixlen
        found = [_address(x) for x in self._ipr.get_addr(family=family, index=index)]
        others = [x for x in found if (x.address, x.prefixlen) != (address, length)]
        if len(others) == len(found):
            self._ipr.addr("add", index=index, address=str(address), prefixlen=length)
        for other in others:
            if other.address in network or (address.version == 6 and other.scope != _LINK):
                self._ipr.addr(
                    "del", index=index, address=str(other.address), prefixlen=other.prefixlen
                )
        self._ipr.link("set", index=index, state="up")

    async def ensure_blackhole(self, subnet: IPNetwork) -> None:
        """Have a blackhole route for a subnet, behind every other route to it.

        flannel's has the metric of a bridge's own route: where it is there first, the kernel puts
        the bridge's behind it and no container is reached any more (seen on Linux 6.18).
        """
        await self.run(self._blackhole, "add", subnet, errno.EEXIST)

    async def remove_blackhole(self, subnet: IPNetwork) -> None:
        """Remove that route, if it is there."""
        await self.run(self._blackhole, "del", subnet, errno.ESRCH)

    def _blackhole(self, command: str, subnet: IPNetwork, harmless: int) -> None:
        family = _FAMILY[subnet.version]
        try:
            self._ipr.route(
                command, family=family, dst=str(subnet), type="blackhole", priority=_LAST_METRIC
            )
        except NetlinkError as error:
            if error.code != harmless:
                raise
