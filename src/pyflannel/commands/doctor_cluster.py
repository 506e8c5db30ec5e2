"""Checks of what lies around this host: etcd, the configuration, leases, the way to each peer.

Each function looks at one thing and returns what is amiss, nothing where all is well.
"""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import shlex
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from pyflannel.command_line.options import Options
from pyflannel.commands.echo import echo
from pyflannel.commands.finding import Finding, failure, warning
from pyflannel.control.etcd import Reading
from pyflannel.control.lease import Lease, LeasePart, config_key, lease_key
from pyflannel.control.lease_list import LeaseList
from pyflannel.control.network_config import (
    NetworkConfig,
    NetworkConfigError,
    parse_network_config_untrusted,
)
from pyflannel.control.vtep_identity import load_vtep_mac
from pyflannel.dataplane.interface import Interface
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, IPNetwork, MacAddress
from pyflannel.etcd_access import ask_etcd
from pyflannel.node.underlying import MTU_MIN_BYTES, Underlying

ETCD_SECONDS = 5.0
CLOCK_SECONDS = 5.0
ECHO_SECONDS = 1.0
ECHO_BYTES = 84
NAMED = 5
"""Of many peers with the same trouble so many are named."""


async def check_etcd(options: Options) -> tuple[Reading | None, list[Finding]]:
    """Ask every endpoint for the configuration; return one's answer, and who gave none and why."""
    key = config_key(options.etcd_prefix)

    async def ask(endpoint: str) -> Reading | Refusal:
        alone = replace(options, etcd_endpoints=(endpoint,))
        try:
            return await ask_etcd(alone, lambda etcd: etcd.get(key), ETCD_SECONDS)
        except Refusal as error:
            return error

    answers = await asyncio.gather(*(ask(endpoint) for endpoint in options.etcd_endpoints))
    found = [answer for answer in answers if isinstance(answer, Reading)]
    say = warning if found else failure
    findings = []
    for endpoint, answer in zip(options.etcd_endpoints, answers):
        if isinstance(answer, Refusal):
            sentence, _, remedy = str(answer).partition("; ")
            named = sentence if endpoint in sentence else f"{endpoint}: {sentence}"
            findings.append(say(named, remedy))
    return (max(found, key=lambda x: x.revision) if found else None), findings


def check_config(reading: Reading, key: str) -> tuple[NetworkConfig | None, list[Finding]]:
    """Read the network configuration with every rule of it."""
    if reading.kv is None:
        return None, [
            failure(
                f"etcd has no key {key}, so there is no network to join",
                f"""etcdctl put {key} '{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"}}}}'""",
            )
        ]
    try:
        return parse_network_config_untrusted(reading.kv.value), []
    except NetworkConfigError as error:
        return None, [failure(str(error), f"correct {key} in etcd")]


async def check_clock(options: Options) -> list[Finding]:
    """Compare the clocks: a wrong one makes certificates invalid and the times in logs useless."""
    loop = asyncio.get_running_loop()
    readings = await asyncio.gather(
        *(
            loop.run_in_executor(None, _seconds_ahead, endpoint, options)
            for endpoint in options.etcd_endpoints
        )
    )
    for endpoint, ahead in zip(options.etcd_endpoints, readings):
        if ahead is None:
            continue
        if abs(ahead) > CLOCK_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            return [
                warning(
                    f"this host's clock is {abs(ahead):.0f} s {way} that of {endpoint}",
                    "set the clock of both by NTP",
                )
            ]
        return []
    return []


def _seconds_ahead(endpoint: str, options: Options) -> float | None:
    """Return how far our clock is ahead of the Date in an HTTP answer, None without an answer."""
    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port or 2379
    connection = http.client.HTTPConnection(host, port, timeout=ETCD_SECONDS)
    try:
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=ETCD_SECONDS, context=_tls(options)
            )
        connection.request("GET", "/version")
        date = connection.getresponse().headers.get("Date", "")
        # etcd's Date is cut to whole seconds.
        return time.time() - email.utils.parsedate_to_datetime(date).timestamp() - 0.5
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _tls(options: Options) -> ssl.SSLContext:
    # A clock that is off by years makes the certificate look invalid, and is what we look for.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if options.etcd_certfile is not None:
        context.load_cert_chain(options.etcd_certfile, options.etcd_keyfile)
    return context


