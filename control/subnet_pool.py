"""Which subnet to ask for: one of the free ones of each family, at random.

Does no I/O. Source: spec section 5.2.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from pyflannel.control.lease import LeaseSubnet
from pyflannel.control.network_config import NetworkConfig, SubnetRange
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPNetwork

CANDIDATES = 100
"""flannel chooses among the first hundred free subnets."""


class SubnetsExhausted(Refusal):
    """Every subnet of the network has a lease."""


def choose_subnet(
    config: NetworkConfig,
    taken: Sequence[LeaseSubnet],
    rng: random.Random,
    previous: LeaseSubnet | None = None,
) -> LeaseSubnet:
    """Return a subnet whose parts overlap none of `taken`; SubnetsExhausted if there is none.

    Each part of `previous` that fits and is free is kept, so that a network that becomes dual
    stack gives no host another IPv4 subnet.
    """
    parts: list[IPNetwork] = []
    for number, subnets in enumerate(config.ranges):
        others = [subnet.parts[number] for subnet in taken if number < len(subnet.parts)]
        old = previous.parts[number] if previous and number < len(previous.parts) else None
        if old is None or not subnets.fits(old) or any(old.overlaps(x) for x in others):
            old = _choose(subnets, others, rng)
        parts.append(old)
    return LeaseSubnet.of(parts)


def _choose(subnets: SubnetRange, taken: Iterable[IPNetwork], rng: random.Random) -> IPNetwork:
    network = subnets.network
    size = 1 << (network.max_prefixlen - subnets.length)
    used: set[int] = set()
    wide: list[range] = []
    for other in taken:
        if other.prefixlen >= subnets.length:
            used.add(int(other.network_address) // size)
        else:
            wide.append(range(int(other[0]), int(other[-1]) + 1))
    free: list[int] = []
    base = int(subnets.first)
    while base <= int(subnets.last) and len(free) < CANDIDATES:
        around = next((addresses for addresses in wide if base in addresses), None)
        if around is not None:
            base = around.stop
            continue
        if base // size not in used:
            free.append(base)
        base += size
    if not free:
        raise SubnetsExhausted(
            f"every subnet from {subnets.first} to {subnets.last} of {network} has "
            "a lease; delete stale leases in etcd or configure a larger network"
        )
    return type(network)((rng.choice(free), subnets.length))
