"""Stands in for flanneld with the backend vxlan: what migrating meets on a host and in etcd.

It follows flannel's own choices: the subnet of the lease that has its address, else the one in
subnet.env; a new lease of a day under the same key; the kernel's vxlan device, made if it is not
there, with its random MAC; neighbour, FDB and route of each peer; and all of it left behind at the
end. It allocates no new subnet, renews nothing and knows IPv4 only.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from ipaddress import IPv4Network
from pathlib import Path

PREFIX = "/coreos.com/network"
DEVICE = "flannel.1"
SUBNET_FILE = Path("/run/flannel/subnet.env")
POLL_SECONDS = 0.2


def run(*command: str, check: bool = True) -> str:
    """Run a program; return its output."""
    return subprocess.run(command, check=check, stdout=subprocess.PIPE, text=True).stdout


def leases() -> dict[str, dict[str, object]]:
    """Return all lease values by key."""
    lines = run("etcdctl", "get", "--prefix", f"{PREFIX}/subnets/").splitlines()
    return {key: json.loads(value) for key, value in zip(lines[::2], lines[1::2])}


def own_key(address: str) -> str:
    """Return the key to take."""
    for key, value in leases().items():
        if value["PublicIP"] == address:
            return key
    found = re.search(r"^FLANNEL_SUBNET=(.*)$", SUBNET_FILE.read_text(), re.MULTILINE)
    assert found is not None
    subnet = IPv4Network(found[1], strict=False)
    return f"{PREFIX}/subnets/{subnet.network_address}-{subnet.prefixlen}"


def make_device(address: str, subnet: IPv4Network) -> str:
    """Make the device unless it is there; return its MAC."""
    if DEVICE not in run("ip", "-o", "link"):
        # fmt: off
        run("ip", "link", "add", DEVICE, "type", "vxlan", "id", "1", "dev", "eth0",
            "local", address, "dstport", "8472", "nolearning")
        # fmt: on
    run("ip", "link", "set", DEVICE, "mtu", "1450", "up")
    run("ip", "addr", "replace", f"{subnet.network_address}/32", "dev", DEVICE)
    (link,) = json.loads(run("ip", "-j", "link", "show", DEVICE))
    return str(link["address"])


def program(address: str) -> None:
    """Program every peer."""
    for key, value in leases().items():
        data = value.get("BackendData")
        if value["PublicIP"] == address or not isinstance(data, dict):
            continue
        base, length = key.rsplit("/", 1)[1].split("-")
        mac, there = data["VtepMAC"], str(value["PublicIP"])
        run("ip", "neigh", "replace", base, "lladdr", mac, "dev", DEVICE, "nud", "permanent")
        run("bridge", "fdb", "replace", mac, "dev", DEVICE, "dst", there, "self", "permanent")
        run("ip", "route", "replace", f"{base}/{length}", "via", base, "dev", DEVICE, "onlink")


def main(address: str) -> None:
    """Be a node until SIGTERM."""
    key = own_key(address)
    base, length = key.rsplit("/", 1)[1].split("-")
    subnet = IPv4Network(f"{base}/{length}")
    mac = make_device(address, subnet)
    value = {
        "PublicIP": address,
        "PublicIPv6": None,
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": mac},
    }
    granted = run("etcdctl", "lease", "grant", "86400").split()[1]
    run("etcdctl", "put", f"--lease={granted}", key, json.dumps(value, separators=(",", ":")))
    SUBNET_FILE.write_text(
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet[1]}/{length}\nFLANNEL_MTU=1450\n"
        "FLANNEL_IPMASQ=true\n"
    )
    program(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    while True:
        time.sleep(POLL_SECONDS)
        program(address)


if __name__ == "__main__":
    main(sys.argv[1])
