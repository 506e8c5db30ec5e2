"""Which subnet to ask for: one of the free ones, at random. Does no I/O; spec section 5.2."""

from __future__ import annotations

import random
from collections.abc import Iterable
from ipaddress import IPv4Network

from pyflannel.control.lease import LeaseSubnet
from pyflannel.control.network_config import NetworkConfig
from pyflannel.dataplane.refusal import Refusal

CANDIDATES = 100
"""flannel chooses among the first hundred free subnets."""


class SubnetsExhausted(Refusal):
    """Every subnet of the network has a lease."""


def is_compatible(config: NetworkConfig, subnet: LeaseSubnet) -> bool:
    """Whether a lease of this subnet fits the configuration."""
    if subnet.ipv4.prefixlen != config.subnet_len:
        return False
    if not config.subnet_min <= subnet.ipv4.network_address <= config.subnet_max:
        return False
    return subnet.ipv6 is None


def choose_subnet(
    config: NetworkConfig, taken: Iterable[IPv4Network], rng: random.Random
) -> IPv4Network:
    """Return a subnet that overlaps none of `taken`; SubnetsExhausted if there is none."""
    size = 1 << (32 - config.subnet_len)
    used: set[int] = set()
    wide: list[IPv4Network] = []
    for network in taken:
        if network.prefixlen >= config.subnet_len:
            used.add(int(network.network_address) // size)
        else:
            wide.append(network)
    free: list[IPv4Network] = []
    for base in range(int(config.subnet_min), int(config.subnet_max) + 1, size):
        if base // size in used:
            continue
        candidate = IPv4Network((base, config.subnet_len))
        if not any(candidate.subnet_of(network) for network in wide):
            free.append(candidate)
            if len(free) == CANDIDATES:
                break
    if not free:
        raise SubnetsExhausted(
            f"every subnet from {config.subnet_min} to {config.subnet_max} of {config.network} has "
            "a lease; delete stale leases in etcd or configure a larger network"
        )
    return rng.choice(free)
