"""Composes the two planes: start order, READY, supervision, shutdown.

Start: configuration from etcd -> interface -> leftover kernel device -> sockets, TUN -> own lease
-> address, MTU -> FIB and routes of the first snapshot -> forwarding -> traffic rules -> subnet.env
-> leftover TUN -> READY. Each step pushes its undo; leaving is this list read backwards. Like
flannel we leave the device, its address and routes, the rules, the lease and subnet.env behind on a
clean exit; a start that fails leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pyflannel.command_line.options import Options, unserved_flags
from pyflannel.control.etcd import Etcd
from pyflannel.control.family_routes import Place
from pyflannel.control.lease import Lease
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.control.lease_list import RecentSnapshot, SnapshotReader
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.lease_writer import OwnIdentity
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.patience import until_one_ends
from pyflannel.control.route_sync import RouteSync
from pyflannel.control.subnet_file import (
    SubnetFile,
    read_previous_networks,
    read_previous_subnet,
    write_subnet_file,
)
from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress
from pyflannel.etcd_access import etcd_client
from pyflannel.management.control_socket import ControlServer, socket_path
from pyflannel.management.health import STARTING, HealthServer
from pyflannel.management.notify import notify
from pyflannel.node import metrics, status
from pyflannel.node.first_reads import read_config
from pyflannel.node.host_watch import HostWatch
from pyflannel.node.overlay import Overlay
from pyflannel.node.overlays import Overlays
from pyflannel.node.parts import Node
from pyflannel.node.predecessor import NoPredecessor, Predecessor
from pyflannel.node.pulse import watch_pulse
from pyflannel.node.reload import follow_config, reload_when_told
from pyflannel.node.suspects import report_suspects
from pyflannel.node.takeover import Handover
from pyflannel.node.traffic import Traffic
from pyflannel.node.underlying import (
    choose_underlay,
    device_name,
    remove_idle_devices,
    remove_kernel_device,
)
from pyflannel.node.vtep_mac import own_vtep_mac

log = logging.getLogger(__name__)

SUBNET_FILE = "subnet-file"
SUBNET_FILE_SECONDS = 1.0


def _spare_collector() -> None:
    """Leave what is there now out of garbage collection, as it stays.

    Looking through the modules and 10,000 leases again and again would stop us for 0.1 s each time.
    """
    gc.freeze()


class Daemon:
    """One node of one network, from start to exit."""

    def __init__(
        self,
        options: Options,
        read_options: Callable[[], Options],
        hangup: asyncio.Event,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._options = options
        self._read_options = read_options
        self._hangup = hangup
        self._stack = stack
        self._node = Node(options)
        self.handover = Handover(self._node)
        self._overlays = Overlays(self._node.overlays)
        self._subnet_file_due = asyncio.Event()

    async def start_and_run(self) -> None:
        """Bring the node up and keep it up; returns never, raises Refusal."""
        options, node, stack, overlays = self._options, self._node, self._stack, self._overlays
        _spare_collector()
        for sentence in unserved_flags(options):
            log.warning("%s", sentence)
        if not options.takeover:
            await self._serve_health(Inheritance())
        netlink = node.netlink = await stack.enter_async_context(Netlink())
        etcd = node.etcd = etcd_client(options)
        stack.push_async_callback(etcd.close)
        config = node.config = await read_config(etcd, netlink, options, node.readiness)
        path = socket_path(options.control_dir, config.backend.vni)
        before = self._find_predecessor(path, config)
        recent = RecentSnapshot(etcd, options.etcd_prefix)
        identity = await self._open(recent.read, netlink, config, before)
        if not options.takeover:
            await self._serve_control(path)
        keeper = node.keeper = self._keeper(etcd, config, identity)
        lease = await before.lease(keeper, recent)
        table = node.table = LeaseTable(
            [
                Place(overlay.network, overlay.underlying.public_ip, mac)
                for overlay, mac in zip(overlays.each, identity.macs)
            ],
            config.backend.port,
        )
        table.set_own_subnet(lease.subnet)
        await overlays.adopt(lease.subnet)
        sync = node.sync = RouteSync(etcd, options.etcd_prefix, table, overlays)
        async with overlays.writing_early():
            await sync.first_snapshot(recent.read)
            await overlays.apply(table.keep(before.beyond_etcd(), time.monotonic()))
        await overlays.reconcile()
        watches = [
            HostWatch(
                netlink,
                overlay,
                table,
                node.readiness,
                on_moved=partial(self._move, etcd, keeper, table),
                on_resized=self._subnet_file_due.set,
            )
            for overlay in overlays.each
        ]
        before.stop()
        for overlay, watch in zip(overlays.each, watches):
            overlay.forward(watch.forwarding_ended)
        traffic = await self._write_rules(netlink, config)
        self._write_subnet_file()
        overlays.keep_devices()
        before.finish()
        if options.takeover:
            await self._serve_control(path)
            await self._serve_health(before.inherited)
        # Not before: while we may still fail, a predecessor is at work on them.
        await remove_idle_devices(netlink, config, before.inherited.devices)
        before.close()
        overlays.keep_queues()
        node.readiness.clear(STARTING)
        _spare_collector()
        log.info("Running backend.")
        notify("READY=1")
        dropped = options.anti_spoofing == "enforce"
        await until_one_ends(
            keeper.run(partial(self._adopt, table, traffic)),
            sync.run(),
            traffic.run(),
            self._keep_subnet_file(),
            watch_pulse(node, os.environ),
            follow_config(node),
            reload_when_told(node, self._read_options, self._hangup),
            *(watch.run() for watch in watches),
            *(x.write_routes() for x in overlays.each),
            *(report_suspects(x.context, table.leases, dropped=dropped) for x in overlays.each),
        )

    def _find_predecessor(self, path: Path, config: NetworkConfig) -> Predecessor | NoPredecessor:
        found = (
            Predecessor.find(path, self._options.etcd_prefix, config)
            if self._options.takeover
            else NoPredecessor()
        )
        self._stack.callback(found.close)
        return found

    async def _open(
        self,
        read: SnapshotReader,
        netlink: Netlink,
        config: NetworkConfig,
        before: Predecessor | NoPredecessor,
    ) -> OwnIdentity:
        """Open the overlay of each family; return who we are to the others."""
        options, each = self._options, self._overlays.each
        macs = []
        for underlying in await choose_underlay(options, netlink, config):
            name = device_name(underlying.version, config.backend.vni)
            kernel_mac = await remove_kernel_device(
                name, netlink, replace=options.replace_kernel_device
            )
            stack = self._stack.enter_context(contextlib.ExitStack())
            overlay = await Overlay.open(
                options,
                netlink,
                config,
                underlying,
                stack,
                before.inherited,
                before.offloads.get(name),
            )
            public_ip = each[0].underlying.public_ip if each else underlying.public_ip
            macs.append(await own_vtep_mac(self._node, overlay, kernel_mac, read, public_ip))
            overlay.identify(macs[-1])
            each.append(overlay)
            # Before it is closed, as /metrics is served to the end.
            self._stack.callback(each.remove, overlay)
        public_ips = [overlay.underlying.public_ip for overlay in each]
        return OwnIdentity.of(public_ips, macs, read_previous_subnet(options.subnet_file))

    def _keeper(self, etcd: Etcd, config: NetworkConfig, identity: OwnIdentity) -> LeaseKeeper:
        options = self._options
        keeper = LeaseKeeper(
            etcd,
            options.etcd_prefix,
            config,
            identity,
            options.subnet_lease_renew_margin * 60,
            random.SystemRandom(),
            self._node.readiness,
        )
        if options.release_lease_on_exit:
            self._stack.push_async_callback(keeper.release)
        return keeper

    async def _write_rules(self, netlink: Netlink, config: NetworkConfig) -> Traffic:
        traffic = Traffic(
            self._options,
            netlink,
            self._stack.enter_context(contextlib.ExitStack()),
            nftables=config.enable_nftables,
            old=read_previous_networks(self._options.subnet_file),
        )
        await traffic.start(self._overlays.pairs)
        return traffic

    async def _move(
        self, etcd: Etcd, keeper: LeaseKeeper, table: LeaseTable, public_ip: IPAddress
    ) -> None:
        # A connection from the address that is gone would be found dead after 13 s.
        etcd.reconnect("our address has changed")
        keeper.advertise(public_ip)
        await self._overlays.apply(table.set_own_public_ip(public_ip))

    async def _adopt(self, table: LeaseTable, traffic: Traffic, own: Lease) -> None:
        await self._overlays.apply(table.set_own_subnet(own.subnet))
        try:
            await self._overlays.adopt(own.subnet)
        except Refusal as error:
            log.warning("%s; it is tried again as soon as the host has changed", error)
        traffic.adopt(self._overlays.pairs)
        self._subnet_file_due.set()

    async def _serve_health(self, inherited: Inheritance) -> None:
        options, readiness = self._options, self._node.readiness
        ports = {options.healthz_port, options.metrics_port} - {0}
        for port in sorted(ports):
            server = HealthServer(
                readiness, str(options.healthz_ip), port, lambda: metrics.page(self._node)
            )
            await server.start(inherited)
            self._stack.push_async_callback(server.close)
            self.handover.listeners.append(server.fd)

    async def _serve_control(self, path: Path) -> None:
        requests = {**status.requests(self._node), **self.handover.requests}
        server = ControlServer(path, requests)
        await server.start(replace=self._options.takeover)

        async def close() -> None:
            await server.close(keep=self.handover.done.is_set())

        self._stack.push_async_callback(close)

    async def _keep_subnet_file(self) -> None:
        """Write it anew when our subnet or MTU has changed, for ever; a full disk is waited for."""
        while True:
            await self._subnet_file_due.wait()
            self._subnet_file_due.clear()
            try:
                self._write_subnet_file()
            except Refusal as error:
                self._node.readiness.set(
                    SUBNET_FILE, f"{error}; trying again, until then it tells what was before"
                )
                self._subnet_file_due.set()
                await asyncio.sleep(SUBNET_FILE_SECONDS)
            else:
                self._node.readiness.clear(SUBNET_FILE)

    def _write_subnet_file(self) -> None:
        options, overlays = self._options, self._overlays
        path = options.subnet_file
        mtu = options.flannel_mtu or overlays.mtu
        try:
            write_subnet_file(path, SubnetFile(overlays.pairs, mtu, options.ip_masq))
        except OSError as error:
            raise Refusal(
                f"{path}: cannot be written ({error.strerror}); choose another with --subnet-file"
            ) from error
        for overlay in overlays.each:
            if mtu > overlay.underlying.mtu:
                log.warning(
                    "--flannel-mtu %d is above the MTU %d of %s: longer packets do not pass there",
                    mtu,
                    overlay.underlying.mtu,
                    overlay.device,
                )
        log.info("Wrote subnet file to %s", path)


async def run(options: Options, read_options: Callable[[], Options]) -> int:
    """Run the node until SIGTERM or SIGINT; return the exit code.

    At SIGHUP `read_options` reads the options anew.
    """
    loop = asyncio.get_running_loop()
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        daemon = Daemon(options, read_options, hangup, stack)
        running = asyncio.ensure_future(daemon.start_and_run())
        ends = [asyncio.ensure_future(x.wait()) for x in (stop, daemon.handover.done)]
        await asyncio.wait([running, *ends], return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if running.done():
            running.result()
        if not daemon.handover.done.is_set():
            notify("STOPPING=1")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        log.info("Exiting cleanly...")
    return 0
