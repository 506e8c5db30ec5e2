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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pyflannel import metrics, status
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.family_routes import Place
from pyflannel.control.lease import Lease, config_key
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.control.lease_list import RecentSnapshot, SnapshotReader, read_leases_of
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.lease_writer import OwnIdentity
from pyflannel.control.network_config import NetworkConfig, parse_network_config_untrusted
from pyflannel.control.route_sync import RouteSync
from pyflannel.control.subnet_file import (
    SubnetFile,
    read_previous_networks,
    read_previous_subnet,
    write_subnet_file,
)
from pyflannel.control.vtep_identity import load_vtep_mac, pick_vtep_mac, save_vtep_mac
from pyflannel.control_socket import ControlServer, socket_path
from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.offload import Offload
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, MacAddress
from pyflannel.etcd_access import etcd_client
from pyflannel.health import STARTING, HealthServer, Readiness
from pyflannel.host_watch import HostWatch
from pyflannel.node import Node
from pyflannel.notify import notify, take_kept_descriptors
from pyflannel.options import Options, unserved_flags
from pyflannel.overlay import Overlay
from pyflannel.overlays import Overlays
from pyflannel.pulse import watch_pulse
from pyflannel.reload import follow_config, reload_when_told
from pyflannel.suspects import report_suspects
from pyflannel.takeover import Handover, Predecessor
from pyflannel.traffic import Traffic
from pyflannel.underlying import (
    choose_underlay,
    device_name,
    foresee_refusal,
    remove_idle_devices,
    remove_kernel_device,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
REMIND_EVERY = 60
MACHINE_ID = Path("/etc/machine-id")

T = TypeVar("T")


async def _until_etcd_answers(
    what: str, readiness: Readiness, attempt: Callable[[], Awaitable[T | None]]
) -> T:
    """Repeat a read until it gives something; log why not at once and then every minute."""
    failures = 0
    while True:
        why = "is not there yet"
        try:
            found = await attempt()
            if found is not None:
                readiness.start()
                return found
        except EtcdRejected as error:
            why = f"cannot be read: {error}"
        except EtcdUnavailable as error:
            readiness.start(f"etcd does not answer: {error}")
            continue  # the session logs, and makes the next attempt wait
        readiness.start(f"{what} {why}")
        if failures % REMIND_EVERY == 0:
            log.warning("%s %s; trying again every %.0f s", what, why, RETRY_SECONDS)
        failures += 1
        await asyncio.sleep(RETRY_SECONDS)


def _note_ignored(config: NetworkConfig) -> None:
    if config.backend.learning:
        log.warning("Learning is ignored: peers are known from etcd, so there is nothing to learn")


def _lease_mac(leases: Sequence[Lease], version: int) -> MacAddress | None:
    """Return the first VTEP MAC of a family."""
    for lease in leases:
        part = lease.part(version)
        if part is not None and part.vtep is not None:
            return part.vtep.mac
    return None


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
        self._readiness = self._node.readiness
        self.handover = Handover(self._node)
        self._overlays = Overlays(self._node.overlays)

    async def start_and_run(self) -> None:
        """Bring the node up and keep it up; returns never, raises Refusal."""
        options, stack = self._options, self._stack
        _spare_collector()
        for sentence in unserved_flags(options):
            log.warning("%s", sentence)
        if not options.takeover:
            await self._serve_health(Inheritance())
        node = self._node
        netlink = node.netlink = await stack.enter_async_context(Netlink())
        etcd = node.etcd = etcd_client(options)
        stack.push_async_callback(etcd.close)
        config = node.config = await self._read_config(etcd, netlink)
        path = socket_path(options.control_dir, config.backend.vni)
        predecessor = Predecessor.find(path) if options.takeover else None
        if predecessor is None:
            inherited = Inheritance(take_kept_descriptors(os.environ))
        else:
            stack.callback(predecessor.close)
            inherited = predecessor.inherited
        stack.callback(inherited.close)
        overlays = self._overlays
        in_use = {} if predecessor is None else predecessor.handed.offloads
        recent = RecentSnapshot(etcd, options.etcd_prefix)
        identity = await self._open(recent.read, netlink, config, inherited, in_use)
        if predecessor is None:
            await self._serve_control(path)
        keeper = node.keeper = LeaseKeeper(
            etcd,
            options.etcd_prefix,
            config,
            identity,
            options.subnet_lease_renew_margin * 60,
            random.SystemRandom(),
            self._readiness,
        )
        if options.release_lease_on_exit:
            stack.push_async_callback(keeper.release)
        if predecessor is None:
            lease = await keeper.acquire(recent)
        else:
            lease = predecessor.lease(options.etcd_prefix, config)
            keeper.take_over(lease, predecessor.handed.expires_at)
        table = node.table = LeaseTable(
            [Place(overlay.network, overlay.underlying.public_ip) for overlay in overlays.each],
            config.backend.port,
        )
        table.set_own_subnet(lease.subnet)
        await overlays.adopt(lease.subnet)
        sync = node.sync = RouteSync(etcd, options.etcd_prefix, table, overlays)
        async with overlays.writing_early():
            await sync.first_snapshot(recent.read)
        await overlays.reconcile()

        async def move(public_ip: IPAddress) -> None:
            # A connection from the address that is gone would be found dead after 13 s.
            etcd.reconnect("our address has changed")
            keeper.advertise(public_ip)
            await overlays.apply(table.set_own_public_ip(public_ip))

        watches = [
            HostWatch(
                netlink,
                overlay,
                table,
                self._readiness,
                on_moved=move,
                on_resized=self._write_subnet_file,
            )
            for overlay in overlays.each
        ]
        if predecessor is not None:
            predecessor.stop()
        for overlay, watch in zip(overlays.each, watches):
            overlay.forward(watch.forwarding_ended)
        traffic = Traffic(
            options,
            netlink,
            stack.enter_context(contextlib.ExitStack()),
            nftables=config.enable_nftables,
            old=read_previous_networks(options.subnet_file),
        )
        await traffic.start(overlays.pairs)
        self._write_subnet_file()
        overlays.keep_devices()
        if predecessor is not None:
            predecessor.finish()
            await self._serve_control(path)
            await self._serve_health(inherited)
        # Not before: while we may still fail, a predecessor is at work on them.
        await remove_idle_devices(netlink, config, inherited.devices)
        inherited.close()
        overlays.keep_queues()
        self._readiness.clear(STARTING)
        _spare_collector()
        log.info("Running backend.")
        notify("READY=1")

        async def adopt(own: Lease) -> None:
            await overlays.apply(table.set_own_subnet(own.subnet))
            await overlays.adopt(own.subnet)
            traffic.adopt(overlays.pairs)
            self._write_subnet_file()

        dropped = options.anti_spoofing == "enforce"
        await self._supervise(
            keeper.run(adopt),
            sync.run(),
            traffic.run(),
            watch_pulse(node, os.environ),
            follow_config(node),
            reload_when_told(node, self._read_options, self._hangup),
            *(watch.run() for watch in watches),
            *(x.write_routes() for x in overlays.each),
            *(report_suspects(x.context, table.leases, dropped=dropped) for x in overlays.each),
        )

    async def _open(
        self,
        read: SnapshotReader,
        netlink: Netlink,
        config: NetworkConfig,
        inherited: Inheritance,
        in_use: Mapping[str, Offload],
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
                options, netlink, config, underlying, stack, inherited, in_use.get(name)
            )
            public_ip = each[0].underlying.public_ip if each else underlying.public_ip
            macs.append(await self._own_mac(read, overlay, public_ip, kernel_mac))
            overlay.identify(macs[-1])
            each.append(overlay)
            # Before it is closed, as /metrics is served to the end.
            self._stack.callback(each.remove, overlay)
        public_ips = [overlay.underlying.public_ip for overlay in each]
        return OwnIdentity.of(public_ips, macs, read_previous_subnet(options.subnet_file))

    async def _serve_health(self, inherited: Inheritance) -> None:
        options = self._options
        ports = {options.healthz_port, options.metrics_port} - {0}
        for port in sorted(ports):
            server = HealthServer(
                self._readiness, str(options.healthz_ip), port, lambda: metrics.page(self._node)
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

    async def _read_config(self, etcd: Etcd, netlink: Netlink) -> NetworkConfig:
        key = config_key(self._options.etcd_prefix)

        async def read() -> bytes | None:
            reading = await etcd.get(key)
            return reading.kv.value if reading.kv is not None else None

        async def tell_meanwhile() -> None:
            await asyncio.sleep(RETRY_SECONDS)
            await foresee_refusal(self._options, netlink)

        telling = asyncio.ensure_future(tell_meanwhile())
        try:
            text = await _until_etcd_answers(f"etcd key {key}", self._readiness, read)
        finally:
            telling.cancel()
        config = parse_network_config_untrusted(text)
        _note_ignored(config)
        backend = config.backend
        log.info("Found network config - Backend type: vxlan")
        log.info(
            "VXLAN config: VNI=%d Port=%d GBP=false Learning=%s DirectRouting=%s",
            backend.vni,
            backend.port,
            str(backend.learning).lower(),
            str(backend.direct_routing).lower(),
        )
        return config

    async def _own_mac(
        self,
        read: SnapshotReader,
        overlay: Overlay,
        public_ip: IPAddress,
        kernel_mac: MacAddress | None,
    ) -> MacAddress:
        path = self._options.state_dir / f"{overlay.device}.json"
        machine_id = MACHINE_ID.read_text().strip() if MACHINE_ID.exists() else ""
        stored, lease_mac = load_vtep_mac(path, machine_id), None
        if stored is None and kernel_mac is None:
            own = await _until_etcd_answers(
                "the list of leases in etcd",
                self._readiness,
                lambda: read_leases_of(read, public_ip),
            )
            lease_mac = _lease_mac(own, overlay.version)
        mac, origin = pick_vtep_mac(stored, kernel_mac, lease_mac, os.urandom)
        try:
            save_vtep_mac(path, machine_id, mac)
        except OSError as error:
            raise Refusal(
                f"{path}: cannot keep the VTEP MAC ({error.strerror}); "
                "make the folder writable or choose another with --state-dir"
            ) from error
        log.info("VTEP MAC of %s: %s (%s)", overlay.device, mac, origin)
        return mac

    def _write_subnet_file(self) -> None:
        options, overlays = self._options, self._overlays
        path = options.subnet_file
        mtu = options.flannel_mtu or overlays.mtu
        for overlay in overlays.each:
            if mtu > overlay.underlying.mtu:
                log.warning(
                    "--flannel-mtu %d is above the MTU %d of %s: longer packets do not pass there",
                    mtu,
                    overlay.underlying.mtu,
                    overlay.device,
                )
        try:
            write_subnet_file(path, SubnetFile(overlays.pairs, mtu, options.ip_masq))
        except OSError as error:
            raise Refusal(
                f"{path}: cannot be written ({error.strerror}); choose another with --subnet-file"
            ) from error
        log.info("Wrote subnet file to %s", path)

    async def _supervise(self, *work: Awaitable[None]) -> None:
        """Run until one of the tasks fails; none of them ends by itself."""
        tasks = [asyncio.ensure_future(x) for x in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


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
