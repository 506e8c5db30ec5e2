"""Hosts in network namespaces on a switch, with an etcd, our daemon or a kernel flannel node.

    switch  pfu-xxxx-sw   bridge br0 192.168.77.1 (etcd listens here)
              |        |        |
            eth0     eth0     eth0      192.168.77.11, .12, .13
            h1       h2       h3        each with a "container" c1.. behind cni0

In a dual-stack lab the underlay has fd77::/64 as well: fd77::1 and fd77::11, ::12, ::13.

The underlay is wire-sized unless a lab is made with another of UNDERLAYS: segmentation and checksum
offloads of every veth end are off, so frames are MTU-sized and every checksum is real.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface
from pathlib import Path
from types import FrameType
from typing import Any

from pyflannel.dataplane.route import IPAddress
from pyflannel.management.control_socket import ask

ETCD_PORT = 2379
PREFIX = "/coreos.com/network"
# The subnets behind the last are for the peers of a test's own making.
NETWORK = '"Network":"10.244.0.0/16","SubnetMax":"10.244.63.0"'
CONFIG = f'{{{NETWORK},"Backend":{{"Type":"vxlan"}}}}'
UNDERLAY = IPv4Network("192.168.77.0/24")
UNDERLAY_V6 = IPv6Network("fd77::/64")
CABLE = IPv4Network("192.168.78.0/30")
SWITCH_ADDRESS = UNDERLAY[1]
SWITCH_ADDRESS_V6 = UNDERLAY_V6[1]
SWITCH_MAC = "02:00:00:00:00:01"
LEASES_BASE, UNREACHED_BASE = IPv4Address("10.16.0.0"), IPv4Address("198.18.0.1")
DEADLINE_SECONDS = 30.0
LOOK_SECONDS = 0.25
SUBNET_VARIABLES = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
MAX_TXN_PUTS = 128  # etcd's own default limit
# A member without others elects itself, up to a second late unless told otherwise.
LONE_MEMBER = ("--heartbeat-interval", "20", "--election-timeout", "100")

NO_SEGMENTATION = ("tso", "off", "gso", "off", "tx-udp-segmentation", "off")


@dataclass(frozen=True)
class Underlay:
    """What `ethtool -K` sets on every veth end, and on a cable's ends in addition.

    A cable carries `rate` in each direction, as tc(8) writes it; all that there is without one.
    """

    every_end: tuple[str, ...]
    cable: tuple[str, ...] = ()
    rate: str = ""


WIRE_SIZED = Underlay(("tx", "off", *NO_SEGMENTATION))
# A network card coalesces what it receives (GRO), which a veth does only when told.
UNDERLAYS = {
    "veth-default": Underlay(()),
    "wire": Underlay(
        (*NO_SEGMENTATION, "tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off"),
        ("gro", "on"),
    ),
    "wire-nocsum": Underlay(("tx", "off", *NO_SEGMENTATION), ("gro", "on")),
    "wire-1g": Underlay(("tx", "off", *NO_SEGMENTATION), ("gro", "on"), "1gbit"),
    "wire-100m": Underlay(("tx", "off", *NO_SEGMENTATION), ("gro", "on"), "100mbit"),
}
CABLE_QUEUE = "2m"
"""What may stand before a cable with a rate, at each end."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back; inside Popen they would lose the child it has just made."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is given signals
        return
    came: list[int] = []
    held = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, action in held.items():
            signal.signal(number, action)
        if came:
            signal.raise_signal(came[0])


def run(*command: str, check: bool = True) -> str:
    """Run a program, return its output; the error carries what it printed."""
    with _undisturbed():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    with process:
        try:
            printed, errors = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {printed}{errors}")
    return printed


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Poll until a condition holds; AssertionError naming `what` otherwise.

    A look counts as LOOK_SECONDS at most: what it takes longer, because the machine stalls or is
    slow, is not part of the time that is allowed.
    """
    left, before = seconds, time.monotonic()
    while not condition():
        if left < 0:
            raise AssertionError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.05)
        now = time.monotonic()
        left -= min(now - before, LOOK_SECONDS)
        before = now


def freeze(process: subprocess.Popen[bytes]) -> None:
    """Stop a program; when this returns, no thread of it runs."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


@contextmanager
def etcd_serves(log: Path) -> Iterator[None]:
    """Wait at the end until the etcd that was started meanwhile, with this log, serves clients.

    etcdctl that finds nobody there waits a second before it tries again.
    """

    def times() -> int:
        return log.read_text().count("ready to serve client requests") if log.exists() else 0

    before = times()
    yield
    wait_until(lambda: times() > before, "etcd serves")