def check_leases(found: LeaseList) -> Iterator[Finding]:
    """No two leases may have one public IP or VTEP MAC, and every key must be a lease."""
    by_address: dict[IPAddress, list[LeasePart]] = {}
    by_mac: dict[tuple[int, MacAddress], list[LeasePart]] = {}
    for _, part in _parts(found.leases):
        if part.public_ip is not None:
            by_address.setdefault(part.public_ip, []).append(part)
        if part.vtep is not None:
            by_mac.setdefault((part.subnet.version, part.vtep.mac), []).append(part)
    for address, parts in by_address.items():
        if len(parts) > 1:
            subnets = ", ".join(str(part.subnet) for part in parts)
            yield failure(
                f"the leases {subnets} have one public IP, {address}",
                f"give each host its own {_flag(address)}, and delete the key of a host that is "
                "gone",
            )
    for (_, mac), parts in by_mac.items():
        # What one host has left of itself is told above.
        if len({part.public_ip for part in parts}) > 1:
            told = ", ".join(f"{part.subnet} at {part.public_ip}" for part in parts)
            yield failure(
                f"the leases {told} have one VTEP MAC, {mac}, as where one host is a copy of "
                "another: only one of them is reached",
                "restart pyflannel-udp on all of them but one, which gives each a MAC of its own; "
                "delete the key of a host that is gone",
            )
    for key, why in found.bad.items():
        yield warning(f"{key} in etcd is not a lease: {why}", f"etcdctl del {_word(key)}")


def _word(key: str) -> str:
    """Return a key as one word of a shell, where `text_of` has escaped something too."""
    return "$'{}'".format(key.replace("'", "\\'")) if "\\" in key else shlex.quote(key)


def check_unused(unused: Mapping[str, str], found: LeaseList) -> Iterator[Finding]:
    """The running daemon must use every lease; of each that it does not it gives the reason."""
    for key, why in unused.items():
        if key not in found.bad:
            yield warning(
                f"the daemon does not use the lease {key}: {why}",
                f"correct that, or etcdctl del {_word(key)} if its host is gone",
            )


def _parts(leases: Iterable[Lease]) -> Iterator[tuple[Lease, LeasePart]]:
    """Yield what each lease says of each family that it has a subnet of."""
    for lease in leases:
        for version in (4, 6):
            if (part := lease.part(version)) is not None:
                yield lease, part


def _flag(public_ip: IPAddress) -> str:
    return "--public-ip" if public_ip.version == 4 else "--public-ipv6"


def check_own_lease(
    found: LeaseList, public_ip: IPAddress, options: Options, device: str, machine_id: str
) -> Iterator[Finding]:
    """Nobody else may have our public IP: the VTEP MAC kept on this host tells."""
    ours = load_vtep_mac(options.state_dir / f"{device}.json", machine_id)
    for _, part in _parts(found.leases):
        if part.public_ip == public_ip and part.vtep and ours and part.vtep.mac != ours:
            yield failure(
                f"the lease {part.subnet} has our public IP {public_ip} and the VTEP MAC "
                f"{part.vtep.mac}, where this host has {ours}: another host uses our address",
                f"give each its own {_flag(public_ip)}",
            )


