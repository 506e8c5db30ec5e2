"""Composes the two planes: start order, READY, supervision, shutdown.

Start: configuration from etcd -> interface -> leftover kernel device -> sockets, TUN -> own lease
-> address, MTU -> FIB and routes of the first snapshot -> forwarding -> traffic rules -> subnet.env
-> READY. Each step pushes its undo; leaving is this list read backwards. Like flannel we leave the
device, its address and routes, the rules, the lease and subnet.env behind on a clean exit; a start
that fails leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

from pyflannel import metrics, status
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.family_routes import Place
from pyflannel.control.lease import Lease, config_key
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.control.lease_list import read_leases
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
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, MacAddress
from pyflannel.etcd_access import etcd_client
from pyflannel.health import HealthServer
from pyflannel.host_watch import HostWatch
from pyflannel.node import Node
from pyflannel.notify import notify, take_kept_descriptors
from pyflannel.options import Options, unserved_flags
from pyflannel.overlay import Overlay, choose_underlay, remove_kernel_device
from pyflannel.pulse import watch_pulse
from pyflannel.reload import follow_config, reload_when_told
from pyflannel.suspects import report_suspects
from pyflannel.takeover import Handover, Predecessor
from pyflannel.traffic import Traffic

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
REMIND_EVERY = 60
MACHINE_ID = Path("/etc/machine-id")

T = TypeVar("T")


async def _until_etcd_answers(what: str, attempt: Callable[[], Awaitable[T | None]]) -> T:
    """Repeat a read until it gives something; say why not at once and then every minute."""
    failures = 0
    while True:
        why = "is not there yet"
        try:
            found = await attempt()
            if found is not None:
                return found
        except EtcdRejected as error:
            why = f"cannot be read: {error}"
        except EtcdUnavailable:
            continue  # the session tells, and makes the next attempt wait
        if failures % REMIND_EVERY == 0:
            log.warning("%s %s; trying again every %.0f s", what, why, RETRY_SECONDS)
        failures += 1
        await asyncio.sleep(RETRY_SECONDS)


def _check_supported(config: NetworkConfig, key: str) -> None:
    if config.ipv6 is not None:
        raise Refusal(
            f"{key}: EnableIPv6 true: this version carries IPv4 only; set EnableIPv6 to false"
        )
    if config.backend.learning:
        log.warning("Learning is ignored: peers are known from etcd, so there is nothing to learn")


def _lease_mac(leases: Sequence[Lease], public_ip: IPv4Address) -> MacAddress | None:
    for lease in leases:
        if lease.attributes.public_ip == public_ip and lease.attributes.vtep is not None:
            return lease.attributes.vtep.mac
    return None


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

    async def start_and_run(self) -> None:
        """Bring the node up and keep it up; returns never, raises Refusal."""
        options, stack = self._options, self._stack
        for sentence in unserved_flags(options):
            log.warning("%s", sentence)
        if not options.takeover:
            await self._serve_health(Inheritance())
        node = self._node
        etcd = node.etcd = etcd_client(options)
        stack.push_async_callback(etcd.close)
        config = node.config = await self._read_config(etcd)
        path = socket_path(options.control_dir, config.backend.vni)
        predecessor = Predecessor.find(path) if options.takeover else None
        if predecessor is None:
            inherited, in_use = Inheritance(take_kept_descriptors(os.environ)), None
        else:
            stack.callback(predecessor.close)
            inherited, in_use = predecessor.inherited, predecessor.handed.offload
        stack.callback(inherited.close)
        netlink = node.netlink = await stack.enter_async_context(Netlink())
        underlying = await choose_underlay(options, netlink, config)
        device = f"flannel.{config.backend.vni}"
        kernel_mac = await remove_kernel_device(
            device, netlink, replace=options.replace_kernel_device
        )
        overlay = await Overlay.open(
            options,
            netlink,
            config,
            underlying,
            stack.enter_context(contextlib.ExitStack()),
            inherited,
            in_use,
        )
        mac = await self._own_mac(etcd, device, underlying.public_ip, kernel_mac)
        overlay.identify(mac)
        node.overlays.append(overlay)
        stack.callback(node.overlays.clear)
        if predecessor is None:
            await self._serve_control(path)
        keeper = node.keeper = LeaseKeeper(
            etcd,
            options.etcd_prefix,
            config,
            OwnIdentity(underlying.public_ip, mac, read_previous_subnet(options.subnet_file)),
            options.subnet_lease_renew_margin * 60,
            random.SystemRandom(),
            self._readiness,
        )
        if options.release_lease_on_exit:
            stack.push_async_callback(keeper.release)
        if predecessor is None:
            lease = await keeper.acquire()
        else:
            lease = predecessor.lease(options.etcd_prefix, config)
            keeper.take_over(lease, predecessor.handed.expires_at)
        network = config.ipv4.network
        table = node.table = LeaseTable([Place(network, underlying.public_ip)], config.backend.port)
        table.set_own_subnet(lease.subnet)
        await overlay.adopt(lease.subnet.ipv4)
        sync = node.sync = RouteSync(etcd, options.etcd_prefix, table, overlay)
        await sync.first_snapshot()
        await overlay.reconcile(table.routes())

        async def move(public_ip: IPAddress) -> None:
            # A connection from the address that is gone would be found dead after 13 s.
            etcd.reconnect("our address has changed")
            keeper.advertise(public_ip)
            await overlay.apply(table.set_own_public_ip(public_ip))

        watch = HostWatch(
            netlink,
            overlay,
            table,
            self._readiness,
            on_moved=move,
            on_resized=lambda: self._write_subnet_file(config, overlay),
        )
        if predecessor is not None:
            predecessor.stop()
        overlay.forward(watch.device_lost)
        traffic = Traffic(
            options,
            netlink,
            stack.enter_context(contextlib.ExitStack()),
            nftables=config.enable_nftables,
            old=read_previous_networks(options.subnet_file),
        )
        await traffic.start([(network, lease.subnet.ipv4)])
        self._write_subnet_file(config, overlay)
        overlay.keep_device()
        if predecessor is not None:
            predecessor.finish()
            await self._serve_control(path)
            await self._serve_health(inherited)
        inherited.close()
        overlay.keep_queues()
        self._readiness.clear("starting")
        notify("READY=1")
        log.info("Running backend.")

        async def adopt(own: Lease) -> None:
            await overlay.apply(table.set_own_subnet(own.subnet))
            await overlay.adopt(own.subnet.ipv4)
            traffic.adopt([(network, own.subnet.ipv4)])
            self._write_subnet_file(config, overlay)

        await self._supervise(
            keeper.run(adopt),
            sync.run(),
            traffic.run(),
            watch.run(),
            watch_pulse(node, os.environ),
            follow_config(node),
            reload_when_told(node, self._read_options, self._hangup),
            report_suspects(
                overlay.context, table.leases, dropped=options.anti_spoofing == "enforce"
            ),
        )

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

    async def _read_config(self, etcd: Etcd) -> NetworkConfig:
        key = config_key(self._options.etcd_prefix)

        async def read() -> bytes | None:
            reading = await etcd.get(key)
            return reading.kv.value if reading.kv is not None else None

        text = await _until_etcd_answers(f"etcd key {key}", read)
        config = parse_network_config_untrusted(text)
        _check_supported(config, key)
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
        self, etcd: Etcd, device: str, public_ip: IPv4Address, kernel_mac: MacAddress | None
    ) -> MacAddress:
        path = self._options.state_dir / f"{device}.json"
        machine_id = MACHINE_ID.read_text().strip() if MACHINE_ID.exists() else ""
        found = await _until_etcd_answers(
            "the list of leases in etcd", lambda: read_leases(etcd, self._options.etcd_prefix)
        )
        mac, origin = pick_vtep_mac(
            load_vtep_mac(path, machine_id),
            kernel_mac,
            _lease_mac(found.leases, public_ip),
            os.urandom,
        )
        try:
            save_vtep_mac(path, machine_id, mac)
        except OSError as error:
            raise Refusal(
                f"{path}: cannot keep the VTEP MAC ({error.strerror}); "
                "make the folder writable or choose another with --state-dir"
            ) from error
        log.info("VTEP MAC %s (%s)", mac, origin)
        return mac

    def _write_subnet_file(self, config: NetworkConfig, overlay: Overlay) -> None:
        path = self._options.subnet_file
        pairs = ((config.ipv4.network, overlay.subnet),)
        content = SubnetFile(pairs, overlay.underlying.mtu, self._options.ip_masq)
        try:
            write_subnet_file(path, content)
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
