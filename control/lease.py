"""Leases as etcd holds them: key and JSON value to values, and back byte for byte.

Does no I/O. What other nodes wrote is parsed by functions that end in `_untrusted` and fail in one
way, `BadLease`. Source: spec section 4.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from pyflannel.dataplane.route import IPAddress, IPNetwork, MacAddress

BACKEND_TYPE = "vxlan"
LEASE_TTL_SECONDS = 86400
WHY_CHARS = 200
KEYS_REMEMBERED = 1 << 14
"""A start reads all keys twice, and each event repeats one."""

_KEY = re.compile(
    r"(?P<v4>[0-9]{1,3}(?:\.[0-9]{1,3}){3})-(?P<v4_length>[0-9]{1,2})"
    r"(?:&(?P<v6>[0-9a-f:]+)-(?P<v6_length>[0-9]{1,3}))?"
)


class BadLease(ValueError):
    """A key or value under `<prefix>/subnets` is not a lease; `str()` says why, in a short line."""

    def __init__(self, why: str) -> None:
        # It may quote what is wrong, which may be a megabyte.
        super().__init__(why if len(why) <= WHY_CHARS else f"{why[:WHY_CHARS]}…")


@dataclass(frozen=True, slots=True)
class KeyValue:
    """What etcd says about one key; `lease` is 0 for a key without an etcd lease."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class LeaseSubnet:
    """The subnet of a lease; `str()` is its etcd key form."""

    ipv4: IPv4Network
    ipv6: IPv6Network | None = None

    @classmethod
    def of(cls, parts: Sequence[IPNetwork]) -> LeaseSubnet:
        """Make one of a subnet for each family, IPv4 first."""
        ipv4, ipv6 = parts[0], parts[1] if len(parts) > 1 else None
        assert isinstance(ipv4, IPv4Network) and (ipv6 is None or isinstance(ipv6, IPv6Network))
        return cls(ipv4, ipv6)

    @property
    def parts(self) -> tuple[IPNetwork, ...]:
        """The subnet of each family, IPv4 first."""
        return (self.ipv4,) if self.ipv6 is None else (self.ipv4, self.ipv6)

    def overlaps(self, other: LeaseSubnet) -> bool:
        """Whether the two share an address of any family."""
        return self.ipv4.overlaps(other.ipv4) or (
            self.ipv6 is not None and other.ipv6 is not None and self.ipv6.overlaps(other.ipv6)
        )

    def __str__(self) -> str:
        text = f"{self.ipv4.network_address}-{self.ipv4.prefixlen}"
        if self.ipv6 is not None:
            text += f"&{self.ipv6.network_address}-{self.ipv6.prefixlen}"
        return text


@dataclass(frozen=True, slots=True)
class Vtep:
    """`BackendData` of the vxlan backend; old versions wrote no VNI."""

    mac: MacAddress
    vni: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object in flannel's field order."""
        number = {} if self.vni is None else {"VNI": self.vni}
        return {**number, "VtepMAC": str(self.mac)}


