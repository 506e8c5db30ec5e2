"""One address family's half of the node: device, sockets, FIB and the kernel's routes.

It brings the data plane up step by step and applies route changes to both tables. It does not know
etcd: which subnet is ours and which routes there are is the daemon's business.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pyflannel.command_line.options import Options
from pyflannel.control.network_config import NetworkConfig
from pyflannel.dataplane import sysctl
from pyflannel.dataplane.fastpath import (
    AntiSpoofing,
    Context,
    Counters,
    FastpathConfig,
    Schedule,
    WorkerIo,
)
from pyflannel.dataplane.forwarder import Forwarder, Workers
from pyflannel.dataplane.host_change import InUse
from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.kernel_routes import DirectRouting, PeerRoutes
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.offload import TUN_OFFLOADS, Offload
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import (
    Delete,
    IPAddress,
    IPNetwork,
    MacAddress,
    Replace,
    RouteChange,
)
from pyflannel.dataplane.tun import Tun
from pyflannel.dataplane.underlay import RECEIVE_BUFFER_BYTES, Underlay
from pyflannel.management.notify import keep_descriptors
from pyflannel.node.route_writer import RouteWriter
from pyflannel.node.underlying import (
    OVERHEAD_BYTES,
    Underlying,
    device_name,
    foresee_refusal,
    overlay_mtu,
    told_address,
)

log = logging.getLogger(__name__)

RECEIVE_BUFFER, TUN_QUEUE = "receive_buffer", "tun_queue"
KERNEL_DROPS = (RECEIVE_BUFFER, TUN_QUEUE)
"""Drop reasons beside the fast path's: what the kernel dropped that we were to receive, or read."""


def small_buffer_warning(granted: int) -> str | None:
    """Return the sentence about receive buffers, in bytes, that hold less than they should."""
    if granted >= RECEIVE_BUFFER_BYTES:
        return None
    return (
        f"receive buffers hold {granted >> 10} KB instead of {RECEIVE_BUFFER_BYTES >> 10}, as in a "
        "user namespace net.core.rmem_max bounds them, so bursts from other nodes are lost; raise "
        f"it on the host and restart: sysctl -w net.core.rmem_max={RECEIVE_BUFFER_BYTES}"
    )


