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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyflannel.dataplane.interface import Interface, InterfaceAddress, Reach
from pyflannel.dataplane.kernel_routes import device_index
from pyflannel.dataplane.route import IPNetwork, MacAddress

T = TypeVar("T")

# linux/if_addr.h
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80
# linux/rtnetlink.h
_RT_TABLE_MAIN = 254
_IFF_UP = 1
_LAST_METRIC = 0xFFFFFFFF
# What a route lookup answers for no route and for routes of type unreachable, prohibit, blackhole.
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Link:
    """A network device: `mtu` in bytes; `kind` empty for hardware, `mac` None without Ethernet.

    The vxlan fields, VNI and UDP port, are None for other kinds.
    """

    index: int
    name: str
    kind: str
    mac: MacAddress | None
    mtu: int
    up: bool
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
        vxlan_id=vxlan.get("vxlan_id") if vxlan else None,
        vxlan_port=vxlan.get("vxlan_port") if vxlan else None,
    )


def _address(message: Any) -> InterfaceAddress:
    flags = message.get("flags") or 0
    return InterfaceAddress(
        address=IPv4Address(message.get("local") or message.get("address")),
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
        """Return all interfaces with their IPv4 addresses, in kernel order."""
        return await self.run(self._interfaces)

    def _interfaces(self) -> tuple[Interface, ...]:
        addresses: dict[int, list[InterfaceAddress]] = {}
        for message in self._ipr.get_addr(family=socket.AF_INET):
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

    async def default_route_interface(self) -> str | None:
        """Return the interface of the first IPv4 default route, None where there is none."""
        return await self.run(self._default_route_interface)

    def _default_route_interface(self) -> str | None:
        for route in self._ipr.get_routes(family=socket.AF_INET, table=_RT_TABLE_MAIN):
            if route["dst_len"] == 0 and route.get("oif") is not None:
                return self._name_of(route.get("oif"))
        return None

    def _name_of(self, index: int) -> str:
        return str(self._ipr.get_links(index)[0].get("ifname"))

    async def route_to(self, address: IPv4Address) -> Reach | None:
        """Return how the kernel would send to an address, None where it cannot or must not."""
        return await self.run(self._route_to, address)

    def _route_to(self, address: IPv4Address) -> Reach | None:
        try:
            routes = self._ipr.route("get", dst=str(address))
        except NetlinkError as error:
            if error.code in _NO_WAY:
                return None
            raise
        source, gateway = routes[0].get("prefsrc"), routes[0].get("gateway")
        return Reach(
            self._name_of(routes[0].get("oif")),
            IPv4Address(source) if source else None,
            IPv4Address(gateway) if gateway else None,
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
        address: IPv4Address,
        mtu: int,
        queue_length: int,
        network: IPv4Network,
    ) -> None:
        """Give our device its /32, MTU (bytes) and queue (packets); bring it up (spec section 9.5).

        Other addresses on it inside `network` are removed, after ours is there: with the last
        address of a device the kernel removes its routes. IPv6 router advertisements are ignored.
        """
        await self.run(self._configure_device, name, address, mtu, queue_length, network)

    def _configure_device(
        self, name: str, address: IPv4Address, mtu: int, queue_length: int, network: IPv4Network
    ) -> None:
        index = device_index(name)
        accept_ra = Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra")
        # Read-only inside most containers, where nobody sends advertisements into our TUN either.
        with contextlib.suppress(OSError):
            accept_ra.write_text("0")
        found = [_address(x) for x in self._ipr.get_addr(family=socket.AF_INET, index=index)]
        others = [x for x in found if (x.address, x.prefixlen) != (address, 32)]
        if len(others) == len(found):
            self._ipr.addr("add", index=index, address=str(address), prefixlen=32)
        for other in others:
            if other.address in network:
                self._ipr.addr(
                    "del", index=index, address=str(other.address), prefixlen=other.prefixlen
                )
        self._ipr.link("set", index=index, mtu=mtu, txqlen=queue_length, state="up")

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
        family = socket.AF_INET if subnet.version == 4 else socket.AF_INET6
        try:
            self._ipr.route(
                command, family=family, dst=str(subnet), type="blackhole", priority=_LAST_METRIC
            )
        except NetlinkError as error:
            if error.code != harmless:
                raise