@dataclass(frozen=True, slots=True)
class LeaseAttributes:
    """The value of a lease key; `vtep` is None until the node has a MAC."""

    public_ip: IPv4Address
    public_ipv6: IPv6Address | None
    backend_type: str
    vtep: Vtep | None
    vtep_v6: Vtep | None = None

    def to_json(self) -> bytes:
        """Return the value as flannel writes it, byte for byte (spec section 4.2)."""
        value: dict[str, Any] = {
            "PublicIP": str(self.public_ip),
            "PublicIPv6": None if self.public_ipv6 is None else str(self.public_ipv6),
        }
        if self.backend_type:
            value["BackendType"] = self.backend_type
        if self.vtep is not None:
            value["BackendData"] = self.vtep.to_json()
        if self.vtep_v6 is not None:
            value["BackendV6Data"] = self.vtep_v6.to_json()
        return json.dumps(value, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class LeasePart:
    """What a lease says about one address family; None is what the node has not told."""

    subnet: IPNetwork
    public_ip: IPAddress | None
    vtep: Vtep | None


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease with etcd's bookkeeping; `etcd_lease` 0 marks a reservation (spec section 5.4)."""

    subnet: LeaseSubnet
    attributes: LeaseAttributes
    create_revision: int
    mod_revision: int
    etcd_lease: int

    def part(self, version: int) -> LeasePart | None:
        """Return the part of a family, 4 or 6; None where the lease has no subnet of it."""
        told = self.attributes
        if version == 4:
            return LeasePart(self.subnet.ipv4, told.public_ip, told.vtep)
        if self.subnet.ipv6 is None:
            return None
        return LeasePart(self.subnet.ipv6, told.public_ipv6, told.vtep_v6)

    def entry(self, key: bytes) -> KeyValue:
        """Return what etcd has under its key, as far as we know it."""
        value = self.attributes.to_json()
        return KeyValue(key, value, self.create_revision, self.mod_revision, 1, self.etcd_lease)


def text_of(octets: bytes) -> str:
    """Return a key or value for people to read: on one line, and nothing steers their terminal.

    What is not printable is escaped as in Python and in the shell's $'…', a backslash too.
    """
    found = []
    for x in octets.decode("utf-8", "surrogateescape"):
        if x.isprintable() and x != "\\":
            found.append(x)
        else:
            byte = ord(x) - 0xDC00  # what is not UTF-8 comes as a surrogate
            found.append(f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(x)[1:-1])
    return "".join(found)


def _join(*parts: str) -> str:
    return posixpath.normpath("/" + "/".join(parts)).replace("//", "/")


def config_key(prefix: str) -> str:
    """Return the key of the network configuration."""
    return _join(prefix, "config")


def subnets_prefix(prefix: str) -> str:
    """Return what all lease keys begin with; no slash at its end."""
    return _join(prefix, "subnets")


def lease_key(prefix: str, subnet: LeaseSubnet) -> str:
    """Return the key of the lease of this subnet."""
    return f"{subnets_prefix(prefix)}/{subnet}"


@lru_cache(maxsize=KEYS_REMEMBERED)
def parse_subnet_key_untrusted(key: str) -> LeaseSubnet:
    """Read the last component of a lease key; BadLease otherwise (spec section 4.1)."""
    match = _KEY.fullmatch(key.rsplit("/", 1)[-1])
    if match is None:
        raise BadLease("the key is not a subnet")
    v4_length, v6_length = int(match["v4_length"]), int(match["v6_length"] or 0)
    if v4_length > 31 or v6_length > 127:
        raise BadLease("the key's prefix length is out of range")
    try:
        ipv4 = IPv4Network((match["v4"], v4_length))
        ipv6 = IPv6Network((match["v6"], v6_length)) if match["v6"] is not None else None
    except ValueError as error:
        raise BadLease(f"the key is not a subnet: {error}") from None
    return LeaseSubnet(ipv4, ipv6)


def fold_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object with lower-case keys, the last of equal ones; as Go reads JSON."""
    return {key.lower(): value for key, value in pairs}


_DECODER = json.JSONDecoder(object_pairs_hook=fold_keys)


def _parse_vtep(value: Any, name: str) -> Vtep | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadLease(f"{name} is not an object")
    mac, vni = value.get("vtepmac"), value.get("vni")
    if vni is not None and (not isinstance(vni, int) or isinstance(vni, bool)):
        raise BadLease(f"{name}.VNI is not a number")
    if mac is None or mac == "":
        return None
    if not isinstance(mac, str):
        raise BadLease(f"{name}.VtepMAC is not a string")
    try:
        address = MacAddress.parse(mac)
    except ValueError as error:
        raise BadLease(f"{name}.VtepMAC: {error}") from None
    if not address.is_vtep:
        raise BadLease(f"{name}.VtepMAC {address} cannot be a VTEP's")
    return Vtep(address, vni)


def parse_lease_attributes_untrusted(value: bytes) -> LeaseAttributes:
    """Read a lease's JSON value; BadLease otherwise."""
    try:
        parsed = _DECODER.decode(value.decode())
    except (ValueError, RecursionError):
        raise BadLease("the value is not JSON") from None
    if not isinstance(parsed, dict):
        raise BadLease("the value is not a JSON object")
    public_ip, public_ipv6 = parsed.get("publicip"), parsed.get("publicipv6")
    backend_type = parsed.get("backendtype") or ""
    if not isinstance(public_ip, str):
        raise BadLease("PublicIP is missing")
    if not isinstance(backend_type, str):
        raise BadLease("BackendType is not a string")
    if public_ipv6 is not None and not isinstance(public_ipv6, str):
        raise BadLease("PublicIPv6 is not a string")
    try:
        address = IPv4Address(public_ip)
        address_v6 = IPv6Address(public_ipv6) if public_ipv6 else None
    except AddressValueError as error:
        raise BadLease(f"PublicIP: {error}") from None
    if backend_type != BACKEND_TYPE:
        return LeaseAttributes(address, address_v6, backend_type, None)
    return LeaseAttributes(
        address,
        address_v6,
        backend_type,
        _parse_vtep(parsed.get("backenddata"), "BackendData"),
        _parse_vtep(parsed.get("backendv6data"), "BackendV6Data"),
    )


def may_be_of(kv: KeyValue, told: IPAddress | MacAddress) -> bool:
    """Whether an entry can tell a public IP or VTEP MAC, without the cost of reading it.

    JSON could spell them in other ways, but no node of flannel's or ours does.
    """
    return str(told).encode() in kv.value


def parse_lease_untrusted(kv: KeyValue) -> Lease:
    """Read a key and its value; BadLease otherwise."""
    try:
        key = kv.key.decode("utf-8")
    except UnicodeDecodeError:
        raise BadLease("the key is not text") from None
    return Lease(
        parse_subnet_key_untrusted(key),
        parse_lease_attributes_untrusted(kv.value),
        kv.create_revision,
        kv.mod_revision,
        kv.lease,
    )