class Overlay:
    """The data plane of one family; opened by `open`, then `identify`, `adopt`, `forward`.

    Leaving the exit stack given to `open` closes it. A device that was made by this start goes
    with it, until `keep_device` is called.
    """

    def __init__(
        self,
        options: Options,
        netlink: Netlink,
        config: NetworkConfig,
        underlying: Underlying,
        tun: Tun,
        underlay: Underlay,
        stack: contextlib.ExitStack,
    ) -> None:
        self.underlying = underlying
        self.device = tun.name
        self.version = underlying.version
        subnets = next(x for x in config.ranges if x.network.version == self.version)
        self.network = subnets.network
        self._options = options
        self._netlink = netlink
        self._config = config
        self._tun = tun
        self._underlay = underlay
        self._stack = stack
        stack.callback(self._close_tun)
        self._undo = stack.enter_context(contextlib.ExitStack())
        if tun.created:
            self._undo.callback(tun.delete)
        self._device_index = socket.if_nametoindex(tun.name)
        self._subnet: IPNetwork | None = None
        self._context: Context | None = None
        self._forwarder: Forwarder | None = None
        self._is_paused = False
        self._peer_routes = PeerRoutes(
            tun.name,
            DirectRouting(subnets.network, subnets.length)
            if config.backend.direct_routing
            else None,
            mtu=underlying.mtu,
            overhead=OVERHEAD_BYTES[self.version],
            source=underlying.choice.address,
        )
        self._route_writer = RouteWriter(
            tun.name, netlink, self._peer_routes, lambda subnet: self.context.delete(subnet)
        )

    @classmethod
    async def open(
        cls,
        options: Options,
        netlink: Netlink,
        config: NetworkConfig,
        underlying: Underlying,
        stack: contextlib.ExitStack,
        inherited: Inheritance,
        in_use: Offload | None,
    ) -> Overlay:
        """Open the sockets and the TUN, or take them from `inherited`; Refusal when it cannot be.

        `in_use` are the offloads of the process that still uses what is inherited, None without.
        """
        backend = config.backend
        underlay = Underlay.open(
            underlying.choice.name,
            underlying.choice.address,
            backend.port,
            options.source_ports,
            vxlan_devices=await netlink.vxlan_devices_on_port(backend.port),
            offload=options.offload if in_use is None else in_use,
            inherited=inherited,
        )
        stack.callback(underlay.close)
        name = device_name(underlying.version, backend.vni)
        queues = inherited.take_tun(name)
        if queues and in_use is not None:
            tun = Tun.adopt(name, queues, in_use & TUN_OFFLOADS, in_use=True)
        elif queues:
            tun = Tun.adopt(name, queues, options.offload)
        else:
            tun = Tun.open(name, options.tun_queues, options.offload)
        return cls(options, netlink, config, underlying, tun, underlay, stack)

    def _close_tun(self) -> None:
        self._tun.close()

    def descriptors(self) -> list[int]:
        """Return all that a successor needs to go on where we stop."""
        underlay = self._underlay
        return [*self._tun.fds, underlay.lock_fd, *underlay.receive_fds, *underlay.send_fds]

    def keep_queues(self) -> None:
        """Have the supervisor keep what packets queue in, so that they do while we are away.

        Not what it gave to us or to our predecessor: it has that.
        """
        if not self._tun.is_adopted:
            keep_descriptors(self.device, self._tun.fds)
        if not self._underlay.is_adopted:
            keep_descriptors(self.device, self._underlay.receive_fds)

    @property
    def subnet(self) -> IPNetwork:
        """Our subnet; only after `adopt`."""
        assert self._subnet is not None
        return self._subnet

    @property
    def in_use(self) -> InUse:
        """What of the host is used; only after `adopt`."""
        choice = self.underlying.choice
        return InUse(
            device=self.device,
            device_index=self._device_index,
            device_address=self.subnet.network_address,
            device_mtu=self.underlying.mtu,
            interface=choice.name,
            interface_index=choice.index,
            interface_mtu=choice.mtu,
            address=choice.address,
            forwards=self._forwarder is None or self._is_paused or self._forwarder.is_running,
        )

    @property
    def context(self) -> Context:
        """The fast path; only after `identify`."""
        assert self._context is not None
        return self._context

    @property
    def offload(self) -> Offload:
        """Which work the kernel takes off us."""
        return self._tun.offload | self._underlay.offload

    def counters(self) -> Counters:
        """Return the fast path's, and among the drops what the kernel dropped before it.

        That is counted from when the receive sockets and the device were made, maybe by the process
        before us, and anew after `reopen`.
        """
        counters = self.context.counters()
        kernel = {RECEIVE_BUFFER: self._underlay.drops(), TUN_QUEUE: self._tun.drops()}
        return replace(counters, drops=counters.drops | kernel)

    @property
    def receive_buffer(self) -> int:
        """How many bytes a receive socket was given."""
        return self._underlay.receive_buffer

    @property
    def threads(self) -> int:
        """How many packet threads are at work."""
        return 0 if self._forwarder is None else self._forwarder.threads

    @property
    def silence(self) -> float:
        """For how many seconds packets may have had no turn."""
        return 0.0 if self._forwarder is None else self._forwarder.silence

    def identify(self, mac: MacAddress) -> None:
        """Make the fast path of the node whose VTEP MAC this is; its FIB is empty."""
        options, config = self._options, self._config
        self._context = Context(
            FastpathConfig(
                vni=config.backend.vni,
                mac=mac,
                network=self.network,
                anti_spoofing=AntiSpoofing[options.anti_spoofing.upper()],
                ignore_reserved_bits=options.reserved_bits == "ignore",
                peer_sources=tuple(x for x in options.peer_source if x[0].version == self.version),
                inner_ipv4=self.version == 4,
                inner_ipv6=self.version == 6,
            )
        )
        self._stack.callback(self._context.close)

    async def adopt(self, subnet: IPNetwork) -> None:
        """Give the device the address of our subnet, the MTU and its queue, and bring it up."""
        self._subnet = subnet
        try:
            await self.configure()
        except PermissionError:
            raise Refusal(
                f"setting up {self.device} is not permitted: run as root or with CAP_NET_ADMIN "
                "(docker run --cap-add=NET_ADMIN)"
            ) from None
        except OSError as error:
            raise Refusal(
                f"{self.device}: the kernel refuses address {subnet.network_address} and MTU "
                f"{self.underlying.mtu} ({error.strerror}); check Backend.MTU and "
                f"`ip -d addr show {self.device}`"
            ) from error

    async def configure(self) -> None:
        """Do what `adopt` did once more, after somebody undid it or the MTU has changed."""
        await self._netlink.configure_device(
            self.device,
            self.subnet.network_address,
            self.underlying.mtu,
            self._options.tun_queue_length,
            self.network,
        )

    async def apply(self, changes: Sequence[RouteChange]) -> None:
        """Program our family's changes into the FIB; `write_routes` lets the kernel follow."""
        kernel: dict[IPNetwork, IPAddress | None] = {}
        for change in changes:
            if _subnet(change).version != self.version:
                continue
            if isinstance(change, Replace):
                # Also for a peer that is reached directly: its packets to us may be encapsulated.
                self.context.replace(change.route)
                kernel[change.route.subnet] = change.route.underlay
            else:
                assert isinstance(change, Delete)
                kernel[change.subnet] = None
        self._route_writer.change(kernel)

    def writing_early(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Let the kernel's routes follow `apply` at once, until `reconcile`, where that is safe."""
        return self._route_writer.writing_early()

    async def reconcile(self) -> None:
        """Look at all of the kernel's routes to peers, and make them what the FIB says; with
        DirectRouting look anew at who is on our link.
        """
        await self._route_writer.reconcile()

    async def write_routes(self) -> None:
        """Write the kernel's routes for ever, as the FIB changes."""
        await self._route_writer.run()

    @property
    def refused(self) -> Mapping[IPNetwork, int]:
        """Peers whose route the kernel has refused, with its errno."""
        return self._route_writer.refused

    @property
    def netlink_port(self) -> int:
        """Who the kernel's events name as the author of our changes of routes."""
        return self._peer_routes.port

    def forward(self, on_ended: Callable[[Exception], None]) -> None:
        """Begin to forward; `on_ended` is called when that ends by itself."""
        self._on_ended = on_ended
        self._forwarder = Forwarder(self.context, Workers(self._options.workers), on_ended)
        self._stack.callback(self._forwarder.close)
        forwarding = sysctl.FORWARDING[self.version]
        if sysctl.setting(forwarding) == 0:
            log.warning(
                "this host forwards no IPv%d packets, so only itself is reached, not its "
                "containers: sysctl -w %s=1",
                self.version,
                sysctl.key(forwarding),
            )
        if warning := small_buffer_warning(self.receive_buffer):
            log.warning("%s: %s", self.device, warning)
        self._start()
        log.info(
            "Forwarding on %s with workers %s and offloads %s",
            self.device,
            self._options.workers,
            self.offload,
        )

    def pause(self) -> None:
        """Stop forwarding, as a successor is about to; packets queue meanwhile."""
        assert self._forwarder is not None
        self._forwarder.close()
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`; if the host says no, forwarding has ended by itself."""
        self._is_paused = False
        try:
            self._start()
        except (OSError, Refusal) as error:
            self._on_ended(error)

    def _start(self) -> None:
        assert self._forwarder is not None
        if not self._is_paused:
            self._forwarder.start(self._worker_io())

    def _worker_io(self) -> WorkerIo:
        tun, underlay = self._tun, self._underlay
        return WorkerIo(
            tun=tun.read_fds,
            tun_write=tun.write_fd,
            receive=underlay.receive_fds,
            send=underlay.send_fds,
            offload=self.offload,
            poll_us=self._options.poll_us,
            schedule=Schedule[self._options.sched.upper()],
        )

    def reopen(self) -> None:
        """Make the device anew that somebody deleted; it needs `configure` and its routes then.

        The FIB and the fast path's counters stay. Refusal when the name is somebody else's now.
        """
        assert self._forwarder is not None
        self._forwarder.close()
        # One that was only renamed goes as well.
        with contextlib.suppress(OSError):
            self._tun.delete()
        self._tun = Tun.open(self.device, self._options.tun_queues, self._options.offload)
        self._device_index = socket.if_nametoindex(self.device)
        keep_descriptors(self.device, self._tun.fds)
        self._start()
        log.warning("%s was deleted by somebody: made anew", self.device)

    def restart(self) -> None:
        """Forward again, on the same device, what has queued since it ended by itself."""
        self._start()
        log.warning("forwarding again on %s", self.device)

    async def rebind(self, interface: str, index: int, address: IPAddress) -> None:
        """Send from another address, interface or incarnation of it; what is queued stays."""
        assert self._forwarder is not None
        old = self.underlying.choice
        choice = replace(old, name=interface, index=index, address=address)
        with self._underlay.rebind(choice.name, address):
            self._forwarder.close()
            self._start()
        self._peer_routes.source = address
        self.underlying = replace(
            self.underlying,
            choice=choice,
            public_ip=told_address(self._options, self.version) or address,
        )
        log.warning("sending from %s on %s now", address, interface)
        if interface != old.name:
            await foresee_refusal(self._options, self._netlink, "the next start", self.version)

    def resize(self, outer_mtu: int) -> None:
        """Derive the MTU from the interface's; `configure` sets it. Refusal if it is too small."""
        choice = replace(self.underlying.choice, mtu=outer_mtu)
        mtu = overlay_mtu(choice, self._config)
        self.underlying = replace(self.underlying, choice=choice, mtu=mtu)
        self._peer_routes.mtu = mtu
        log.warning(
            "the MTU of %s is %d, so %d in the overlay; containers keep theirs until a restart",
            choice.name,
            outer_mtu,
            mtu,
        )

    def keep_device(self) -> None:
        """Leave the device behind at exit from now on, as the start has succeeded."""
        self._undo.pop_all()


def _subnet(change: RouteChange) -> IPNetwork:
    return change.subnet if isinstance(change, Delete) else change.route.subnet
