"""The commands `status`, `peers`, `leases` and `trace`: ask the daemon, print a table or JSON.

`leases` asks etcd itself where no daemon runs.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from pyflannel.command_line.arguments import Command, parse_command
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management.control_socket import ask, find_socket

PEERS_SHOWN = 20
RELOAD_SECONDS = 30.0
ETCD_SECONDS = 10.0
TRACE_SECONDS = 30.0

Json = Mapping[str, Any]


def _show(command: Command, value: Any, table: Callable[[Any], Iterable[str]]) -> int:
    lines = [json.dumps(value, indent=2)] if command.json else table(value)
    print("\n".join(lines))
    return 0


def status_main(argv: Sequence[str]) -> int:
    """Print the state of the node; 1 while it is not ready."""
    command = parse_command(argv, "status")
    value = ask(find_socket(command.options.control_dir, command.vni), "status")
    _show(command, value, status_lines)
    return 0 if value["ready"] else 1


def peers_main(argv: Sequence[str]) -> int:
    """Print every peer."""
    command = parse_command(argv, "peers")
    value = ask(find_socket(command.options.control_dir, command.vni), "peers")
    return _show(command, value, peer_lines)


def trace_main(argv: Sequence[str]) -> int:
    """Print what would become of a packet; 1 if it would not be sent into the overlay."""
    command = parse_command(argv, "trace")
    path = find_socket(command.options.control_dir, command.vni)
    # It asks the kernel, behind what else is asked: among 10,000 peers that may take seconds.
    value = ask(path, "trace", seconds=TRACE_SECONDS, address=command.words[0])
    _show(command, value, trace_lines)
    return 0 if value["sent"] else 1


def leases_main(argv: Sequence[str]) -> int:
    """Print all leases of the network."""
    command = parse_command(argv, "leases")
    return _show(command, _leases(command), lease_lines)


def _leases(command: Command) -> Any:
    try:
        path = find_socket(command.options.control_dir, command.vni)
    except Refusal:
        path = None
    if path is not None and os.path.exists(path):  # False where we may not look
        return ask(path, "leases")
    # gRPC is needed here only.
    from pyflannel.control.lease_list import read_leases
    from pyflannel.etcd_access import ask_etcd
    from pyflannel.node.lease_value import leases_value

    options = command.options
    found = asyncio.run(
        ask_etcd(options, lambda etcd: read_leases(etcd, options.etcd_prefix), ETCD_SECONDS)
    )
    return leases_value(found.leases, found.bad, options.etcd_prefix)


def status_lines(value: Json) -> list[str]:
    """Return the human form of `status`."""
    head = (
        f"pyflannel-udp {value['version']}, pid {value['pid']}, up {span(value['uptime_seconds'])}"
    )
    rows = [("state", "ready" if value["ready"] else "not ready")]
    rows += [("", f"{name}: {why}") for name, why in value["reasons"].items()]
    if network := value["network"]:
        nets = " and ".join(x for x in (network["ipv4"], network["ipv6"]) if x)
        rows.append(("network", f"{nets}, VNI {network['vni']}, UDP port {network['port']}"))
    if lease := value["lease"]:
        rows.append(("lease", _lease_line(lease)))
    if etcd := value["etcd"]:
        rows += _etcd_rows(etcd)
    for device in value["devices"]:
        rows += _device_rows(device)
    width = max(len(name) for name, _ in rows)
    lines = [head, *(f"  {name:<{width}}  {text}" for name, text in rows), ""]
    peers = value["peers"]
    lines.append(f"{len(peers)} peers")
    lines += [f"  {line}" for line in peer_lines(peers[:PEERS_SHOWN])] if peers else []
    if len(peers) > PEERS_SHOWN:
        lines.append(f"  and {len(peers) - PEERS_SHOWN} more; pyflannel-udp peers shows all")
    return lines


def _lease_line(lease: Json) -> str:
    subnets = _both(lease, "subnet", " and ") or "none"
    if lease["expires_in_seconds"] is None:
        until = "a reservation" if lease["reservation"] else "none yet"
    else:
        until = (
            f"renewed {span(lease['age_seconds'])} ago, ends in {span(lease['expires_in_seconds'])}"
        )
    return f"{subnets} ({lease['state']}), {until}; VTEP MAC {_both(lease, 'vtep_mac', ' and ')}"


def _both(lease: Json, name: str, between: str) -> str:
    """Return a field of each family that the lease has it of."""
    return between.join(x for x in (lease[name], lease[f"{name}_ipv6"]) if x)


def _etcd_rows(etcd: Json) -> list[tuple[str, str]]:
    silence = "never answered"
    if etcd["silence_seconds"] is not None:
        silence = f"answered {span(etcd['silence_seconds'])} ago"
    rows = [("etcd", f"{etcd['state']}, {etcd['endpoint']}, {silence}")]
    view = etcd["view"]
    if view and view["age_seconds"] is not None:
        rows.append(("", f"view of {span(view['age_seconds'])} ago, revision {view['revision']}"))
    if etcd["last_error"]:
        when = span(etcd["last_error_seconds"])
        rows.append(("", f"last error {when} ago: {etcd['last_error']}"))
    return rows


def _device_rows(device: Json) -> list[tuple[str, str]]:
    over = f"{device['interface']} {device['address']}"
    if device["public_ip"] != device["address"]:
        over += f" (told as {device['public_ip']})"
    rows = [
        ("device", f"{device['name']}, MTU {device['mtu']}, over {over}"),
        ("", f"offloads {device['offloads']}"),
        ("", f"workers {device['workers']}, packet threads at work {device['threads']}"),
        ("sent", _amount(device["encap_packets"], device["encap_bytes"])),
        ("received", _amount(device["decap_packets"], device["decap_bytes"])),
    ]
    drops = ", ".join(f"{reason} {count}" for reason, count in device["drops"].items())
    return [*rows, ("dropped", drops or "nothing")]


def _amount(packets: int, size: int) -> str:
    return f"{packets} packets, {quantity(size)}"


def peer_lines(value: Sequence[Json]) -> list[str]:
    """Return the human form of `peers`."""
    head = ("SUBNET", "ADDRESS", "VTEP MAC", "SENT", "", "RECEIVED", "", "DROPS", "LAST SEEN")
    rows = [
        (
            peer["subnet"],
            peer["address"],
            peer["vtep_mac"],
            str(peer["encap_packets"]),
            quantity(peer["encap_bytes"]),
            str(peer["decap_packets"]),
            quantity(peer["decap_bytes"]),
            str(peer["drops"]),
            "never"
            if peer["last_seen_seconds"] is None
            else f"{span(peer['last_seen_seconds'])} ago",
        )
        for peer in value
    ]
    return columns(head, rows, numbers=range(3, 9))


def lease_lines(value: Json) -> list[str]:
    """Return the human form of `leases`."""
    head = ("SUBNET", "PUBLIC IP", "VTEP MAC", "")
    rows = [
        (
            _both(lease, "subnet", " "),
            " ".join(x for x in (lease["public_ip"], lease["public_ipv6"]) if x),
            _both(lease, "vtep_mac", " ") or "-",
            "reservation" if lease["reservation"] else "",
        )
        for lease in value["leases"]
    ]
    lines = columns(head, rows) if rows else [f"no leases below {value['prefix']}/subnets"]
    return lines + [f"not used: {key}: {why}" for key, why in value["unused"].items()]


def trace_lines(value: Json) -> list[str]:
    """Return the human form of `trace`."""
    lines = [f"{value['address']}: {value['why']}"]
    for name, text in (("kernel_route", "kernel route"), ("underlay_route", "route to the VTEP")):
        if reach := value[name]:
            via = f" via {reach['gateway']}" if reach["gateway"] else ""
            source = f" from {reach['source']}" if reach["source"] else ""
            lines.append(f"  {text:<17}  dev {reach['device']}{via}{source}")
    if route := value["route"]:
        vtep = f"VTEP {route['vtep_mac']} at {route['address']} port {route['port']}"
        lines.insert(2, f"  {'overlay route':<17}  {route['subnet']}, {vtep}")
    return lines


def columns(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Container[int] = ()
) -> list[str]:
    """Return aligned lines, the columns of `numbers` to the right."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in table
    ]


def span(seconds: float) -> str:
    """Return a duration by its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for unit, size, lower, below in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {lower}"
    return f"{whole // 60} min {whole % 60} s"


def quantity(size: float) -> str:
    """Return bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def reload_main(argv: Sequence[str]) -> int:
    """Run `pyflannel-udp reload`: return when a successor of the daemon is READY."""
    command = parse_command(argv, "reload")
    result = ask(
        find_socket(command.options.control_dir, command.vni), "reload", seconds=RELOAD_SECONDS
    )
    print(f"process {result['new']} has taken over from {result['old']}")
    return 0
