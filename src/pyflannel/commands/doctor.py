"""`pyflannel-udp doctor`: looks for what keeps this host from being a node, or a good one.

It runs the checks in order and prints what they find; it works before the daemon has ever started,
and takes the daemon's flags, variables and options file. Exit code: 0 nothing found, 1 warnings,
2 a failure, as monitoring plugins have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from pyflannel.command_line.arguments import Command, parse_command
from pyflannel.command_line.options import Options
from pyflannel.commands import doctor_cluster as cluster
from pyflannel.commands import doctor_host as host
from pyflannel.commands.finding import Finding, failure
from pyflannel.control.lease import Lease, config_key, lease_key
from pyflannel.control.lease_list import LeaseList, read_leases
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.vtep_identity import read_machine_id
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.proc_net import network_namespace
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import DEFAULT_PORT, IPAddress, Vni
from pyflannel.etcd_access import ask_etcd
from pyflannel.management.control_socket import NoAnswer, ask, find_socket
from pyflannel.node.underlying import OVERHEAD_BYTES, Underlying, choose_underlay, device_name

ANY_NETWORK = IPv4Network("0.0.0.0/0")


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found."""

    checks: list[str] = field(default_factory=list)
    findings: list[tuple[str, Finding]] = field(default_factory=list)

    def add(self, check: str, findings: Iterable[Finding]) -> None:
        """Note a check and its findings."""
        self.checks.append(check)
        self.findings += [(check, finding) for finding in findings]

    @property
    def exit_code(self) -> int:
        """The worst severity."""
        return max((int(finding.severity) for _, finding in self.findings), default=0)


def main(argv: Sequence[str]) -> int:
    """Examine and print; return the exit code."""
    command = parse_command(argv, "doctor")
    # What is amiss is told once, as a finding.
    logging.getLogger("pyflannel").setLevel(logging.CRITICAL)
    report = asyncio.run(examine(command))
    if command.json:
        print(json.dumps(_value(report), indent=2))
    else:
        print("\n".join(_lines(report)))
    return report.exit_code


def _value(report: Report) -> Any:
    findings = [
        {**dataclasses.asdict(finding), "severity": finding.severity.name.lower(), "check": check}
        for check, finding in report.findings
    ]
    return {"checks": report.checks, "findings": findings}


def _lines(report: Report) -> list[str]:
    lines = [f"{x.severity.name}: {x.sentence}; {x.remedy}" for _, x in report.findings]
    found = f"{len(lines)} finding{'s' * (len(lines) > 1)}" if lines else "nothing found"
    return [*lines, f"{len(report.checks)} checks, {found}: {', '.join(report.checks)}"]


def _ask_daemon(command: Command, report: Report) -> Any:
    """Return the status of the running daemon, None if there is none or none that answers."""
    try:
        status = ask(find_socket(command.options.control_dir, command.vni), "status")
    except NoAnswer as error:
        sentence, _, remedy = str(error).partition("; ")
        report.add("daemon", [failure(sentence, remedy)])
        return None
    except Refusal:
        return None
    findings = [
        failure(f"the daemon is not ready: {name}: {why}", "docs/troubleshoot.md tells more")
        for name, why in status["reasons"].items()
    ]
    if _is_elsewhere(status):
        findings.append(
            failure(
                "the daemon is in another network namespace than this command, which cannot look "
                "at the daemon's host",
                "run doctor there: docker exec, or nsenter --net --target the daemon's pid",
            )
        )
    report.add("daemon", findings)
    return status


def _is_elsewhere(daemon: Any) -> bool:
    # A daemon of an older version does not tell.
    here = network_namespace()
    return bool(daemon.get("network_namespace", here) != here)


