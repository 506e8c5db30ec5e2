"""What is compared: each variant is built between two hosts of a lab of its own.

A lab of its own (namespaces, a cable between the hosts, etcd) keeps one variant's devices and
sockets out of another's packet path. Idle stacks cost next to nothing, so several can stand side by
side.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bench.openvswitch import start_openvswitch
from tests.lab.hosts import UNDERLAYS, Host, Lab, ping, run, wait_until
from tests.lab.iperf import serve_iperf3
from tests.lab.kernel_node import program_kernel_node, start_kernel_node

BENCH = Path(__file__).parent
TUN_ADDRESSES = (IPv4Address("10.245.0.1"), IPv4Address("10.245.0.2"))
METRICS_PORT = 8080
# Room for 10,000 subnets; the lab's underlay lies outside.
CONFIG = '{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}'
# Numbers of the hosts that run pyflannel-udp, by kind of variant.
OURS = {"ours": (0, 1), "from-kernel": (1,), "to-kernel": (0,)}
KERNEL_NODES = (
    (IPv4Network("10.244.201.0/24"), "0a:00:00:00:00:01"),
    (IPv4Network("10.244.202.0/24"), "0a:00:00:00:00:02"),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to measure: `kind` is a key of KINDS, `flags` are for its program.

    `checkout` is another checkout of pyflannel-udp, set up by `make setup`; `peers` is how many
    nodes the table holds.
    """

    name: str
    kind: str
    flags: tuple[str, ...] = ()
    checkout: Path | None = None
    peers: int = 1


class CannotBuildError(Exception):
    """A variant that this machine does not carry; one sentence."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A variant that runs: traffic goes from `source` to `target`, which is on `sink`."""

    variant: Variant
    made: Lab
    target: IPv4Address

    @property
    def source(self) -> Host:
        """The host that sends."""
        return self.made.hosts[0]

    @property
    def sink(self) -> Host:
        """The host that receives."""
        return self.made.hosts[1]

    @property
    def daemons(self) -> list[Host]:
        """The hosts that run pyflannel-udp."""
        return [self.made.hosts[number] for number in OURS.get(self.variant.kind, ())]

    def close(self) -> None:
        """Stop and remove it."""
        self.made.close()


def parse_variant(text: str, common: tuple[str, ...] = ()) -> Variant:
    """Read NAME[:KIND][@CHECKOUT][=FLAGS]; ValueError with a sentence.

    A name of VARIANTS needs no more; any other is `ours` unless it names its kind. `common` are
    flags for every pyflannel-udp.
    """
    head, equals, flags = text.partition("=")
    head, at, checkout = head.partition("@")
    name, colon, kind = head.partition(":")
    known = VARIANTS.get(name)
    if known is None and not (equals or at or colon):
        raise ValueError(f"{name!r} is no variant; there are {', '.join(VARIANTS)}")
    kind = kind or (known.kind if known else "ours")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of variant; there are {', '.join(KINDS)}")
    folder = Path(checkout).resolve() if at else None
    if folder is not None and not (folder / ".venv/bin/python").exists():
        raise ValueError(f"{folder} has no .venv; run `make setup` there")
    words = tuple(flags.split()) if equals else known.flags if known else ()
    words = (*words, *common) if kind in OURS else words
    return Variant(name, kind, words, folder, known.peers if known else 1)


def build(variant: Variant, mode: str) -> Stack:
    """Build a variant on the underlay `mode`; it carries packets when this returns.

    Raises CannotBuildError with a sentence.
    """
    made = Lab(UNDERLAYS[mode])
    try:
        made.start_switch()
        made.cable(made.add_host(), made.add_host())
        stack = Stack(variant, made, KINDS[variant.kind](made, variant))
        serve_iperf3(stack.sink, made.folder / "iperf3.log")
        wait_until(lambda: ping(stack.source, stack.target), f"{variant.name} carries a ping")
    except (AssertionError, RuntimeError) as error:
        made.close()
        raise CannotBuildError(f"{variant.name}: {str(error).strip().splitlines()[-1]}") from error
    except BaseException:
        made.close()
        raise
    return stack


def _plain(made: Lab, variant: Variant) -> IPv4Address:
    return made.hosts[1].address


def _flannel(made: Lab, variant: Variant) -> IPv4Address:
    made.start_etcd()
    made.put_config(CONFIG)
    made.add_leases(variant.peers - 1)
    kernel_nodes = []
    for number, host in enumerate(made.hosts):
        if number in OURS.get(variant.kind, ()):
            _start_daemon(made, host, variant)
        else:
            start_kernel_node(made, host, *KERNEL_NODES[number])
            kernel_nodes.append(host)
    for host in kernel_nodes:
        program_kernel_node(made, host)
    _wait_for_peers(made, variant)
    subnet = IPv4Network(made.hosts[1].subnet_env()["FLANNEL_SUBNET"], strict=False)
    return subnet.network_address


def _start_daemon(made: Lab, host: Host, variant: Variant) -> None:
    metrics = ("--healthz-ip=127.0.0.1", f"--healthz-port={METRICS_PORT}")
    python = str(variant.checkout / ".venv/bin/python") if variant.checkout else sys.executable
    made.start_daemon(host, *metrics, *variant.flags, python=python)


def _wait_for_peers(made: Lab, variant: Variant) -> None:
    def are_there() -> bool:
        routes = [host.ip("route", "show", "dev", "flannel.1") for host in made.hosts]
        return all(text.count(" onlink") == variant.peers for text in routes)

    wait_until(are_there, f"{variant.peers} peers are in the tables")


