"""The network configuration at `<prefix>/config`: JSON to a value, with every rule checked.

Does no I/O. An error names the key, the value and the rule it breaks. Source: spec section 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from pyflannel.control.lease import LeaseSubnet, fold_keys
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import DEFAULT_PORT, IPAddress, IPNetwork, Vni

QUOTED_CHARS = 80
DEFAULT_VNI = Vni(1)
DEVICE_VNI_MAX = 9_999_999
DEVICE_V6_VNI_MAX = 9_999
"""`flannel.<VNI>` and `flannel-v6.<VNI>` must fit into the 15 bytes of an interface name."""


class NetworkConfigError(Refusal):
    """The network configuration in etcd cannot be used."""


@dataclass(frozen=True, slots=True)
class VxlanBackend:
    """The `Backend` object; `mtu` is the outer MTU, None for the interface's own."""

    vni: Vni = DEFAULT_VNI
    port: int = DEFAULT_PORT
    mtu: int | None = None
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False


@dataclass(frozen=True, slots=True)
class SubnetRange:
    """The subnets of one family's network that may be leased.

    `last` is the base of the last one, inclusive; `length` is their prefix length.
    """

    network: IPNetwork
    first: IPAddress
    last: IPAddress
    length: int

    def fits(self, subnet: IPNetwork) -> bool:
        """Whether a lease may have this subnet of the same family."""
        return subnet.prefixlen == self.length and int(self.first) <= int(
            subnet.network_address
        ) <= int(self.last)


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """A valid configuration; `ipv6` is None unless the network is dual stack."""

    ipv4: SubnetRange
    ipv6: SubnetRange | None
    backend: VxlanBackend
    enable_nftables: bool = False

    @property
    def ranges(self) -> tuple[SubnetRange, ...]:
        """The range of each family that is on, IPv4 first."""
        return (self.ipv4,) if self.ipv6 is None else (self.ipv4, self.ipv6)

    def fits(self, subnet: LeaseSubnet) -> bool:
        """Whether a lease of this subnet has the families that are on, each within its range."""
        if not self.ipv4.fits(subnet.ipv4) or (self.ipv6 is None) != (subnet.ipv6 is None):
            return False
        return self.ipv6 is None or subnet.ipv6 is None or self.ipv6.fits(subnet.ipv6)


_ADDRESS: Mapping[int, Callable[[str], IPAddress]] = {4: IPv4Address, 6: IPv6Address}
_NETWORK: Mapping[int, Callable[..., IPNetwork]] = {4: IPv4Network, 6: IPv6Network}
_EXAMPLE = {4: "10.5.0.0/16", 6: "fc00::/48"}
# By family: the prefix of its keys, its usual subnet length, the longest one.
_KEYS = {4: ("", 24, 30), 6: ("IPv6", 64, 126)}


@dataclass(frozen=True, slots=True)
class _Object:
    """A JSON object whose members are read with their types checked; null means absent."""

    members: Mapping[str, Any]
    path: str = ""

    def _error(self, key: str, rule: str) -> NetworkConfigError:
        value = json.dumps(self.members.get(key.lower()))
        shown = value if len(value) <= QUOTED_CHARS else f"{value[:QUOTED_CHARS]}…"
        return NetworkConfigError(f"network config: {self.path}{key} {shown}: {rule}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self.members.get(key.lower())
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, "must be true or false")
        return value

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self.members.get(key.lower())
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(key, "must be a whole number")
        if not low <= value <= high:
            raise self._error(key, f"must be in {low}..{high}")
        return value

    def text(self, key: str) -> str | None:
        value = self.members.get(key.lower())
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self._error(key, "must be a string")
        return value

    def object(self, key: str) -> _Object | None:
        value = self.members.get(key.lower())
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(key, "must be an object")
        return _Object(value, f"{self.path}{key}.")

    def address(self, key: str, version: int) -> IPAddress | None:
        text = self.text(key)
        try:
            return None if text is None else _ADDRESS[version](text)
        except ValueError:
            raise self._error(key, f"must be an IPv{version} address") from None

    def network(self, key: str, version: int) -> IPNetwork:
        text = self.text(key)
        try:
            return _NETWORK[version](text if text and "/" in text else "", strict=False)
        except ValueError:
            example = _EXAMPLE[version]
            raise self._error(key, f"must be an IPv{version} network such as {example}") from None

    def fail(self, key: str, rule: str) -> NetworkConfigError:
        """Return the error for a member that breaks a rule between members."""
        return self._error(key, rule)