async def examine(command: Command) -> Report:
    """Run every check that can be run."""
    options, report = command.options, Report()
    daemon = _ask_daemon(command, report)
    if daemon is not None and _is_elsewhere(daemon):
        return report
    report.add("tun", host.check_tun())
    report.add("capabilities", host.check_capabilities(is_running=daemon is not None))
    reading, findings = await cluster.check_etcd(options)
    report.add("etcd", findings)
    config = None
    if reading is not None:
        config, findings = cluster.check_config(reading, config_key(options.etcd_prefix))
        report.add("configuration", findings)
    # A wrong clock may be why etcd cannot be asked.
    report.add("clock", await cluster.check_clock(options))
    _check_host(report, options, config, daemon)
    devices = _devices(config)
    async with Netlink() as netlink:
        links = await netlink.links()
        report.add("devices", host.check_devices(links, devices.values(), _port(config)))
        if config is None:
            return report
        interfaces = await netlink.interfaces()
        underlying: tuple[Underlying, ...] = ()
        try:
            underlying = await choose_underlay(options, netlink, config)
            report.add("interface", ())
        except Refusal as error:
            sentence, _, remedy = str(error).partition("; ")
            report.add("interface", [failure(sentence, remedy or "correct --iface")])
    interface = underlying[0].choice.name if underlying else None
    report.add("rp_filter", host.check_rp_filter(devices[4], interface))
    with contextlib.suppress(Refusal):
        leases = await ask_etcd(
            options, lambda x: read_leases(x, options.etcd_prefix), cluster.ETCD_SECONDS
        )
        unused = {} if daemon is None else _unused(command)
        report.add("leases", [*cluster.check_leases(leases), *cluster.check_unused(unused, leases)])
        used = [x for x in leases.leases if lease_key(options.etcd_prefix, x.subnet) not in unused]
        if underlying:
            _check_public_ips(report, options, devices, underlying, leases)
            networks = [subnets.network for subnets in config.ranges]
            peers = cluster.peers_of(leases.leases, [x.public_ip for x in underlying])
            report.add(
                "addresses",
                cluster.check_addresses(interfaces, devices.values(), underlying, networks, peers),
            )
            await _check_peers(report, command, underlying, used, daemon is not None)
    return report


def _devices(config: NetworkConfig | None) -> dict[int, str]:
    """Return the name of our device by address family."""
    if config is None:
        return {4: device_name(4, Vni(1))}
    versions = [subnets.network.version for subnets in config.ranges]
    return {version: device_name(version, config.backend.vni) for version in versions}


def _files(options: Options, devices: Mapping[int, str]) -> dict[str, Path]:
    return {
        "--state-dir": options.state_dir / f"{devices[4]}.json",
        "--subnet-file": options.subnet_file,
    }


def _port(config: NetworkConfig | None) -> int:
    return config.backend.port if config else DEFAULT_PORT


def _check_host(
    report: Report, options: Options, config: NetworkConfig | None, daemon: Any
) -> None:
    devices, port = _devices(config), _port(config)
    networks = [subnets.network for subnets in config.ranges] if config else [ANY_NETWORK]
    nftables = config is not None and config.enable_nftables
    report.add("files", host.check_files(_files(options, devices)))
    report.add("port", host.check_port(port, is_running=daemon is not None))
    given = [x.get("receive_buffer_bytes") for x in daemon["devices"]] if daemon else []
    report.add("receive-buffer", host.check_receive_buffer(next(iter(given), None)))
    report.add(
        "firewall",
        [
            *host.check_firewall_tools(devices, nftables=nftables),
            *host.check_firewall_input(devices, port),
        ],
    )
    report.add("forwarding", host.check_forwarding(devices))
    report.add("bridge", host.check_bridge(networks))
    report.add("linkdown", host.check_linkdown(devices))
    if 6 in devices:
        report.add("ipv6", host.check_ipv6())


def _ask(command: Command, request: str, **arguments: Any) -> Any:
    """Return what the running daemon answers, None where there is none or it does not tell."""
    try:
        return ask(find_socket(command.options.control_dir, command.vni), request, **arguments)
    except Refusal:
        return None


def _unused(command: Command) -> Mapping[str, str]:
    """Return the reason by key for leases that the daemon does not use, as far as it tells."""
    answer = _ask(command, "leases")
    return {} if answer is None else answer["unused"]


def _why_not_sent(command: Command, address: IPAddress) -> str | None:
    """Return why packets to an address do not leave this host, None if they do or nobody knows."""
    answer = _ask(command, "trace", address=str(address))
    return None if answer is None or answer["sent"] else str(answer["why"])


def _check_public_ips(
    report: Report,
    options: Options,
    devices: Mapping[int, str],
    underlying: Sequence[Underlying],
    leases: LeaseList,
) -> None:
    machine_id = read_machine_id()
    report.add(
        "public-ip",
        [
            finding
            for own in (each.public_ip for each in underlying)
            for finding in cluster.check_own_lease(
                leases, own, options, devices[own.version], machine_id
            )
        ],
    )


async def _check_peers(
    report: Report,
    command: Command,
    underlying: Sequence[Underlying],
    leases: Iterable[Lease],
    is_running: bool,
) -> None:
    peers = cluster.peers_of(leases, [each.public_ip for each in underlying])
    # All families share the interface, and so the size of an outer packet.
    outer_mtu = underlying[0].mtu + OVERHEAD_BYTES[underlying[0].version]
    addresses = {part.public_ip for part in peers if part.public_ip is not None}
    reached, findings = await cluster.check_path_mtu(addresses, outer_mtu)
    report.add("path-mtu", findings)
    if is_running:
        report.add(
            "vteps",
            await cluster.check_vteps(
                peers, reached, command.options.etcd_prefix, partial(_why_not_sent, command)
            ),
        )