def _start_tun_program(host: Host, number: int, peer: Host, program: tuple[str, ...]) -> None:
    own, other = TUN_ADDRESSES[number], TUN_ADDRESSES[1 - number]
    # fmt: off
    host.start(*program, "--local", str(host.address), "--peer", str(peer.address),
               "--address", str(own), "--peer-address", str(other), log=host.log)
    # fmt: on
    wait_until(
        lambda: bool(host.ip("link", "show", "bench0", check=False)), f"{program[0]} makes its TUN"
    )
    host.ip("addr", "add", f"{own}/30", "dev", "bench0")


def _tun_programs(made: Lab, program: tuple[str, ...], mtu: int) -> IPv4Address:
    """Start a program on both hosts that makes a TUN `bench0` and forwards to one peer."""
    for number, host in enumerate(made.hosts):
        _start_tun_program(host, number, made.hosts[1 - number], program)
        host.ip("link", "set", "bench0", "mtu", str(mtu), "up")
    return TUN_ADDRESSES[1]


def _null(made: Lab, variant: Variant) -> IPv4Address:
    return _tun_programs(made, (f"{BENCH}/bin/null_forwarder", *variant.flags), 1450)


def _naive(made: Lab, variant: Variant) -> IPv4Address:
    return _tun_programs(made, (sys.executable, f"{BENCH}/naive.py"), 1450)


def _udp_backend(made: Lab, variant: Variant) -> IPv4Address:
    return _tun_programs(made, (f"{BENCH}/bin/udp_backend", "--peers", str(variant.peers)), 1472)


def _wireguard_go(made: Lab, variant: Variant) -> IPv4Address:
    for program in ("wireguard-go", "wg"):
        if shutil.which(program) is None:
            raise RuntimeError(f"the program {program} is not installed")
    keys = [run("wg", "genkey").strip() for _ in made.hosts]
    for number, host in enumerate(made.hosts):
        peer, own, other = made.hosts[1 - number], TUN_ADDRESSES[number], TUN_ADDRESSES[1 - number]
        public = subprocess.run(
            ["wg", "pubkey"], input=keys[1 - number], check=True, capture_output=True, text=True
        ).stdout.strip()
        # The control socket's name is the device's, and one folder holds those of all namespaces.
        device, key_file = f"wg{made.folder.name[4:10]}{number}", host.folder / "key"
        key_file.write_text(keys[number])
        host.start("wireguard-go", "-f", device, log=host.log)
        wait_until(partial(_answers, host, device), f"wireguard-go makes {device}")
        # fmt: off
        host.exec("wg", "set", device, "private-key", str(key_file), "listen-port", "51820",
                  "peer", public, "endpoint", f"{peer.address}:51820", "allowed-ips", f"{other}/32")
        # fmt: on
        host.ip("addr", "add", f"{own}/30", "dev", device)
        host.ip("link", "set", device, "mtu", "1420", "up")
    return TUN_ADDRESSES[1]


def _answers(host: Host, device: str) -> bool:
    return device in host.exec("wg", "show", device, check=False)


def _openvswitch(made: Lab, variant: Variant) -> IPv4Address:
    for number, host in enumerate(made.hosts):
        start_openvswitch(host, made.hosts[1 - number].address, TUN_ADDRESSES[number])
    return TUN_ADDRESSES[1]


KINDS: dict[str, Callable[[Lab, Variant], IPv4Address]] = {
    "plain": _plain,
    "kernel": _flannel,
    "ours": _flannel,
    "from-kernel": _flannel,
    "to-kernel": _flannel,
    "null": _null,
    "naive": _naive,
    "udp-backend": _udp_backend,
    "wireguard-go": _wireguard_go,
    "openvswitch": _openvswitch,
}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain", "plain"),
        Variant("kernel", "kernel"),
        *(Variant(kind, kind) for kind in OURS),
        Variant("null", "null", ("--design=gather", "--threads=2")),
        Variant("null-1thread", "null", ("--design=gather", "--threads=1")),
        Variant("null-flat", "null", ("--design=flat", "--threads=2")),
        Variant("null-gaps", "null", ("--design=gaps", "--threads=2")),
        Variant("null-unconnected", "null", ("--io=unconnected",)),
        Variant("null-zerocopy", "null", ("--io=zerocopy", "--design=gaps")),
        Variant("null-uring", "null", ("--io=uring", "--threads=2")),
        Variant("null-uring-1thread", "null", ("--io=uring", "--threads=1")),
        Variant("null-uring-sqpoll", "null", ("--io=uring-sqpoll", "--threads=1")),
        Variant("null-packet", "null", ("--io=packet", "--design=gaps")),
        Variant("null-packet-ring", "null", ("--io=packet-ring", "--design=gaps")),
        Variant("null-tunnel", "null", ("--io=tunnel",)),
        Variant("null-xdp", "null", ("--io=xdp", "--design=gaps")),
        Variant("naive", "naive"),
        Variant("udp-backend", "udp-backend"),
        Variant("wireguard-go", "wireguard-go"),
        Variant("openvswitch", "openvswitch"),
        *(
            Variant(f"{kind}-{peers}", kind, peers=peers)
            for kind in ("kernel", "ours", "udp-backend")
            for peers in (100, 10000)
        ),
    )
}


def compile_tools() -> None:
    """Compile the C programs of this folder."""
    subprocess.run(["make", "--silent", "-C", str(BENCH)], check=True)
