"""`status`, `peers`, `leases` and `trace` of a running node, and without one.

c1 -- h1 (ours) ---+
c2 -- h2 (ours) ---+-- switch, etcd
      h3 (nobody) -+
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Interface
from typing import Any

import pytest

from tests.lab.hosts import (
    ETCD_PORT,
    PREFIX,
    SWITCH_ADDRESS,
    Host,
    Lab,
    container_address,
    freeze,
    lab,
    ping,
    wait_until,
)
from tests.lab.require import require_program, require_root

ETCD = f"http://{SWITCH_ADDRESS}:{ETCD_PORT}"


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(3) as made:
        made.put_config()
        for host in made.hosts[:2]:
            made.start_daemon(host)
            made.add_container(host)
        subnet = _subnet(made.hosts[1])
        wait_until(lambda: subnet in made.hosts[0].ip("route"), "h1 knows h2")
        container = made.hosts[0].container
        assert container is not None
        wait_until(lambda: ping(container, container_address(made.hosts[1])), "a ping")
        yield made


def _subnet(host: Host) -> str:
    return str(IPv4Interface(host.subnet_env()["FLANNEL_SUBNET"]).network)


def _command(host: Host, *words: str) -> tuple[int, str, str]:
    """Run a sub-command on a host; return exit code, output, errors."""
    done = subprocess.run(
        ["ip", "netns", "exec", host.name, sys.executable, "-m", "pyflannel", *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


NOBODY = """\
import os, sys
from pyflannel import cli
from pyflannel.commands import show  # while Python's own files may be read
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(cli.main(sys.argv[1:]))
"""


def _as_nobody(*words: str) -> tuple[int, str, str]:
    """Run a sub-command without rights; return exit code, output, errors."""
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [("status",), ("peers",), ("trace", "10.244.9.9"), ("reload",)])
def test_who_may_not_open_the_socket_is_told_so(made: Lab, words: tuple[str, ...]) -> None:
    folder = made.hosts[0].folder
    flags = ("--control-dir", str(folder))
    # The lab's folder is root's alone, as /run/flannel is of a unit with DynamicUser.
    refused = f"pyflannel-udp {words[0]}: {{}}; run the command as root\n"
    assert _as_nobody(*words, *flags) == (1, "", refused.format(f"{folder}: may not be read"))
    socket = folder / "pyflannel-1.sock"
    closed = refused.format(f"{socket}: may not be opened")
    assert _as_nobody(*words, *flags, "--vni", "1") == (1, "", closed)
    made.folder.chmod(0o755)
    folder.chmod(0o755)
    try:
        assert _as_nobody(*words, *flags) == (1, "", closed)
    finally:
        made.folder.chmod(0o700)


def _ask(host: Host, *words: str) -> Any:
    _, output, errors = _command(host, *words, "--json", "--control-dir", str(host.folder))
    assert not errors
    return json.loads(output)


def test_status(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    found = _ask(h1, "status")
    assert found["ready"] is True
    assert found["network"] == {
        "prefix": PREFIX,
        "ipv4": "10.244.0.0/16",
        "ipv6": None,
        "vni": 1,
        "port": 8472,
    }
    assert found["lease"]["subnet"] == _subnet(h1)
    assert 86000 < found["lease"]["expires_in_seconds"] <= 86400
    assert found["etcd"]["state"] == "well"
    assert found["etcd"]["endpoint"] == ETCD
    assert found["etcd"]["view"]["age_seconds"] < 60
    (device,) = found["devices"]
    assert (device["name"], device["mtu"], device["interface"]) == ("flannel.1", 1450, "eth0")
    assert device["encap_packets"] >= 1
    assert (device["workers"], device["threads"]) in (("auto", 1), ("auto", 2))
    (peer,) = found["peers"]
    assert (peer["subnet"], peer["address"]) == (_subnet(h2), str(h2.address))
    assert peer["encap_packets"] >= 1
    assert peer["decap_packets"] >= 1
    assert peer["decap_bytes"] >= 84 * peer["decap_packets"]
    assert _ask(h1, "peers")[0]["vtep_mac"] == peer["vtep_mac"]


def test_status_for_people(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    code, output, _ = _command(h1, "status", "--control-dir", str(h1.folder))
    assert code == 0
    for text in ("ready", _subnet(h1), ETCD, "flannel.1, MTU 1450, over eth0", _subnet(h2)):
        assert text in output
    assert max(map(len, output.splitlines())) < 120


def test_leases_from_the_daemon_and_straight_from_etcd(made: Lab) -> None:
    key = f"{PREFIX}/subnets/10.244.250.0-24"
    made.etcdctl("put", f"{PREFIX}/subnets/10.244.251.0-24", '{"PublicIP":"127.0.0.1"}')
    # Comes after, so what came before is known with it.
    made.etcdctl("put", key, '{"PublicIP":')
    wait_until(lambda: key in _ask(made.hosts[0], "leases")["unused"], "the bad lease is told")
    known = _ask(made.hosts[0], "leases")
    assert {x["subnet"] for x in known["leases"]} >= {_subnet(x) for x in made.hosts[:2]}
    direct = _ask(made.hosts[2], "leases", "--etcd-endpoints", ETCD)
    assert [x["subnet"] for x in direct["leases"]] == [x["subnet"] for x in known["leases"]]
    assert list(direct["unused"]) == [key]
    reserved = {x["subnet"] for x in direct["leases"] if x["reservation"]}
    assert reserved == {"10.244.251.0/24"}


def test_leases_without_daemon_and_etcd_is_one_sentence(made: Lab) -> None:
    code, _, errors = _command(
        made.hosts[2], "leases", "--etcd-endpoints", "http://192.168.77.1:1", "--etcd-prefix=/x"
    )
    assert code == 1
    (line,) = errors.splitlines()
    assert "etcd cannot be asked" in line
    assert "--etcd-endpoints" in line


def test_trace(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    found = _ask(h1, "trace", str(container_address(h2)))
    assert found["sent"] is True
    assert found["kernel_route"]["device"] == "flannel.1"
    assert found["route"]["subnet"] == _subnet(h2)
    assert found["route"]["address"] == str(h2.address)
    assert found["underlay_route"]["device"] == "eth0"
    for address, why in (
        (str(container_address(h1)), "own subnet"),
        (str(h1.address), "address of this host"),
        (str(h2.address), "outside the network"),
        ("10.244.249.1", "no lease holds it"),
        ("203.0.113.7", "outside the network"),
    ):
        found = _ask(h1, "trace", address)
        assert found["sent"] is False
        assert why in found["why"], found


def test_trace_asks_for_the_way_from_the_address_that_is_sent_from(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    rule = ("from", str(h1.address), "lookup", "100")
    h1.ip("route", "add", str(h2.address), "via", str(SWITCH_ADDRESS), "table", "100")
    h1.ip("rule", "add", *rule)
    try:
        found = _ask(h1, "trace", str(container_address(h2)))
    finally:
        h1.ip("rule", "del", *rule)
    assert found["underlay_route"]["gateway"] == str(SWITCH_ADDRESS)


def test_trace_of_what_never_comes_to_our_device(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    subnet, unused = _subnet(h2), f"{PREFIX}/subnets/10.244.252.0-24"
    h1.ip("rule", "add", "to", subnet, "lookup", "77")
    h1.ip("route", "add", "default", "via", str(SWITCH_ADDRESS), "table", "77")
    made.etcdctl("put", unused, '{"PublicIP":"127.0.0.1"}')
    try:
        found = _ask(h1, "trace", str(container_address(h2)))
        assert found["sent"] is False
        assert f"by eth0: another route or rule hides the overlay's to {subnet}" in found["why"]
        wait_until(
            lambda: f"{unused} is not used" in _ask(h1, "trace", "10.244.252.9")["why"],
            "it names the lease",
        )
    finally:
        made.etcdctl("del", unused)
        h1.ip("rule", "del", "to", subnet, "lookup", "77")
        h1.ip("route", "flush", "table", "77")


def test_trace_of_a_peer_whose_route_the_kernel_refuses(made: Lab) -> None:
    h1 = made.hosts[0]
    subnet, data = "10.244.253.0/24", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:fd"}
    key = f"{PREFIX}/subnets/{subnet.replace('/', '-')}"
    value = {"PublicIP": "192.0.2.253", "BackendType": "vxlan", "BackendData": data}
    # The gateway of the peer's route would be the host itself.
    h1.ip("addr", "add", "10.244.253.0/32", "dev", "lo")
    try:
        made.etcdctl("put", key, json.dumps(value))
        wait_until(lambda: not _ask(h1, "status")["ready"], "it is refused")
        why = f"the kernel has refused the route to {subnet} (Invalid argument)"
        found = _ask(h1, "trace", "10.244.253.9")
        assert (found["sent"], found["why"]) == (False, f"{why}, and sends it by eth0")
        h1.ip("route", "add", "unreachable", "10.244.0.0/16")
        found = _ask(h1, "trace", "10.244.253.9")
        assert (found["sent"], found["why"]) == (False, why)
    finally:
        h1.ip("route", "del", "unreachable", "10.244.0.0/16", check=False)
        made.etcdctl("del", key)
        h1.ip("addr", "del", "10.244.253.0/32", "dev", "lo")
    wait_until(lambda: bool(_ask(h1, "status")["ready"]), "it is ready again")


def test_trace_of_what_the_kernel_sends_us_and_we_cannot_send_on(made: Lab) -> None:
    h1, h2 = made.hosts[:2]
    made.etcdctl("put", f"{PREFIX}/subnets/10.244.251.0-24", '{"PublicIP":"127.0.0.1"}')
    h1.ip("route", "add", "10.244.251.0/24", "dev", "flannel.1")
    h1.ip("route", "add", "blackhole", "203.0.113.0/24")
    try:
        wait_until(
            lambda: "is not used" in _ask(h1, "trace", "10.244.251.9")["why"], "it names the lease"
        )
        assert "no route" in _ask(h1, "trace", "203.0.113.7")["why"]
        h1.ip("route", "add", "unreachable", f"{h2.address}/32")
        found = _ask(h1, "trace", str(container_address(h2)))
        assert found["sent"] is False
        assert "no route to VTEP" in found["why"]
        code, output, _ = _command(
            h1, "trace", str(container_address(h2)), "--control-dir", str(h1.folder)
        )
        assert code == 1
        assert "no route to VTEP" in output
    finally:
        for route in ("10.244.251.0/24", "203.0.113.0/24", f"{h2.address}/32"):
            h1.ip("route", "del", route, check=False)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("status", "--control-dir", "/nonexistent"), 1, "no pyflannel-udp runs here, or"),
        (("trace", "--control-dir", "/nonexistent", "10.0.0.1"), 1, "runs here, or it waits for"),
        (("trace",), 2, "trace ADDRESS"),
        (("status", "word"), 2, "usage"),
        (("status", "--vni", "x"), 2, "--vni"),
        (("status", "--nope"), 2, "--nope"),
    ],
)
def test_bad_input_is_one_sentence(
    made: Lab, words: tuple[str, ...], code: int, named: str
) -> None:
    found, _, errors = _command(made.hosts[2], *words)
    assert found == code
    (line,) = errors.splitlines()
    assert named in line


def test_a_daemon_that_hangs_is_told_in_time(made: Lab) -> None:
    host = made.hosts[1]
    daemon = host.processes[0]
    freeze(daemon)
    try:
        code, _, errors = _command(host, "status", "--control-dir", str(host.folder))
        where = ("--control-dir", str(host.folder), "--etcd-endpoints", ETCD)
        worst, output, _ = _command(host, "doctor", *where)
    finally:
        daemon.send_signal(signal.SIGCONT)
    sentence = (
        f"the daemon at {host.folder}/pyflannel-1.sock gives no answer in 5 s; look at its log"
    )
    assert (code, errors.count("\n")) == (1, 1)
    assert sentence in errors
    assert worst == 2
    assert f"FAILURE: {sentence}" in output


def test_an_address_that_is_none_is_one_sentence(made: Lab) -> None:
    h1 = made.hosts[0]
    code, _, errors = _command(h1, "trace", "nowhere", "--control-dir", str(h1.folder))
    assert (code, len(errors.splitlines())) == (1, 1)
    assert "'nowhere' is not an IP address" in errors
