"""What is compared: each variant is built between two hosts of a lab of its own.

A lab of its own (namespaces, a cable between the hosts, etcd) keeps one variant's devices and
sockets out of another's packet path. Idle stacks cost next to nothing, so several can stand side by
side.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tests.lab.hosts import UNDERLAYS, Host, Lab, ping, wait_until

KERNEL_NODES = (
    (IPv4Network("10.244.201.0/24"), "0a:00:00:00:00:01"),
    (IPv4Network("10.244.202.0/24"), "0a:00:00:00:00:02"),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to measure: `kind` is a key of KINDS; flags and checkout are for `ours`."""

    name: str
    kind: str
    flags: tuple[str, ...] = ()
    checkout: Path | None = None


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

    def close(self) -> None:
        """Stop and remove it."""
        self.made.close()


def parse_variant(text: str, common: tuple[str, ...] = ()) -> Variant:
    """Read KIND, or NAME[@CHECKOUT]=FLAGS for pyflannel-udp; ValueError with a sentence."""
    head, equals, flags = text.partition("=")
    name, at, checkout = head.partition("@")
    if not equals and not at:
        if name not in KINDS:
            raise ValueError(f"{name!r} is no variant; there are {', '.join(KINDS)}")
        return Variant(name, name, common if name == "ours" else ())
    if name in KINDS and name != "ours":
        raise ValueError(f"{text!r}: only pyflannel-udp takes flags or a checkout")
    folder = Path(checkout).resolve() if at else None
    if folder is not None and not (folder / ".venv/bin/python").exists():
        raise ValueError(f"{folder} has no .venv; run `make setup` there")
    return Variant(name, "ours", (*flags.split(), *common), folder)


def build(variant: Variant, mode: str) -> Stack:
    """Build a variant on the underlay `mode`; it carries packets when this returns."""
    made = Lab(UNDERLAYS[mode])
    try:
        made.cable(made.add_host(), made.add_host())
        stack = Stack(variant, made, KINDS[variant.kind](made, variant))
        stack.sink.start("iperf3", "-s", log=made.folder / "iperf3.log")
        wait_until(lambda: ":5201" in stack.sink.exec("ss", "-ltn"), "iperf3 listens")
        wait_until(lambda: ping(stack.source, stack.target), f"{variant.name} carries a ping")
    except BaseException:
        made.close()
        raise
    return stack


def _plain(made: Lab, variant: Variant) -> IPv4Address:
    return made.hosts[1].address


def _kernel(made: Lab, variant: Variant) -> IPv4Address:
    made.start_etcd()
    for host, (subnet, mac) in zip(made.hosts, KERNEL_NODES):
        made.start_kernel_node(host, subnet, mac)
    for host in made.hosts:
        made.program_kernel_node(host)
    return KERNEL_NODES[1][0].network_address


def _ours(made: Lab, variant: Variant) -> IPv4Address:
    made.start_etcd()
    made.put_config()
    python = str(variant.checkout / ".venv/bin/python") if variant.checkout else sys.executable
    for host in made.hosts:
        made.start_daemon(host, *variant.flags, python=python)
    subnet = IPv4Network(made.hosts[1].subnet_env()["FLANNEL_SUBNET"], strict=False)
    return subnet.network_address


KINDS: dict[str, Callable[[Lab, Variant], IPv4Address]] = {
    "plain": _plain,
    "kernel": _kernel,
    "ours": _ours,
}


def compile_tools() -> None:
    """Compile the C programs of this folder."""
    subprocess.run(["make", "--silent", "-C", str(Path(__file__).parent)], check=True)
