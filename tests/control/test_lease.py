"""Lease keys and values: spec sections 4 and 19."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyflannel.control.lease import (
    BadLease,
    KeyValue,
    LeaseAttributes,
    LeasePart,
    LeaseSubnet,
    Vtep,
    config_key,
    lease_key,
    parse_lease_attributes_untrusted,
    parse_lease_untrusted,
    parse_subnet_key_untrusted,
    text_of,
)
from pyflannel.control.lease_writer import OwnIdentity
from pyflannel.dataplane.route import MacAddress, Vni

# Written by flanneld, backend vxlan.
GOLDEN = (
    b'{"PublicIP":"192.168.77.11","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"16:e4:a4:48:1f:d8"}}'
)
GOLDEN_DUAL = (
    b'{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"fe:80:96:2f:2c:42"},'
    b'"BackendV6Data":{"VNI":1,"VtepMAC":"fe:73:35:2a:75:da"}}'
)


def test_flannels_value_is_read_and_written_byte_for_byte() -> None:
    attributes = parse_lease_attributes_untrusted(GOLDEN)
    mac = MacAddress.parse("16:e4:a4:48:1f:d8")
    assert attributes == LeaseAttributes(IPv4Address("192.168.77.11"), None, "vxlan", Vtep(mac, 1))
    assert attributes.to_json() == GOLDEN


def test_flannels_dual_stack_value_is_written_byte_for_byte_and_read_by_family() -> None:
    identity = OwnIdentity(
        IPv4Address("192.168.77.11"),
        MacAddress.parse("fe:80:96:2f:2c:42"),
        public_ipv6=IPv6Address("fd77::11"),
        vtep_mac_v6=MacAddress.parse("fe:73:35:2a:75:da"),
    )
    assert identity.attributes(Vni(1)).to_json() == GOLDEN_DUAL
    key = b"/coreos.com/network/subnets/10.244.100.0-24&2001:db8:42:3a::-64"
    lease = parse_lease_untrusted(KeyValue(key, GOLDEN_DUAL, 1, 1, 1, 0))
    assert lease.part(4) == LeasePart(
        IPv4Network("10.244.100.0/24"), identity.public_ip, Vtep(identity.vtep_mac, 1)
    )
    assert lease.part(6) == LeasePart(
        IPv6Network("2001:db8:42:3a::/64"),
        IPv6Address("fd77::11"),
        Vtep(MacAddress.parse("fe:73:35:2a:75:da"), 1),
    )


@pytest.mark.parametrize(
    ("key", "ipv6"),
    [
        ("10.12.13.0-24", None),
        ("10.12.13.0-24&fd00:12:13::-56", IPv6Network("fd00:12:13::/56")),
    ],
)
def test_valid_keys(key: str, ipv6: IPv6Network | None) -> None:
    subnet = parse_subnet_key_untrusted(f"/coreos.com/network/subnets/{key}")
    assert subnet == LeaseSubnet(IPv4Network("10.12.13.0/24"), ipv6)
    assert str(subnet) == key


@pytest.mark.parametrize(
    "key",
    [
        "10",
        "10.12.13.0",
        "10.12.13-24",
        "10.12.13.300-24",
        "10.12.13.0-24hi",
        "10.12.13.0-32",
        "10.12.13.1-24",
        "&2001::-56",
        "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
        "10.12.13.0-24&2001::-56hi",
        "foo",
        "",
    ],
)
def test_invalid_keys(key: str) -> None:
    with pytest.raises(BadLease):
        parse_subnet_key_untrusted(f"/coreos.com/network/subnets/{key}")


def test_keys_are_joined_without_double_slashes() -> None:
    subnet = LeaseSubnet(IPv4Network("10.5.6.0/24"))
    assert config_key("/coreos.com/network/") == "/coreos.com/network/config"
    assert lease_key("//coreos.com//network", subnet) == "/coreos.com/network/subnets/10.5.6.0-24"


def test_foreign_spellings_are_understood() -> None:
    value = (
        b'{"publicip":"192.0.2.4","BACKENDTYPE":"vxlan",'
        b'"backenddata":{"vtepMAC":"0A-00-00-00-00-04"}}'
    )
    attributes = parse_lease_attributes_untrusted(value)
    assert attributes.vtep == Vtep(MacAddress.parse("0a:00:00:00:00:04"), None)


def test_a_node_without_mac_yet_has_no_vtep() -> None:
    value = GOLDEN.replace(b"16:e4:a4:48:1f:d8", b"")
    assert parse_lease_attributes_untrusted(value).vtep is None


@pytest.mark.parametrize(
    "value",
    [
        b"{bad",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"PublicIP":5}',
        b'{"PublicIP":"192.0.2.300"}',
        GOLDEN.replace(b"16:e4:a4:48:1f:d8", b"17:e4:a4:48:1f:d8"),
        GOLDEN.replace(b"16:e4:a4:48:1f:d8", b"00:00:00:00:00:00"),
        GOLDEN.replace(b'"VNI":1', b'"VNI":"1"'),
        GOLDEN.replace(b'{"VNI":1,"VtepMAC":"16:e4:a4:48:1f:d8"}', b"7"),
    ],
)
def test_bad_values(value: bytes) -> None:
    with pytest.raises(BadLease):
        parse_lease_attributes_untrusted(value)


@given(key=st.binary(max_size=60), position=st.integers(0, len(GOLDEN)), junk=st.binary(max_size=9))
def test_any_mutation_fails_in_one_way(key: bytes, position: int, junk: bytes) -> None:
    value = GOLDEN[:position] + junk + GOLDEN[position + len(junk) :]
    for name in (key, b"/coreos.com/network/subnets/10.5.6.0-24"):
        try:
            lease = parse_lease_untrusted(KeyValue(name, value, 1, 1, 1, 0))
        except BadLease:
            continue
        assert parse_subnet_key_untrusted(str(lease.subnet)) == lease.subnet


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        (b"10.5.1.0-24&fd00::-64", "10.5.1.0-24&fd00::-64"),
        ("größe".encode(), "größe"),
        (b"foo\nE1128 forged\r\x1b[31m", r"foo\nE1128 forged\r\x1b[31m"),
        ("\u202e\x85".encode(), r"\u202e\x85"),
        (b"\xff\\xff", r"\xff\\xff"),
    ],
)
def test_a_key_is_shown_on_one_line_and_steers_no_terminal(octets: bytes, text: str) -> None:
    assert text_of(octets) == text


@pytest.mark.parametrize("field", ["PublicIP", "PublicIPv6", "VtepMAC"])
def test_the_reason_for_a_huge_value_is_short(field: str) -> None:
    vtep = {"VtepMAC": "02:00:00:00:00:01", field: "1" * 1_000_000}
    value = {"PublicIP": "192.0.2.1", **vtep, "BackendType": "vxlan", "BackendData": vtep}
    with pytest.raises(BadLease) as caught:
        parse_lease_attributes_untrusted(json.dumps(value).encode())
    assert field[:8] in str(caught.value)  # the error of an IPv6 address says PublicIP
    assert len(str(caught.value)) < 250
