"""What becomes of the host when its lease is lost, taken or given back.

h1 (ours) -- switch, etcd -- h2 (ours), c2
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import PREFIX, Host, Lab, container_address, freeze, lab, ping, wait_until
from tests.lab.require import require_program, require_root

READYZ = (
    "import urllib.request as r,urllib.error as e\n"
    "try: print(r.urlopen('http://127.0.0.1:8081/readyz').status)\n"
    "except e.HTTPError as error: print(error.code, error.read().decode())"
)


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        for host in made.hosts:
            made.start_daemon(host, "--healthz-port", "8081")
        made.add_container(made.hosts[1])
        yield made


def subnet_of(host: Host) -> IPv4Network:
    return IPv4Network(host.subnet_env()["FLANNEL_SUBNET"], strict=False)


def key_of(subnet: IPv4Network) -> str:
    return f"{PREFIX}/subnets/{subnet[0]}-{subnet.prefixlen}"


@pytest.mark.alone
def test_a_deleted_lease_comes_back_and_so_does_the_peers_route(made: Lab) -> None:
    host, peer = made.hosts
    subnet, before = subnet_of(host), made.leases()
    made.etcdctl("del", key_of(subnet))
    wait_until(lambda: made.leases() == before, "the lease is back", 2)
    wait_until(lambda: str(subnet) in peer.ip("route"), "the peer's route is back", 2)
    assert host.log.read_text().count("is gone from etcd: creating it again") == 1
    assert subnet_of(host) == subnet
    wait_until(lambda: ping(host, container_address(peer)), "a ping", 5)
    assert host.exec("python3", "-c", READYZ) == "200\n"


def test_when_the_subnet_is_taken_the_host_gets_another_address(made: Lab) -> None:
    host, peer = made.hosts
    old, rival = subnet_of(host), '{"PublicIP":"192.168.77.99"}'
    errors = host.log.read_text().count("\nE")
    freeze(host.processes[0])
    made.etcdctl("del", key_of(old))
    made.etcdctl("put", key_of(old), rival)
    host.processes[0].send_signal(signal.SIGCONT)
    wait_until(lambda: subnet_of(host) != old, "another subnet in subnet.env")
    new = subnet_of(host)
    link = json.loads(host.ip("-j", "addr", "show", "flannel.1"))[0]
    assert [x["local"] for x in link["addr_info"] if x["family"] == "inet"] == [str(new[0])]
    wait_until(lambda: str(new) in peer.ip("route"), "the peer's route to it")
    wait_until(lambda: ping(host, container_address(peer)), "a ping from the new address")
    assert made.leases()[f"{old[0]}-{old.prefixlen}"] == json.loads(rival)
    said = host.log.read_text()
    assert said.count("\nE") == errors + 1
    assert f"containers that have addresses of {old} keep them" in said
    ready = host.exec("python3", "-c", READYZ)
    assert ready.startswith("503")
    assert "subnet-changed" in ready
    # A restart makes it ready: by then the operator has seen to the containers.
    assert host.stop(0) == 0
    host.processes.clear()
    made.start_daemon(host, "--healthz-port", "8081")
    assert subnet_of(host) == new
    assert host.exec("python3", "-c", READYZ) == "200\n"


def test_release_at_exit(made: Lab) -> None:
    host, peer = made.hosts
    subnet = subnet_of(host)
    assert host.stop(0) == 0
    host.processes.clear()
    assert f"{subnet[0]}-{subnet.prefixlen}" in made.leases()
    made.start_daemon(host, "--release-lease-on-exit")
    assert subnet_of(host) == subnet
    assert host.stop(0) == 0
    host.processes.clear()
    assert f"{subnet[0]}-{subnet.prefixlen}" not in made.leases()
    wait_until(lambda: str(subnet) not in peer.ip("route"), "the peer's route is gone")
    assert f"Lease {subnet[0]}-{subnet.prefixlen} given back" in host.log.read_text()
