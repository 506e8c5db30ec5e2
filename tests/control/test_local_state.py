"""What a host keeps and chooses by itself: subnet.env, the VTEP MAC, a free subnet."""

from __future__ import annotations

import os
import random
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from pyflannel.control.lease import LeaseSubnet
from pyflannel.control.network_config import NetworkConfig, parse_network_config_untrusted
from pyflannel.control.subnet_file import SubnetFile, read_previous_subnet, write_subnet_file
from pyflannel.control.subnet_pool import SubnetsExhausted, choose_subnet, is_compatible
from pyflannel.control.vtep_identity import load_vtep_mac, pick_vtep_mac, save_vtep_mac
from pyflannel.dataplane.route import MacAddress

# Written by flanneld with --ip-masq.
GOLDEN = (
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.35.1/24\n"
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
        write_subnet_file(path, SubnetFile(IPv4Network("10.244.0.0/16"), subnet, 1450, True))
    finally:
        os.umask(old)
    assert path.read_text() == GOLDEN
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]
    assert read_previous_subnet(path) == LeaseSubnet(subnet)


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
    taken: list[IPv4Network] = []
    for _ in range(3):
        taken.append(choose_subnet(small, taken, rng))
    assert set(map(str, taken)) == {"10.5.0.64/26", "10.5.0.128/26", "10.5.0.192/26"}
    with pytest.raises(SubnetsExhausted, match="larger network"):
        choose_subnet(small, taken, rng)


def test_wider_and_narrower_leases_are_kept_clear_of() -> None:
    small = config(26, "10.5.0.0/24")
    for taken in ("10.5.0.128/25", "10.5.0.130/32"):
        for seed in range(20):
            chosen = choose_subnet(small, [IPv4Network(taken)], random.Random(seed))
            assert not chosen.overlaps(IPv4Network(taken))


def test_choice_is_among_the_first_hundred() -> None:
    chosen = {str(choose_subnet(config(), [], random.Random(seed))) for seed in range(3000)}
    assert chosen == {f"10.5.{n}.0/24" for n in range(1, 101)}


@pytest.mark.parametrize(
    ("subnet", "fits"),
    [("10.5.1.0/24", True), ("10.5.0.0/24", False), ("10.5.1.0/25", False), ("10.6.1.0/24", False)],
)
def test_compatible(subnet: str, fits: bool) -> None:
    assert is_compatible(config(), LeaseSubnet(IPv4Network(subnet))) is fits
