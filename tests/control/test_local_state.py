"""What a host keeps and chooses by itself: subnet.env, the VTEP MAC, a free subnet."""

from __future__ import annotations

import os
import random
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from pyflannel.control.lease import LeaseSubnet
from pyflannel.control.network_config import NetworkConfig, parse_network_config_untrusted
from pyflannel.control.subnet_file import SubnetFile, read_previous_subnet, write_subnet_file
from pyflannel.control.subnet_pool import SubnetsExhausted, choose_subnet
from pyflannel.control.vtep_identity import load_vtep_mac, pick_vtep_mac, save_vtep_mac
from pyflannel.dataplane.route import MacAddress

# Written by flanneld with --ip-masq.
GOLDEN = (
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.35.1/24\n"
    "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
)
GOLDEN_DUAL = (
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.100.1/24\n"
    "FLANNEL_IPV6_NETWORK=2001:db8:42::/56\nFLANNEL_IPV6_SUBNET=2001:db8:42:3a::1/64\n"
    "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
)
MAC = MacAddress.parse("0a:00:00:00:00:01")


def config(subnet_len: int = 24, network: str = "10.5.0.0/16") -> NetworkConfig:
    text = f'{{"Network":"{network}","SubnetLen":{subnet_len},"Backend":{{"Type":"vxlan"}}}}'
    return parse_network_config_untrusted(text.encode())


def test_subnet_file_is_flannels_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "flannel" / "subnet.env"
    subnet = IPv4Network("10.244.35.0/24")
    old = os.umask(0o077)
    try:
        pairs = ((IPv4Network("10.244.0.0/16"), subnet),)
        write_subnet_file(path, SubnetFile(pairs, 1450, True))
    finally:
        os.umask(old)
    assert path.read_text() == GOLDEN
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]
    assert read_previous_subnet(path) == LeaseSubnet(subnet)


def test_subnet_file_of_dual_stack(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    subnet = LeaseSubnet(IPv4Network("10.244.100.0/24"), IPv6Network("2001:db8:42:3a::/64"))
    networks = IPv4Network("10.244.0.0/16"), IPv6Network("2001:db8:42::/56")
    write_subnet_file(path, SubnetFile(tuple(zip(networks, subnet.parts)), 1450, True))
    assert path.read_text() == GOLDEN_DUAL
    assert read_previous_subnet(path) == subnet


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        ("# old\nexport FLANNEL_SUBNET='10.5.7.1/24'\n", "10.5.7.0/24"),
        ('FLANNEL_SUBNET = "10.5.7.1/24"\n', "10.5.7.0/24"),
        ("FLANNEL_SUBNET=10.5.7.1/24,10.5.8.1/24\n", None),
        ("FLANNEL_SUBNET=\n", None),
        ("nonsense", None),
        ("FLANNEL_SUBNET=10.5.7.300/24\n", None),
    ],
)
def test_previous_subnet(tmp_path: Path, text: str, subnet: str | None) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text)
    expected = None if subnet is None else LeaseSubnet(IPv4Network(subnet))
    assert read_previous_subnet(path) == expected


def test_no_previous_subnet(tmp_path: Path) -> None:
    assert read_previous_subnet(tmp_path / "none") is None


def test_vtep_mac_is_kept_by_its_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "flannel.1.json"
    assert load_vtep_mac(path, "a") is None
    save_vtep_mac(path, "a", MAC)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_vtep_mac(path, "a") == MAC
    assert load_vtep_mac(path, "b") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"machine_id":"a"}', '{"machine_id":"a","vtep_mac":7}',
     '{"machine_id":"a","vtep_mac":"01:00:00:00:00:01"}'],
)  # fmt: skip
def test_broken_state_is_not_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    assert load_vtep_mac(path, "a") is None


def test_origin_of_the_mac() -> None:
    kernel, lease = MacAddress.parse("0a:00:00:00:00:02"), MacAddress.parse("0a:00:00:00:00:03")
    assert pick_vtep_mac(MAC, kernel, lease, os.urandom)[0] == MAC
    assert pick_vtep_mac(None, kernel, lease, os.urandom)[0] == kernel
    assert pick_vtep_mac(None, None, lease, os.urandom)[0] == lease
    made, origin = pick_vtep_mac(None, None, None, lambda n: b"\xff" * n)
    assert (str(made), origin) == ("fe:ff:ff:ff:ff:ff", "new")


