"""A flannel node of the kernel's vxlan devices, made and programmed as flanneld does it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from tests.lab.hosts import PREFIX, SUBNET_VARIABLES, Host, Lab

DEVICE = {4: "flannel", 6: "flannel-v6"}
HEADERS_V6 = 20
"""By so many bytes an IPv6 header is longer than an IPv4 one."""


def start_kernel_node(
    made: Lab,
    host: Host,
    subnet: IPv4Network,
    mac: str,
    *,
    ipv6: tuple[IPv6Network, str] | None = None,
    vni: int = 1,
    port: int = 8472,
    mtu: int = 1450,
    flags: Sequence[str] = (),
) -> None:
    """Make the node, without peers yet; `ipv6` is its second subnet and MAC in dual stack.

    `flags` are further words of `ip link add type vxlan`.
    """
    _add_device(host, subnet, mac, vni, port, mtu, flags)
    value: dict[str, object] = {
        "PublicIP": str(host.address),
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": vni, "VtepMAC": mac},
    }
    key = f"{subnet.network_address}-{subnet.prefixlen}"
    lines = [f"{SUBNET_VARIABLES[4]}={subnet[1]}/{subnet.prefixlen}"]
    if ipv6 is not None:
        subnet_v6, mac_v6 = ipv6
        mtu -= HEADERS_V6
        _add_device(host, subnet_v6, mac_v6, vni, port, mtu, flags)
        value["PublicIPv6"] = str(host.address_v6)
        value["BackendV6Data"] = {"VNI": vni, "VtepMAC": mac_v6}
        key += f"&{subnet_v6.network_address}-{subnet_v6.prefixlen}"
        lines.append(f"{SUBNET_VARIABLES[6]}={subnet_v6[1]}/{subnet_v6.prefixlen}")
    host.subnet_file.write_text("\n".join([*lines, f"FLANNEL_MTU={mtu}", ""]))
    granted = made.etcdctl("lease", "grant", "86400").split()[1]
    text = json.dumps(value, separators=(",", ":"))
    made.etcdctl("put", f"--lease={granted}", f"{PREFIX}/subnets/{key}", text)


def _add_device(
    host: Host,
    subnet: IPv4Network | IPv6Network,
    mac: str,
    vni: int,
    port: int,
    mtu: int,
    flags: Sequence[str],
) -> None:
    device = f"{DEVICE[subnet.version]}.{vni}"
    local = host.address if subnet.version == 4 else host.address_v6
    # fmt: off
    host.ip("link", "add", device, "address", mac, "type", "vxlan", "id", str(vni), "dev",
            host.iface, "local", str(local), "dstport", str(port), "nolearning",
            "noudp6zerocsumtx", "noudp6zerocsumrx", *flags)
    # fmt: on
    host.ip("link", "set", device, "mtu", str(mtu), "up")
    host.ip("addr", "add", f"{subnet.network_address}/{subnet.max_prefixlen}", "dev", device)


def program_kernel_node(made: Lab, host: Host, *, vni: int = 1) -> None:
    """Program every other lease into a kernel node, in flanneld's order for each peer."""
    neighbours, fdb, routes = [], [], []
    for key, value in made.leases().items():
        if value["PublicIP"] == str(host.address):
            continue
        parts = zip(
            key.split("&"),
            DEVICE.values(),
            (value["PublicIP"], value["PublicIPv6"]),
            (value["BackendData"], value.get("BackendV6Data")),
        )
        for subnet, name, address, data in parts:
            base, length = subnet.split("-")
            device = f"{name}.{vni}"
            assert isinstance(data, dict)
            mac = data["VtepMAC"]
            neighbours.append(f"neigh replace {base} lladdr {mac} dev {device} nud permanent")
            fdb.append(f"fdb replace {mac} dev {device} dst {address} self permanent")
            routes.append(f"route replace {base}/{length} via {base} dev {device} onlink")
    batch = host.folder / "batch"
    for program, lines in (("ip", neighbours), ("bridge", fdb), ("ip", routes)):
        batch.write_text("\n".join(lines) + "\n")
        host.exec(program, "-batch", str(batch))
