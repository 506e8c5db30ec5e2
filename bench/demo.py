"""`make demo`: an overlay of three hosts, pings, and iperf3 beside the kernel's vxlan device.

Starts an etcd, two hosts with pyflannel-udp and one with the kernel's vxlan device, containers
behind each; a host without the vxlan module gets three of ours. The yardstick is a second kernel
vxlan device (VNI 99, port 4790) between two of the hosts, measured in turns with ours.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from statistics import median

from bench.program import begin, run_program, say
from tests.lab.hosts import (
    Host,
    Lab,
    Namespace,
    container_address,
    is_reached,
    lab,
)
from tests.lab.iperf import serve_iperf3
from tests.lab.kernel_node import program_kernel_node, start_kernel_node

KERNEL_SUBNET = IPv4Network("10.244.200.0/24")
KERNEL_MAC = "0a:00:00:00:00:03"
YARDSTICK_VNI, YARDSTICK_PORT = "99", "4790"
ROUNDS, SECONDS = 3, "2"
CASES = (
    ("TCP, 1 stream", ("-P", "1")),
    ("TCP, 1 stream, reverse", ("-P", "1", "-R")),
    ("TCP, 4 streams", ("-P", "4")),
)


def start_nodes(made: Lab, kernel: bool) -> None:
    """Bring all three hosts into the overlay, containers behind each."""
    made.put_config()
    say(f"etcd                     on 192.168.77.1, network 10.244.0.0/16 ({made.switch.name})")
    ours = made.hosts[:2] if kernel else made.hosts
    for host in ours:
        made.start_daemon(host)
        say(f"pyflannel-udp            on {host.address}, {host.subnet_env()['FLANNEL_SUBNET']}")
    if kernel:
        host = made.hosts[2]
        start_kernel_node(made, host, KERNEL_SUBNET, KERNEL_MAC)
        program_kernel_node(made, host)
        say(f"kernel vxlan node        on {host.address}, {host.subnet_env()['FLANNEL_SUBNET']}")
    else:
        say("this kernel has no vxlan device: all three hosts run pyflannel-udp")
    for host in made.hosts:
        made.add_container(host)
        say(f"container                {container_address(host)} behind {host.address}")


def containers(made: Lab) -> list[tuple[Host, Namespace]]:
    """Return each host with the container behind it."""
    return [(host, host.container) for host in made.hosts if host.container is not None]


def ping_matrix(made: Lab) -> bool:
    """Print who reaches whom; return whether everybody does."""
    everybody = containers(made)
    say(
        "\nping             " + "".join(f"{container_address(host)!s:>16}" for host, _ in everybody)
    )
    good = True
    for host, container in everybody:
        row = f"{container_address(host)!s:<17}"
        for other, _ in everybody:
            if other is host:
                row += f"{'-':>16}"
                continue
            # A route to a peer that joined a moment ago may take a moment.
            answered = is_reached(container, container_address(other))
            good &= answered
            row += f"{'ok' if answered else 'LOST':>16}"
        say(row)
    return good


def add_yardstick(made: Lab) -> None:
    """Make a second, kernel-only overlay 10.99.0.0/24 between the first two hosts."""
    pair = made.hosts[:2]
    for number, host in enumerate(pair, 1):
        remote = pair[2 - number].address
        # fmt: off
        host.ip("link", "add", "yardstick", "type", "vxlan", "id", YARDSTICK_VNI, "dev", "eth0",
                "local", str(host.address), "remote", str(remote), "dstport", YARDSTICK_PORT)
        # fmt: on
        host.ip("addr", "add", f"10.99.0.{number}/24", "dev", "yardstick")
        host.ip("link", "set", "yardstick", "mtu", "1450", "up")


def throughput(made: Lab, target: IPv4Address, flags: tuple[str, ...]) -> float:
    """Return Gbit/s from the first host to the second by iperf3."""
    source, sink = made.hosts[:2]
    server = serve_iperf3(sink, made.folder / "iperf3.log", "-1")
    report = json.loads(source.exec("iperf3", "-J", "-c", str(target), "-t", SECONDS, *flags))
    sink.processes[server].wait(10)
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


def iperf_table(made: Lab, kernel: bool) -> None:
    """Print throughput between two of our nodes, beside the kernel's device where it exists."""
    subnet = IPv4Network(made.hosts[1].subnet_env()["FLANNEL_SUBNET"], strict=False)
    targets = {"pyflannel-udp": subnet[0]}
    if kernel:
        add_yardstick(made)
        targets["kernel vxlan"] = IPv4Address("10.99.0.2")
    say(f"\niperf3, host to host, Gbit/s, median of {ROUNDS} rounds in turns, real checksums")
    say(f"{'':<24}" + "".join(f"{name:>16}" for name in targets) + ("     ratio" if kernel else ""))
    for title, flags in CASES:
        seen: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(ROUNDS):
            for name, target in targets.items():
                seen[name].append(throughput(made, target, flags))
        medians = [median(values) for values in seen.values()]
        row = f"{title:<24}" + "".join(f"{value:>16.2f}" for value in medians)
        say(row + (f"{medians[0] / medians[1]:>10.2f}" if kernel else ""))


def main() -> int:
    """Run the demo; 1 when a ping is lost."""
    begin()
    with lab(3) as made:
        kernel = made.has_kernel_vxlan()
        start_nodes(made, kernel)
        good = ping_matrix(made)
        iperf_table(made, kernel)
    say("\neverything that was started is stopped and removed")
    return 0 if good else 1


if __name__ == "__main__":
    run_program(main)