@dataclass
class Namespace:
    """A network namespace and the processes that the lab started in it."""

    name: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def exec(self, *command: str, check: bool = True) -> str:
        """Run a program inside."""
        return run("ip", "netns", "exec", self.name, *command, check=check)

    def ip(self, *words: str, check: bool = True) -> str:
        """Run `ip` inside."""
        return run("ip", "-n", self.name, *words, check=check)

    def start(self, *command: str, log: Path, env: dict[str, str] | None = None) -> int:
        """Start a program inside; return its index in `processes`."""
        with log.open("ab") as output, _undisturbed():
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )
            self.processes.append(process)
        return len(self.processes) - 1

    def stop(self, index: int, number: int = signal.SIGTERM) -> int:
        """Send a signal to a started program and return its exit code."""
        process = self.processes[index]
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def close(self) -> None:
        """Stop the programs and delete the namespace."""
        for index in range(len(self.processes)):
            self.stop(index)
        run("ip", "netns", "del", self.name, check=False)


@dataclass
class Host(Namespace):
    """A namespace with eth0 on the switch; `iface` carries the overlay, from `address`.

    It has `address_v6` in dual-stack labs only.
    """

    address: IPv4Address = SWITCH_ADDRESS
    address_v6: IPv6Address = SWITCH_ADDRESS_V6
    iface: str = "eth0"
    folder: Path = Path()
    container: Namespace | None = None

    @property
    def subnet_file(self) -> Path:
        """Its subnet.env."""
        return self.folder / "subnet.env"

    @property
    def log(self) -> Path:
        """What its daemon wrote."""
        return self.folder / "daemon.log"

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until its daemon wrote a text; a line about something done comes after it."""
        wait_until(lambda: self.log.read_text().count(text) >= times, f"it says {text!r}")

    def ask(self, request: str, **arguments: Any) -> Any:
        """Ask its daemon, of VNI 1, over the control socket, which is in no namespace."""
        return ask(self.folder / "pyflannel-1.sock", request, **arguments)

    def subnet_env(self) -> dict[str, str]:
        """Return subnet.env's variables."""
        lines = self.subnet_file.read_text().splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}