def test_chosen_subnets_are_free_aligned_and_inside() -> None:
    rng = random.Random(1)
    small = config(26, "10.5.0.0/24")
    taken: list[LeaseSubnet] = []
    for _ in range(3):
        taken.append(choose_subnet(small, taken, rng))
    assert set(map(str, taken)) == {"10.5.0.64-26", "10.5.0.128-26", "10.5.0.192-26"}
    with pytest.raises(SubnetsExhausted, match="larger network"):
        choose_subnet(small, taken, rng)


def test_wider_and_narrower_leases_are_kept_clear_of() -> None:
    small = config(26, "10.5.0.0/24")
    for taken in ("10.5.0.128/25", "10.5.0.130/32"):
        for seed in range(20):
            other = LeaseSubnet(IPv4Network(taken))
            assert not choose_subnet(small, [other], random.Random(seed)).overlaps(other)


def test_choice_is_among_the_first_hundred() -> None:
    chosen = {str(choose_subnet(config(), [], random.Random(seed))) for seed in range(3000)}
    assert chosen == {f"10.5.{n}.0-24" for n in range(1, 101)}


def config_dual(network: str = "2001:db8:42::/56") -> NetworkConfig:
    text = (
        f'{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"{network}",'
        '"Backend":{"Type":"vxlan"}}'
    )
    return parse_network_config_untrusted(text.encode())


def test_each_family_is_chosen_for_itself() -> None:
    taken = [LeaseSubnet(IPv4Network("10.5.9.0/24"), IPv6Network("2001:db8:42:0::/58"))]
    for seed in range(200):
        chosen = choose_subnet(config_dual(), taken, random.Random(seed))
        assert chosen.ipv6 is not None
        assert config_dual().fits(chosen)
        assert not chosen.overlaps(taken[0])


def test_each_part_of_the_previous_subnet_is_kept_if_it_fits_and_is_free() -> None:
    ipv4, ipv6 = IPv4Network("10.5.7.0/24"), IPv6Network("2001:db8:42:7::/64")
    other = LeaseSubnet(IPv4Network("10.5.8.0/24"), ipv6)
    rng = random.Random(1)
    assert choose_subnet(config(), [other], rng, LeaseSubnet(ipv4, ipv6)) == LeaseSubnet(ipv4)
    grown = choose_subnet(config_dual(), [other], rng, LeaseSubnet(ipv4))
    assert grown.ipv4 == ipv4
    assert config_dual().fits(grown)
    both = LeaseSubnet(ipv4, ipv6)
    assert choose_subnet(config_dual(), [], rng, both) == both
    assert choose_subnet(config_dual(), [other], rng, both).ipv6 != ipv6
    wrong = LeaseSubnet(IPv4Network("10.6.7.0/24"), ipv6)
    kept = choose_subnet(config_dual(), [], rng, wrong)
    assert (kept.ipv4.supernet(8), kept.ipv6) == (IPv4Network("10.5.0.0/16"), ipv6)


def test_a_wide_lease_in_a_wide_network_is_stepped_over() -> None:
    taken = [LeaseSubnet(IPv4Network("10.5.9.0/24"), IPv6Network("fd00::/9"))]
    chosen = choose_subnet(config_dual("fd00::/8"), taken, random.Random(1)).ipv6
    assert chosen is not None
    assert chosen.subnet_of(IPv6Network("fd80::/9"))


@pytest.mark.parametrize(
    ("subnet", "ipv6", "fits"),
    [
        ("10.5.1.0/24", "2001:db8:42:1::/64", True),
        ("10.5.1.0/24", "2001:db8:42::/64", False),
        ("10.5.1.0/24", "2001:db8:42:1::/65", False),
        ("10.6.1.0/24", "2001:db8:42:1::/64", False),
        ("10.5.1.0/24", None, False),
    ],
)
def test_dual_stack_fits(subnet: str, ipv6: str | None, fits: bool) -> None:
    lease = LeaseSubnet(IPv4Network(subnet), None if ipv6 is None else IPv6Network(ipv6))
    assert config_dual().fits(lease) is fits
    assert not config().fits(LeaseSubnet(lease.ipv4, IPv6Network("2001:db8:42:1::/64")))


@pytest.mark.parametrize(
    ("subnet", "fits"),
    [("10.5.1.0/24", True), ("10.5.0.0/24", False), ("10.5.1.0/25", False), ("10.6.1.0/24", False)],
)
def test_compatible(subnet: str, fits: bool) -> None:
    assert config().fits(LeaseSubnet(IPv4Network(subnet))) is fits