def check_addresses(
    interfaces: Iterable[Interface],
    devices: Collection[str],
    underlying: Iterable[Underlying],
    networks: Sequence[IPNetwork],
    peers: Collection[LeasePart],
) -> Iterator[Finding]:
    """Our public IPs must be outside the network, our other addresses of no peer's subnet."""
    for each in underlying:
        for network in networks:
            if each.public_ip in network:
                yield failure(
                    f"our public IP {each.public_ip} lies inside the overlay network {network}, so "
                    "pyflannel-udp on other hosts does not use our lease",
                    f"set another network in etcd, or another --iface or {_flag(each.public_ip)}",
                )
    for interface in interfaces:
        for found in interface.addresses if interface.name not in devices else ():
            for part in peers:
                if found.address in part.subnet:
                    yield warning(
                        f"{interface.name} has the address {found.address}/{found.prefixlen}, and "
                        f"the subnet {part.subnet} is that of {part.public_ip}: of its containers "
                        "and those here one side is cut off",
                        f"give {interface.name} an address of this host's subnet, or outside of "
                        "the network; docs/docker.md tells how Docker gets it",
                    )


async def check_path_mtu(
    addresses: Collection[IPAddress], outer_mtu: int
) -> tuple[set[IPAddress], list[Finding]]:
    """Find the largest packet that reaches each peer whole; return who answers at all, too."""
    reached = await echo(dict.fromkeys(addresses, 0), ECHO_SECONDS)
    whole = await echo(dict.fromkeys(reached, outer_mtu), ECHO_SECONDS)
    low = {address: MTU_MIN_BYTES[address.version] for address in reached - whole}
    high = dict.fromkeys(low, outer_mtu)
    while sizes := {x: (low[x] + high[x]) // 2 for x in low if high[x] - low[x] > 1}:
        answered = await echo(sizes, ECHO_SECONDS)
        for address, size in sizes.items():
            (low if address in answered else high)[address] = size
    findings = [
        warning(
            f"the way to {address} carries packets of {size} bytes at most, not {outer_mtu}",
            f"raise the MTU on the way, or set Backend.MTU to {size} in etcd",
        )
        for address, size in sorted(low.items(), key=str)
    ]
    return reached, _few(findings)


def peers_of(leases: Iterable[Lease], ours: Collection[IPAddress]) -> dict[LeasePart, Lease]:
    """Return the parts of others' leases, in our families, that packets could be sent to.

    `ours` are our public IPs, one of each family.
    """
    versions = [address.version for address in ours]
    return {
        part: lease
        for lease, part in _parts(leases)
        if part.subnet.version in versions
        and part.public_ip is not None
        and part.public_ip not in ours
        and part.vtep is not None
    }


async def check_vteps(
    peers: Mapping[LeasePart, Lease],
    reached: Collection[IPAddress],
    prefix: str,
    why_not_sent: Callable[[IPAddress], str | None],
) -> list[Finding]:
    """Ask each peer for an echo over the overlay, at the address of its VTEP.

    Of some that give none `why_not_sent` is asked whether this host keeps packets to them back.
    """
    bases = {part.subnet.network_address: part for part in peers}
    answered = await echo(dict.fromkeys(bases, ECHO_BYTES), ECHO_SECONDS)
    findings: list[Finding] = []
    for base, part in bases.items():
        if base in answered:
            continue
        why = why_not_sent(base) if len(findings) < NAMED else None
        where = f"{base}, the VTEP of {part.subnet} at {part.public_ip}, does not answer"
        if why is not None:
            findings.append(
                failure(f"{where}: {why}", f"`pyflannel-udp trace {base}` shows its way")
            )
        elif part.public_ip in reached:
            findings.append(
                failure(
                    f"{where} over the overlay, though the host itself does",
                    "look whether flannel runs there and whether UDP 8472 is open on the way",
                )
            )
        else:
            findings.append(
                warning(
                    f"{where}, nor does the host itself",
                    f"look whether it is up; if it is gone, etcdctl del "
                    f"{shlex.quote(lease_key(prefix, peers[part].subnet))}",
                )
            )
    return _few(findings)


def _few(findings: list[Finding]) -> list[Finding]:
    """Return some findings of a kind, and how many more there are."""
    if len(findings) <= NAMED:
        return findings
    worst = max(findings, key=lambda x: x.severity)
    rest = replace(worst, sentence=f"{len(findings) - NAMED} more peers have the same trouble")
    return [*findings[:NAMED], rest]