class Lab:
    """A switch and hosts; everything is gone after `close`."""

    def __init__(self, underlay: Underlay = WIRE_SIZED, *, dual_stack: bool = False) -> None:
        self.underlay = underlay
        self._dual_stack = dual_stack
        self._stack = ExitStack()
        self._tag = f"pfu-{secrets.token_hex(3)}"
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=self._tag)))
        self.hosts: list[Host] = []
        self.switch = Namespace(f"{self._tag}-sw")
        self.etcd: int | None = None

    def start_switch(self) -> None:
        """Make the switch; the first step."""
        self._add(self.switch)
        # Without a MAC of its own a bridge takes the lowest of its ports': a host that came later
        # might change it, and nobody would reach the switch until ARP has found out.
        self.switch.ip("link", "add", "br0", "address", SWITCH_MAC, "type", "bridge")
        self._address(self.switch, "br0", SWITCH_ADDRESS, SWITCH_ADDRESS_V6)
        self.switch.ip("link", "set", "br0", "up")

    def _add(self, namespace: Namespace, owner: int | None = None) -> None:
        self._stack.callback(namespace.close)
        if owner is None:
            run("ip", "netns", "add", namespace.name)
        else:
            run("ip", "netns", "attach", namespace.name, str(owner))
        namespace.ip("link", "set", "lo", "up")
        # Another netns must not keep the default of its parent.
        settings = ["net.ipv4.ip_forward=1"]
        settings += [f"net.ipv4.conf.{name}.rp_filter=0" for name in ("all", "default")]
        if self._dual_stack:
            settings.append("net.ipv6.conf.all.forwarding=1")
        namespace.exec("sysctl", "-qw", *settings)

    def _address(
        self, namespace: Namespace, device: str, ipv4: IPv4Address, ipv6: IPv6Address
    ) -> None:
        """Give a device its addresses in the underlay."""
        _add_address(namespace, device, ipv4, UNDERLAY.prefixlen)
        if self._dual_stack:
            _add_address(namespace, device, ipv6, UNDERLAY_V6.prefixlen)

    def close(self) -> None:
        """Stop and remove everything."""
        self._stack.close()

    def add_host(self, owner: int | None = None) -> Host:
        """Add a host with eth0 on the switch, in the network namespace of a process if told so."""
        number = len(self.hosts) + 1
        folder = self.folder / f"h{number}"
        folder.mkdir()
        host = Host(
            f"{self._tag}-h{number}",
            address=UNDERLAY[10 + number],
            address_v6=UNDERLAY_V6[0x10 + number],
            folder=folder,
        )
        self._add(host, owner)
        port = f"h{number}"
        self._connect(host, "eth0", self.switch, port)
        self._address(host, "eth0", host.address, host.address_v6)
        host.ip("link", "set", "eth0", "up")
        self.switch.ip("link", "set", port, "master", "br0", "up")
        host.ip("route", "add", "default", "via", str(SWITCH_ADDRESS))
        if self._dual_stack:
            host.ip("route", "add", "default", "via", str(SWITCH_ADDRESS_V6))
        self.hosts.append(host)
        return host

    def cable(self, a: Host, b: Host) -> None:
        """Join two hosts by a cable on eth1 and let it carry the overlay; etcd stays on eth0.

        It spares the cores the work of a switch, which on a real network is none of the hosts'.
        """
        self._connect(a, "eth1", b, "eth1")
        for number, host in enumerate((a, b), 1):
            host.iface, host.address = "eth1", CABLE[number]
            if self.underlay.cable:
                host.exec("ethtool", "-K", "eth1", *self.underlay.cable)
            if self.underlay.rate:
                shape = ("rate", self.underlay.rate, "burst", "128k", "limit", CABLE_QUEUE)
                host.exec("tc", "qdisc", "add", "dev", "eth1", "root", "tbf", *shape)
            host.ip("addr", "add", f"{host.address}/{CABLE.prefixlen}", "dev", "eth1")
            host.ip("link", "set", "eth1", "up")

    def _connect(self, a: Namespace, a_name: str, b: Namespace, b_name: str) -> None:
        # fmt: off
        run("ip", "link", "add", a_name, "netns", a.name, "type", "veth",
            "peer", "name", b_name, "netns", b.name)
        # fmt: on
        if self.underlay.every_end:
            for namespace, name in ((a, a_name), (b, b_name)):
                namespace.exec("ethtool", "-K", name, *self.underlay.every_end)

    def start_etcd(self) -> None:
        """Start etcd on the switch; its data survive `stop_etcd`."""
        url, peer = f"http://{SWITCH_ADDRESS}:{ETCD_PORT}", f"http://{SWITCH_ADDRESS}:2380"
        log = self.folder / "etcd.log"
        # fmt: off
        with etcd_serves(log):
            self.etcd = self.switch.start(
                "etcd", "--name", "lab", "--data-dir", str(self.folder / "etcd"),
                "--listen-client-urls", url, "--advertise-client-urls", url,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"lab={peer}", *LONE_MEMBER, log=log,
                env={"ETCD_UNSUPPORTED_ARCH": "arm64"} if os.uname().machine == "aarch64" else None,
            )
        # fmt: on
        healthy = "is healthy"
        wait_until(lambda: healthy in self.etcdctl("endpoint", "health", check=False), healthy)

    def etcdctl(self, *words: str, check: bool = True, text: str = "") -> str:
        """Run etcdctl against the lab's etcd, with `text` as its input.

        Standard error is part of the answer.
        """
        endpoints = f"--endpoints=http://{SWITCH_ADDRESS}:{ETCD_PORT}"
        done = subprocess.run(
            ["ip", "netns", "exec", self.switch.name, "etcdctl", endpoints, *words],
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, "ETCDCTL_API": "3"},
            timeout=30,
        )
        if check and done.returncode:
            raise RuntimeError(f"etcdctl {' '.join(words)}: {done.stderr}")
        return done.stdout + done.stderr

    def put_config(self, text: str = CONFIG) -> None:
        """Write the network configuration."""
        self.etcdctl("put", f"{PREFIX}/config", text)

    def leases(self) -> dict[str, dict[str, object]]:
        """Return the lease values by subnet key."""
        lines = self.etcdctl("get", "--prefix", f"{PREFIX}/subnets/").splitlines()
        return {
            key.rsplit("/", 1)[1]: json.loads(value) for key, value in zip(lines[::2], lines[1::2])
        }

    def has_kernel_vxlan(self) -> bool:
        """Whether this kernel has the vxlan device."""
        device = ("type", "vxlan", "id", "1", "dstport", "8472")
        try:
            self.switch.ip("link", "add", "probe", *device)
        except RuntimeError:
            return False
        self.switch.ip("link", "del", "probe")
        return True

    def start_daemon(
        self,
        host: Host,
        *flags: str,
        wait: bool = True,
        iface: str | None = None,
        wrapper: Sequence[str] = (),
        python: str = sys.executable,
    ) -> int:
        """Start pyflannel-udp on a host, behind a wrapper command; wait until it is ready.

        `python` chooses an installation.
        """
        before = host.log.read_text().count("Running backend.") if host.log.exists() else 0
        # fmt: off
        index = host.start(
            *wrapper, python, "-m", "pyflannel", "--iface", iface or host.iface,
            "--etcd-endpoints", f"http://{SWITCH_ADDRESS}:{ETCD_PORT}",
            "--subnet-file", str(host.subnet_file), "--state-dir", str(host.folder / "state"),
            "--control-dir", str(host.folder), *flags, log=host.log,
        )
        # fmt: on
        if wait:
            wait_until(
                lambda: (
                    host.log.read_text().count("Running backend.") > before
                    or host.processes[index].poll() is not None
                ),
                "daemon ready",
            )
            assert host.processes[index].poll() is None, host.log.read_text()
        return index

    def add_leases(self, count: int) -> None:
        """Put leases of nodes that do not exist, 10.16.0.0/24 and so on."""
        puts = []
        for number in range(count):
            subnet = LEASES_BASE + 256 * number
            data = {"VNI": 1, "VtepMAC": f"0a:01:00:{number >> 16:02x}:{number >> 8 & 255:02x}:"
                    f"{number & 255:02x}"}  # fmt: skip
            value = {
                "PublicIP": str(UNREACHED_BASE + number),
                "PublicIPv6": None,
                "BackendType": "vxlan",
                "BackendData": data,
            }
            text = json.dumps(json.dumps(value, separators=(",", ":")))
            puts.append(f"put {PREFIX}/subnets/{subnet}-24 {text}")
        for start in range(0, count, MAX_TXN_PUTS):
            batch = "\n".join(puts[start : start + MAX_TXN_PUTS])
            # No comparison; what to do when all hold; nothing otherwise.
            self.etcdctl("txn", text=f"\n{batch}\n\n\n")

    def add_container(self, host: Host) -> Namespace:
        """Put a container behind cni0, configured from subnet.env."""
        env = host.subnet_env()
        mtu = env["FLANNEL_MTU"]
        container = Namespace(host.name.replace("-h", "-c"))
        self._add(container)
        host.ip("link", "add", "cni0", "mtu", mtu, "type", "bridge")
        host.ip("link", "set", "cni0", "up")
        self._connect(container, "eth0", host, "veth0")
        host.ip("link", "set", "veth0", "mtu", mtu, "master", "cni0", "up")
        container.ip("link", "set", "eth0", "mtu", mtu, "up")
        for variable in SUBNET_VARIABLES.values():
            if variable not in env:
                continue
            gateway = ip_interface(env[variable])
            for namespace, device, address in (
                (host, "cni0", gateway.ip),
                (container, "eth0", gateway.ip + 1),
            ):
                _add_address(namespace, device, address, gateway.network.prefixlen)
            container.ip("route", "add", "default", "via", str(gateway.ip))
        host.container = container
        return container


