"""The network configuration at `<prefix>/config`: JSON to a value, with every rule checked.

Does no I/O. An error names the key, the value and the rule it breaks. Source: spec section 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from pyflannel.control.lease import fold_keys
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import DEFAULT_PORT, Vni

DEFAULT_VNI = Vni(1)
DEVICE_VNI_MAX = 9_999_999
"""`flannel.<VNI>` must fit into the 15 bytes of an interface name (spec section 9.1)."""


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
class NetworkConfig:
    """A valid configuration; the IPv6 fields are None unless `enable_ipv6`.

    `subnet_max` is the base of the last usable subnet, inclusive.
    """

    network: IPv4Network
    subnet_min: IPv4Address
    subnet_max: IPv4Address
    subnet_len: int
    backend: VxlanBackend
    enable_ipv6: bool = False
    enable_nftables: bool = False
    ipv6_network: IPv6Network | None = None
    ipv6_subnet_min: IPv6Address | None = None
    ipv6_subnet_max: IPv6Address | None = None
    ipv6_subnet_len: int | None = None


@dataclass(frozen=True, slots=True)
class _Object:
    """A JSON object whose members are read with their types checked; null means absent."""

    members: Mapping[str, Any]
    path: str = ""

    def _error(self, key: str, rule: str) -> NetworkConfigError:
        value = json.dumps(self.members.get(key.lower()))
        return NetworkConfigError(f"network config: {self.path}{key} {value}: {rule}")

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

    def ipv4(self, key: str) -> IPv4Address | None:
        text = self.text(key)
        try:
            return None if text is None else IPv4Address(text)
        except ValueError:
            raise self._error(key, "must be an IPv4 address") from None

    def ipv6(self, key: str) -> IPv6Address | None:
        text = self.text(key)
        try:
            return None if text is None else IPv6Address(text)
        except ValueError:
            raise self._error(key, "must be an IPv6 address") from None

    def ipv4_network(self, key: str) -> IPv4Network:
        text = self.text(key)
        try:
            return IPv4Network(text if text and "/" in text else "", strict=False)
        except ValueError:
            raise self._error(key, "must be an IPv4 network such as 10.5.0.0/16") from None

    def ipv6_network(self, key: str) -> IPv6Network | None:
        text = self.text(key)
        try:
            return None if text is None else IPv6Network(text, strict=False)
        except ValueError:
            raise self._error(key, "must be an IPv6 network such as fc00::/48") from None

    def fail(self, key: str, rule: str) -> NetworkConfigError:
        """Return the error for a member that breaks a rule between members."""
        return self._error(key, rule)


def _subnet_length(
    config: _Object, key: str, network_key: str, prefix: int, default: int, longest: int
) -> int:
    """Apply the length rules of spec section 3.2; `longest` is 30 or 126."""
    length = config.number(key, 0, 0, 255)
    if length == 0:
        if prefix > longest - 2:
            raise config.fail(
                network_key, f"is too small: its length must be at most {longest - 2}"
            )
        return default if prefix <= default - 2 else prefix + 2
    if length > longest:
        raise config.fail(key, f"must be at most {longest}")
    if length < prefix + 2:
        raise config.fail(key, f"must be at least {prefix + 2}: the network must hold four subnets")
    return length


def _bounds(
    config: _Object,
    prefix: str,
    network: tuple[int, int],
    size: int,
    given: tuple[int | None, int | None],
) -> tuple[int, int]:
    """Return first and last subnet base; `network` is its first and last address."""
    first, last = network
    low = first + size if given[0] in (None, 0) else given[0]
    high = last + 1 - size if given[1] in (None, 0) else given[1]
    assert low is not None and high is not None
    for key, value in ((f"{prefix}SubnetMin", low), (f"{prefix}SubnetMax", high)):
        if not first <= value <= last:
            raise config.fail(key, f"must lie inside {prefix}Network")
        if value % size:
            raise config.fail(key, f"must be the base of a subnet of length {prefix}SubnetLen")
    if low > high:
        raise config.fail(f"{prefix}SubnetMin", f"must not be above {prefix}SubnetMax")
    return low, high


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
    network = config.ipv4_network("Network")
    length = _subnet_length(config, "SubnetLen", "Network", network.prefixlen, 24, 30)
    given = config.ipv4("SubnetMin"), config.ipv4("SubnetMax")
    low, high = _bounds(
        config,
        "",
        (int(network[0]), int(network[-1])),
        1 << (32 - length),
        (None if given[0] is None else int(given[0]), None if given[1] is None else int(given[1])),
    )
    ipv6: dict[str, Any] = {}
    network6 = config.ipv6_network("IPv6Network")
    if config.boolean("EnableIPv6", False):
        if network6 is None:
            raise config.fail("IPv6Network", "is required when EnableIPv6 is true")
        length6 = _subnet_length(
            config, "IPv6SubnetLen", "IPv6Network", network6.prefixlen, 64, 126
        )
        given6 = config.ipv6("IPv6SubnetMin"), config.ipv6("IPv6SubnetMax")
        low6, high6 = _bounds(
            config,
            "IPv6",
            (int(network6[0]), int(network6[-1])),
            1 << (128 - length6),
            (
                None if given6[0] is None else int(given6[0]),
                None if given6[1] is None else int(given6[1]),
            ),
        )
        ipv6 = {
            "enable_ipv6": True,
            "ipv6_network": network6,
            "ipv6_subnet_min": IPv6Address(low6),
            "ipv6_subnet_max": IPv6Address(high6),
            "ipv6_subnet_len": length6,
        }
    return NetworkConfig(
        network=network,
        subnet_min=IPv4Address(low),
        subnet_max=IPv4Address(high),
        subnet_len=length,
        backend=backend,
        enable_nftables=config.boolean("EnableNFTables", False),
        **ipv6,
    )
