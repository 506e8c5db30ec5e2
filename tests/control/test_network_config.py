"""The network configuration: spec sections 3 and 19."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest

from pyflannel.control.network_config import (
    NetworkConfigError,
    VxlanBackend,
    parse_network_config_untrusted,
)

DUAL = '"Network":"10.3.0.0/16","EnableIPv6":true'
VXLAN = '"Backend":{"Type":"vxlan"}'


def test_defaults_and_key_names_in_any_case() -> None:
    text = b'{ "network": "10.3.0.0/16", "backend": {"type": "VXLAN"}, "unknown": 1}'
    config = parse_network_config_untrusted(text)
    assert config.ipv4.network == IPv4Network("10.3.0.0/16")
    assert (config.ipv4.first, config.ipv4.last) == (
        IPv4Address("10.3.1.0"),
        IPv4Address("10.3.255.0"),
    )
    assert config.ipv4.length == 24
    assert config.backend == VxlanBackend(port=8472)


def test_given_bounds_are_kept() -> None:
    config = parse_network_config_untrusted(
        (
            '{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0",'
            f'"SubnetLen":28,{VXLAN}}}'
        ).encode()
    )
    assert (str(config.ipv4.first), str(config.ipv4.last)) == ("10.3.5.0", "10.3.8.0")
    assert config.ipv4.length == 28


def test_ipv6_defaults() -> None:
    config = parse_network_config_untrusted(
        (
            '{"Network":"10.3.0.0/16","enableIPv6":true,"ipv6Network":"fc00::/48",' + VXLAN + "}"
        ).encode()
    )
    assert config.ipv6 is not None
    assert config.ipv6.length == 64
    assert config.ipv6.first == IPv6Address("fc00:0:0:1::")
    assert config.ipv6.last == IPv6Address("fc00:0:0:ffff::")


def test_what_k3s_writes_is_read() -> None:
    text = '{"Network":"10.42.0.0/16","EnableIPv6":false,"EnableIPv4":true,"IPv6Network":"::/0",'
    assert parse_network_config_untrusted(f"{text}{VXLAN}}}".encode()).ipv4.length == 24


def test_network_is_masked_the_last_key_wins_and_null_is_absent() -> None:
    config = parse_network_config_untrusted(
        f'{{"Network":"10.9.0.0/16","network":"10.5.7.9/16","SubnetLen":null,{VXLAN}}}'.encode()
    )
    assert str(config.ipv4.network) == "10.5.0.0/16"


@pytest.mark.parametrize(("prefix", "length"), [(8, 24), (22, 24), (23, 25), (28, 30)])
def test_default_subnet_length(prefix: int, length: int) -> None:
    text = f'{{"Network":"10.0.0.0/{prefix}",{VXLAN}}}'
    assert parse_network_config_untrusted(text.encode()).ipv4.length == length


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"Network":"10.3.0.0/16"}', "Backend is missing"),
        ('{"Network":"10.3.0.0/16","Backend":{}}', "Backend.Type null"),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}', 'Backend.Type "host-gw"'),
        (f"{{{VXLAN}}}", "Network null"),
        (f'{{"Network":"10.3.0.0",{VXLAN}}}', 'Network "10.3.0.0"'),
        (f'{{"Network":"fc00::/48",{VXLAN}}}', 'Network "fc00::/48"'),
        (f'{{"Network":"10.3.0.0/29",{VXLAN}}}', "too small"),
        (f'{{"Network":"10.3.0.0/16","SubnetLen":31,{VXLAN}}}', "SubnetLen 31: must be at most 30"),
        (f'{{"Network":"10.3.0.0/16","SubnetLen":17,{VXLAN}}}', "SubnetLen 17: must be at least"),
        (
            f'{{"Network":"10.3.0.0/16","SubnetLen":"24",{VXLAN}}}',
            'SubnetLen "24": must',
        ),
        (f'{{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0",{VXLAN}}}', "must lie inside"),
        (f'{{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.7",{VXLAN}}}', "must be the base"),
        (
            f'{{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0",{VXLAN}}}',
            "must not be above",
        ),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}', "Backend.VNI"),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":"1"}}', 'Backend.VNI "1"'),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","Port":65536}}', "Backend.Port 65536"),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","GBP":true}}', "Backend.GBP true"),
        (f'{{"Network":"10.3.0.0/16","EnableIPv4":false,{VXLAN}}}', "EnableIPv4 false"),
        (f'{{"Network":"10.3.0.0/16","EnableIPv6":true,{VXLAN}}}', "IPv6Network null"),
        (f'{{{DUAL},"IPv6Network":"10.4.0.0/16",{VXLAN}}}', 'IPv6Network "10.4.0.0/16"'),
        (f'{{{DUAL},"IPv6Network":"fc00::/125",{VXLAN}}}', "at most 124"),
        (
            f'{{{DUAL},"IPv6Network":"fc00::/48","IPv6SubnetLen":127,{VXLAN}}}',
            "IPv6SubnetLen 127: must be at most 126",
        ),
        (
            f'{{{DUAL},"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00::1:0:0:0:1",{VXLAN}}}',
            "base of a subnet of length IPv6SubnetLen",
        ),
        (
            f'{{{DUAL},"IPv6Network":"fc00::/48","Backend":{{"Type":"vxlan","VNI":10000}}}}',
            "flannel-v6.10000",
        ),
    ],
)
def test_errors_name_key_value_and_rule(text: str, named: str) -> None:
    with pytest.raises(NetworkConfigError) as caught:
        parse_network_config_untrusted(text.encode())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["Network", "SubnetMin", "Backend", "EnableIPv6"])
def test_an_error_quotes_the_beginning_of_a_huge_value(key: str) -> None:
    config = {"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}, key: "1" * 100_000}
    with pytest.raises(NetworkConfigError) as caught:
        parse_network_config_untrusted(json.dumps(config).encode())
    assert f'{key} "1111' in str(caught.value)
    assert len(str(caught.value)) < 200