def _add_address(namespace: Namespace, device: str, address: IPAddress, length: int) -> None:
    nodad = ("nodad",) if address.version == 6 else ()
    namespace.ip("addr", "add", f"{address}/{length}", "dev", device, *nodad)


@contextmanager
def lab(hosts: int, underlay: Underlay = WIRE_SIZED, *, dual_stack: bool = False) -> Iterator[Lab]:
    """Make a lab with etcd and some hosts; removed in every exit path.

    At SIGTERM too, which ends a program that does nothing else about it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    made = Lab(underlay, dual_stack=dual_stack)
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if old[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        made.start_switch()
        made.start_etcd()
        for _ in range(hosts):
            made.add_host()
        yield made
    finally:
        # A second Ctrl-C must not stop the removal half-way.
        for number in old:
            signal.signal(number, signal.SIG_IGN)
        made.close()
        for number, action in old.items():
            signal.signal(number, action)


@contextmanager
def narrowed(made: Lab, host: Host, mtu: int) -> Iterator[None]:
    """Let a host's way to the switch, not the switch's other ends, carry `mtu` bytes at most."""
    port = host.name.rsplit("-", 1)[1]

    def narrow(size: str) -> None:
        host.ip("link", "set", "eth0", "mtu", size)
        made.switch.ip("link", "set", port, "mtu", size)

    # A bridge takes the smallest of its ports unless it is told one.
    made.switch.ip("link", "set", "br0", "mtu", "1500")
    narrow(str(mtu))
    try:
        yield
    finally:
        narrow("1500")


def container_address(host: Host, version: int = 4) -> IPAddress:
    """Return the address of the container behind a host."""
    return ip_interface(host.subnet_env()[SUBNET_VARIABLES[version]]).ip + 1


def ping(source: Namespace, address: IPAddress, *flags: Sequence[str] | str) -> bool:
    """Whether one ping is answered."""
    words = [str(flag) for flag in flags]
    return "1 received" in source.exec(
        "ping", "-c", "1", "-W", "1", *words, str(address), check=False
    )


def is_reached(source: Namespace, address: IPAddress, *flags: Sequence[str] | str) -> bool:
    """Whether one of a few pings is answered; while the machine stalls, some may be too late."""
    return any(ping(source, address, *flags) for _ in range(5))