def _subnet_length(config: _Object, version: int, network: IPNetwork) -> int:
    """Apply the length rules of spec section 3.2."""
    prefix, usual, longest = _KEYS[version]
    key = f"{prefix}SubnetLen"
    length = config.number(key, 0, 0, 255)
    if length == 0:
        if network.prefixlen > longest - 2:
            raise config.fail(
                f"{prefix}Network", f"is too small: its length must be at most {longest - 2}"
            )
        return usual if network.prefixlen <= usual - 2 else network.prefixlen + 2
    if length > longest:
        raise config.fail(key, f"must be at most {longest}")
    if length < network.prefixlen + 2:
        raise config.fail(
            key, f"must be at least {network.prefixlen + 2}: the network must hold four subnets"
        )
    return length


def _subnet_range(config: _Object, version: int) -> SubnetRange:
    """Apply the rules of spec section 3.2 to one family's members."""
    prefix = _KEYS[version][0]
    network = config.network(f"{prefix}Network", version)
    length = _subnet_length(config, version, network)
    size = 1 << (network.max_prefixlen - length)
    first, last = int(network[0]), int(network[-1])
    bounds = []
    for key, default in (
        (f"{prefix}SubnetMin", first + size),
        (f"{prefix}SubnetMax", last + 1 - size),
    ):
        given = config.address(key, version)
        value = int(given) if given is not None and int(given) else default
        if not first <= value <= last:
            raise config.fail(key, f"must lie inside {prefix}Network")
        if value % size:
            raise config.fail(key, f"must be the base of a subnet of length {prefix}SubnetLen")
        bounds.append(value)
    if bounds[0] > bounds[1]:
        raise config.fail(f"{prefix}SubnetMin", f"must not be above {prefix}SubnetMax")
    return SubnetRange(network, network[bounds[0] - first], network[bounds[1] - first], length)


def _parse_backend(config: _Object) -> VxlanBackend:
    backend = config.object("Backend")
    if backend is None:
        raise NetworkConfigError(
            "network config: Backend is missing, so flannel nodes would run their udp backend; "
            'set "Backend": {"Type": "vxlan"}'
        )
    kind = backend.text("Type")
    if kind is None or kind.lower() != "vxlan":
        raise backend.fail("Type", 'must be "vxlan", the only backend pyflannel-udp speaks')
    if backend.boolean("GBP", False):
        raise backend.fail("GBP", "group policy needs the kernel's device; set it to false")
    mtu = backend.number("MTU", 0, 0, 65535)
    return VxlanBackend(
        vni=Vni(backend.number("VNI", DEFAULT_VNI, 0, DEVICE_VNI_MAX)),
        port=backend.number("Port", 0, 0, 65535) or DEFAULT_PORT,
        mtu=mtu or None,
        learning=backend.boolean("Learning", False),
        direct_routing=backend.boolean("DirectRouting", False),
    )


def parse_network_config_untrusted(text: bytes) -> NetworkConfig:
    """Read and check the configuration; NetworkConfigError names key, value and rule."""
    try:
        parsed = json.loads(text, object_pairs_hook=fold_keys)
    except (ValueError, RecursionError) as error:
        raise NetworkConfigError(f"network config: not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise NetworkConfigError("network config: must be a JSON object")
    config = _Object(parsed)
    if not config.boolean("EnableIPv4", True):
        raise config.fail("EnableIPv4", "etcd has no key for a lease without IPv4; set it to true")
    backend = _parse_backend(config)
    ipv4 = _subnet_range(config, 4)
    ipv6 = None
    if config.boolean("EnableIPv6", False):
        ipv6 = _subnet_range(config, 6)
        if backend.vni > DEVICE_V6_VNI_MAX:
            raise NetworkConfigError(
                f"network config: Backend.VNI {backend.vni}: must be at most {DEVICE_V6_VNI_MAX} "
                f"with EnableIPv6, as flannel-v6.{backend.vni} is too long for a device's name"
            )
    return NetworkConfig(
        ipv4=ipv4,
        ipv6=ipv6,
        backend=backend,
        enable_nftables=config.boolean("EnableNFTables", False),
    )
