"""`doctor` with each fault really there, and without it.

     h1 (the patient) ---+
     h2 (ours) ----------+-- switch, etcd
c3 - h3 (kernel) --------+
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import trustme

from pyflannel.commands.doctor_cluster import check_leases
from pyflannel.control.lease import text_of
from pyflannel.control.lease_list import LeaseList
from tests.lab.hosts import (
    ETCD_PORT,
    LONE_MEMBER,
    PREFIX,
    SWITCH_ADDRESS,
    Host,
    Lab,
    etcd_serves,
    lab,
    narrowed,
    wait_until,
)
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.slow

ETCD = f"http://{SWITCH_ADDRESS}:{ETCD_PORT}"
KERNEL_SUBNET = IPv4Network("10.244.200.0/24")
KERNEL_MAC = "0a:00:00:00:00:03"
BRIDGE = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in (
        "ip",
        "bridge",
        "ethtool",
        "etcd",
        "etcdctl",
        "iptables-legacy",
        "iptables-nft",
        "nft",
        "unshare",
        "faketime",
    ):
        require_program(program)

    with lab(3) as made:
        made.put_config()
        made.start_daemon(made.hosts[1])
        start_kernel_node(made, made.hosts[2], KERNEL_SUBNET, KERNEL_MAC)
        program_kernel_node(made, made.hosts[2])
        yield made


@pytest.fixture
def patient(made: Lab) -> Iterator[Host]:
    """A host in good order without a daemon."""
    made.put_config()
    host = made.hosts[0]
    yield host
    for index in range(len(host.processes)):
        host.stop(index)
    host.processes.clear()
    host.ip("link", "del", "flannel.1", check=False)
    host.exec("nft", "flush", "ruleset")
    host.exec("iptables-legacy", "-F")


def _doctor(
    host: Host,
    *flags: str,
    wrapper: tuple[str, ...] = (),
    endpoints: str = ETCD,
    iface: str = "eth0",
    left_out: str = "bridge",
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Return exit code and the findings of each check that was made, but for one.

    The machine that tests run on may have no br_netfilter, which most of them are not about.
    """
    done = subprocess.run(
        [
            *("ip", "netns", "exec", host.name, *wrapper, sys.executable, "-m", "pyflannel"),
            *("doctor", "--json", "--iface", iface, "--etcd-endpoints", endpoints),
            *("--control-dir", str(host.folder), "--state-dir", str(host.folder / "state")),
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not done.stderr
    report = json.loads(done.stdout)
    found: dict[str, list[dict[str, Any]]] = {check: [] for check in report["checks"]}
    for finding in report["findings"]:
        if finding["check"] != left_out:
            found[finding["check"]].append(finding)
    return done.returncode, found


def _amiss(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {check: [x["sentence"] for x in those] for check, those in found.items() if those}


@contextmanager
def _setting(host: Host, key: str, value: int) -> Iterator[None]:
    before = host.exec("sysctl", "-n", key).strip()
    host.exec("sysctl", "-qw", f"{key}={value}")
    try:
        yield
    finally:
        host.exec("sysctl", "-qw", f"{key}={before}")


def test_nothing_is_found_before_the_first_start(patient: Host) -> None:
    code, found = _doctor(patient)
    assert not _amiss(found)
    assert code == (0 if BRIDGE.exists() else 1)
    assert "vteps" not in found
    for check in ("tun", "capabilities", "port", "devices", "etcd", "clock", "path-mtu"):
        assert check in found


def test_nothing_is_found_on_a_node_whose_peers_answer_over_the_overlay(
    made: Lab, patient: Host
) -> None:
    made.start_daemon(patient)
    program_kernel_node(made, made.hosts[2])
    wait_until(lambda: str(KERNEL_SUBNET) in patient.ip("route"), "the kernel node is known")
    own = str(IPv4Network(patient.subnet_env()["FLANNEL_SUBNET"], strict=False))
    wait_until(lambda: own in made.hosts[1].ip("route"), "the other node knows the patient")
    _, found = _doctor(patient)
    assert "vteps" in found
    assert not _amiss(found)


def test_a_peer_that_does_not_answer_over_the_overlay(made: Lab, patient: Host) -> None:
    made.start_daemon(patient)
    wait_until(lambda: str(KERNEL_SUBNET) in patient.ip("route"), "the kernel node is known")
    kernel = made.hosts[2]
    kernel.exec("iptables-nft", "-I", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP")
    gone = f"{PREFIX}/subnets/10.244.250.0-24"
    value = made.leases()["10.244.200.0-24"] | {"PublicIP": "192.168.77.250"}
    made.etcdctl("put", gone, json.dumps(value))
    try:
        wait_until(lambda: "10.244.250.0/24" in patient.ip("route"), "the lease is known")
        code, found = _doctor(patient)
    finally:
        made.etcdctl("del", gone)
        kernel.exec("iptables-nft", "-F", "INPUT")
    assert code == 2
    closed, dead = sorted(found["vteps"], key=lambda x: str(x["sentence"]))
    assert closed["sentence"].startswith(
        "10.244.200.0, the VTEP of 10.244.200.0/24 at 192.168.77.13"
    )
    assert "though the host itself does" in closed["sentence"]
    assert closed["severity"] == "failure"
    assert "10.244.250.0/24" in dead["sentence"]
    assert "nor does the host itself" in dead["sentence"]
    assert dead["severity"] == "warning"
    assert dead["remedy"].endswith(f"etcdctl del {gone}")


def test_a_peer_to_which_another_rule_leads(made: Lab, patient: Host) -> None:
    made.start_daemon(patient)
    wait_until(lambda: str(KERNEL_SUBNET) in patient.ip("route"), "the kernel node is known")
    patient.ip("rule", "add", "to", str(KERNEL_SUBNET), "lookup", "77")
    patient.ip("route", "add", "default", "via", str(SWITCH_ADDRESS), "table", "77")
    try:
        code, found = _doctor(patient)
    finally:
        patient.ip("rule", "del", "to", str(KERNEL_SUBNET), "lookup", "77")
        patient.ip("route", "flush", "table", "77")
    assert code == 2
    (sentence,) = _amiss(found)["vteps"]
    assert "another route or rule hides the overlay's to 10.244.200.0/24" in sentence


def test_no_tun(patient: Host) -> None:
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    code, found = _doctor(patient, wrapper=hide)
    assert code == 2
    assert list(_amiss(found)) == ["tun"]
    assert "modprobe tun" in found["tun"][0]["remedy"]


def test_no_capability(patient: Host) -> None:
    wrapper = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    code, found = _doctor(patient, wrapper=wrapper)
    assert code == 2
    assert _amiss(found)["capabilities"] == ["this process lacks CAP_NET_ADMIN"]


def test_rights_of_the_daemon_are_not_those_of_doctor(made: Lab, patient: Host) -> None:
    made.start_daemon(patient)
    code, found = _doctor(patient, wrapper=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert code == 1
    assert list(_amiss(found)) == ["capabilities"]
    (sentence,) = _amiss(found)["capabilities"]
    assert sentence.startswith("this process lacks CAP_NET_RAW, ")


def test_a_daemon_that_cannot_be_asked_is_known(made: Lab, patient: Host) -> None:
    made.start_daemon(patient, "--control-dir", str(patient.folder / "elsewhere"))
    code, found = _doctor(patient)
    assert code == 1
    assert list(_amiss(found)) == ["port"]
    (sentence,) = _amiss(found)["port"]
    assert sentence.startswith("a pyflannel-udp serves UDP port 8472 here and cannot be asked")


def test_a_daemon_in_another_network_namespace(made: Lab, patient: Host) -> None:
    code, found = _doctor(patient, "--control-dir", str(made.hosts[1].folder))
    assert code == 2
    (sentence,) = _amiss(found)["daemon"]
    assert sentence.startswith("the daemon is in another network namespace")
    assert list(found) == ["daemon"]


def test_port_is_taken(patient: Host) -> None:
    program = "import socket,time;s=socket.socket(2,2);s.bind(('',8472));time.sleep(60)"
    holder = patient.start("python3", "-c", program, log=patient.folder / "holder.log")
    wait_until(lambda: ":8472" in patient.exec("ss", "-lun"), "the port is taken")
    code, found = _doctor(patient)
    assert code == 2
    assert str(patient.processes[holder].pid) in _amiss(found)["port"][0]


def test_leftover_kernel_device(patient: Host) -> None:
    # fmt: off
    patient.ip("link", "add", "flannel.1", "type", "vxlan", "id", "1", "dev", "eth0",
               "dstport", "8472", "nolearning")
    # fmt: on
    code, found = _doctor(patient)
    assert code == 2
    assert "flannel.1 is a kernel vxlan device on UDP port 8472" in _amiss(found)["devices"][0]
    patient.ip("link", "del", "flannel.1")
    patient.ip("link", "add", "flannel.1", "type", "bridge")
    _, found = _doctor(patient)
    assert "is a bridge device" in _amiss(found)["devices"][0]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["iptables-nft -A INPUT -p udp --dport 8472 -j REJECT"], "iptables-nft closes UDP port"),
        (["iptables-legacy -A INPUT -p udp --dport 8472 -j DROP"], "iptables-legacy closes"),
        (["nft add table inet t",
          "nft add chain inet t in { type filter hook input priority 0 ; policy drop ; }"],
         "nft: what comes in is dropped by default"),
        (["nft add table inet t",
          "nft add chain inet t in { type filter hook input priority 0 ; policy drop ; }",
          "nft add rule inet t in udp dport 8472 accept",
          "nft add rule inet t in tcp sport 2379 accept",
          "nft add rule inet t in icmp type { echo-request, echo-reply } accept"], None),
    ],
)  # fmt: skip
def test_firewall(patient: Host, rules: list[str], said: str | None) -> None:
    for rule in rules:
        patient.exec(*rule.split(" "))
    _, found = _doctor(patient)
    if said is None:
        assert not _amiss(found)
    else:
        (sentence,) = _amiss(found)["firewall"]
        assert said in sentence


def test_missing_firewall_tool(patient: Host, tmp_path: Path) -> None:
    wrapper = ("env", f"PATH={tmp_path}")
    _, found = _doctor(patient, wrapper=wrapper)
    assert "iptables-restore is not installed" in _amiss(found)["firewall"][0]


@pytest.mark.parametrize(
    ("key", "value", "check"),
    [
        ("net.ipv4.ip_forward", 0, "forwarding"),
        ("net.ipv4.conf.eth0.rp_filter", 1, "rp_filter"),
        ("net.ipv4.conf.all.ignore_routes_with_linkdown", 1, "linkdown"),
    ],
)
def test_kernel_settings(patient: Host, key: str, value: int, check: str) -> None:
    with _setting(patient, key, value):
        code, found = _doctor(patient)
    assert code == 1
    assert list(_amiss(found)) == [check]
    assert "sysctl -w" in found[check][0]["remedy"]


def test_missing_br_netfilter(patient: Host) -> None:
    hide = '[ ! -e "$0" ] || mount -t tmpfs none "$0" && exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", hide, str(BRIDGE.parent))
    code, found = _doctor(patient, wrapper=wrapper, left_out="")
    assert code == 1
    assert list(_amiss(found)) == ["bridge"]
    assert "bypass iptables" in found["bridge"][0]["sentence"]
    assert found["bridge"][0]["remedy"] == "load it: modprobe br_netfilter"


def test_etcd_wants_a_user(made: Lab, patient: Host) -> None:
    made.etcdctl("user", "add", "root:secret")
    made.etcdctl("user", "grant-role", "root", "root")
    made.etcdctl("auth", "enable")
    try:
        for password, said in (
            ((), "give --etcd-username"),
            (("guess",), "wrong --etcd-username or --etcd-password"),
            (("secret",), None),
        ):
            user = [
                x for word in password for x in ("--etcd-username=root", f"--etcd-password={word}")
            ]
            code, found = _doctor(patient, *user)
            if said is None:
                assert not _amiss(found)
                continue
            assert code == 2
            assert list(_amiss(found)) == ["etcd"]
            assert said in f"{found['etcd'][0]['sentence']}; {found['etcd'][0]['remedy']}"
    finally:
        made.etcdctl("--user", "root:secret", "auth", "disable")
        made.etcdctl("user", "delete", "root")


def test_no_etcd(patient: Host) -> None:
    code, found = _doctor(patient, endpoints="http://192.168.77.1:1")
    assert code == 2
    assert list(_amiss(found)) == ["etcd"]
    assert found["etcd"][0]["sentence"].count("http://192.168.77.1:1") == 1


def test_one_endpoint_of_two_is_down(patient: Host) -> None:
    code, found = _doctor(patient, endpoints=f"http://192.168.77.1:1,{ETCD}")
    assert code == 1
    assert list(_amiss(found)) == ["etcd"]


@pytest.mark.parametrize(
    ("config", "said"),
    [(None, "has no key"), ('{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}', '"udp"')],
)
def test_configuration(made: Lab, patient: Host, config: str | None, said: str) -> None:
    if config is None:
        made.etcdctl("del", f"{PREFIX}/config")
    else:
        made.put_config(config)
    code, found = _doctor(patient)
    assert code == 2
    assert said in _amiss(found)["configuration"][0]


def test_clock(patient: Host) -> None:
    code, found = _doctor(patient, wrapper=("faketime", "-f", "-60s"))
    assert code == 1
    assert list(_amiss(found)) == ["clock"]
    (sentence,) = _amiss(found)["clock"]
    assert re.fullmatch(rf"this host's clock is (5[5-9]|60|61) s behind that of {ETCD}", sentence)


def test_clock_by_which_etcds_certificate_is_not_valid(patient: Host, tmp_path: Path) -> None:
    """A host without a clock of its own, before NTP has set it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    leaf = authority.issue_cert("127.0.0.1")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    leaf.private_key_pem.write_to_path(tmp_path / "key")
    url, peer, log = "https://127.0.0.1:2379", "http://127.0.0.1:2380", tmp_path / "log"
    # fmt: off
    with etcd_serves(log):
        patient.start(
            "etcd", "--name", "own", "--data-dir", str(tmp_path / "etcd"),
            "--cert-file", str(tmp_path / "crt"), "--key-file", str(tmp_path / "key"),
            "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"own={peer}", *LONE_MEMBER, log=log,
        )
    # fmt: on
    code, found = _doctor(
        patient,
        *("--etcd-cafile", str(tmp_path / "ca.crt")),
        endpoints=url,
        wrapper=("faketime", "1970-01-02 00:00:00"),
    )
    assert code == 2
    assert list(_amiss(found)) == ["etcd", "clock"]
    assert "is not valid yet" in _amiss(found)["etcd"][0]
    assert f"behind that of {url}" in _amiss(found)["clock"][0]


def test_interface(patient: Host) -> None:
    code, found = _doctor(patient, iface="nope0")
    assert code == 2
    assert list(_amiss(found)) == ["interface"]
    assert "there is no interface nope0" in _amiss(found)["interface"][0]


def test_two_hosts_with_one_public_ip(made: Lab, patient: Host) -> None:
    leases = made.leases()
    twin = f"{PREFIX}/subnets/10.244.251.0-24"
    made.etcdctl("put", twin, json.dumps(leases["10.244.200.0-24"]))
    made.etcdctl("put", f"{PREFIX}/subnets/nonsense; true", "x")
    state = patient.folder / "state" / "flannel.1.json"
    state.parent.mkdir(exist_ok=True)
    machine_id = Path("/etc/machine-id").read_text().strip()
    state.write_text(json.dumps({"machine_id": machine_id, "vtep_mac": "0a:00:00:00:00:09"}))
    try:
        code, found = _doctor(patient, "--public-ip", str(made.hosts[2].address))
    finally:
        made.etcdctl("del", twin)
        made.etcdctl("del", f"{PREFIX}/subnets/nonsense; true")
        state.unlink()
    assert code == 2
    twins, nonsense = _amiss(found)["leases"]
    assert "10.244.200.0/24, 10.244.251.0/24 have one public IP, 192.168.77.13" in twins
    assert "nonsense; true in etcd is not a lease" in nonsense
    assert found["leases"][1]["remedy"] == f"etcdctl del '{PREFIX}/subnets/nonsense; true'"
    assert "another host uses our address" in _amiss(found)["public-ip"][0]


@pytest.mark.parametrize("key", [b"plain", b"two words; $(true)", b"it's\n\x1b[31m\\n", b"\xff"])
def test_the_remedy_for_a_foreign_key_names_just_that_key(key: bytes) -> None:
    (finding,) = check_leases(LeaseList((), {text_of(key): "it is none"}))
    assert finding.remedy.startswith("etcdctl del ")
    word = finding.remedy.removeprefix("etcdctl del ")
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert said.stdout == key


def test_leases_that_the_daemon_does_not_use(made: Lab, patient: Host) -> None:
    made.start_daemon(patient)
    program_kernel_node(made, made.hosts[2])
    (own,) = (x for x in made.leases().values() if x["PublicIP"] == str(patient.address))
    keys = [f"{PREFIX}/subnets/10.244.{number}.0-24" for number in (251, 252)]
    vtep = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:52"}
    inside = {**own, "PublicIP": "10.244.9.9", "BackendData": vtep}
    made.etcdctl("put", keys[0], json.dumps({**own, "PublicIP": "192.168.77.99"}))
    made.etcdctl("put", keys[1], json.dumps(inside))
    try:
        patient.wait_for_log("not using lease", 2)
        code, found = _doctor(patient)
    finally:
        for key in keys:
            made.etcdctl("del", key)
    assert code == 2
    one_mac, *unused = _amiss(found)["leases"]
    assert "10.244.251.0/24 at 192.168.77.99" in one_mac
    assert "have one VTEP MAC" in one_mac
    assert unused[0].startswith(f"the daemon does not use the lease {keys[0]}: its VTEP MAC")
    assert unused[1].startswith(f"the daemon does not use the lease {keys[1]}: its PublicIP 10.244")
    # Of these no answer is expected.
    silent = str([_amiss(found).get(check) for check in ("path-mtu", "vteps")])
    assert "10.244.251.0" not in silent and "10.244.252.0" not in silent


def test_addresses_of_the_overlay_that_are_not_ours(made: Lab, patient: Host) -> None:
    patient.ip("link", "add", "docker0", "type", "bridge")
    patient.ip("addr", "add", "10.244.200.1/24", "dev", "docker0")
    try:
        code, found = _doctor(patient)
    finally:
        patient.ip("link", "del", "docker0")
    assert code == 1
    (sentence,) = _amiss(found)["addresses"]
    assert sentence.startswith(
        "docker0 has the address 10.244.200.1/24, and the subnet 10.244.200.0/24 is that of "
        f"{made.hosts[2].address}"
    )
    code, found = _doctor(patient, "--public-ip", "10.244.9.9")
    assert code == 2
    (sentence,) = _amiss(found)["addresses"]
    assert "our public IP 10.244.9.9 lies inside the overlay network 10.244.0.0/16" in sentence
    daemon = made.start_daemon(patient, "--public-ip", "10.244.9.9", "--release-lease-on-exit")
    assert "10.244.9.9 lies inside the overlay network" in patient.log.read_text()
    patient.stop(daemon)


def test_a_kernel_vxlan_device_of_another_name(patient: Host) -> None:
    patient.ip("link", "add", "vxlan7", "type", "vxlan", "id", "7", "dev", "eth0",
               "dstport", "8472")  # fmt: skip
    patient.ip("link", "set", "vxlan7", "up")
    try:
        _, found = _doctor(patient)
    finally:
        patient.ip("link", "del", "vxlan7")
    (finding,) = found["devices"]
    assert finding["sentence"].startswith("vxlan7 is a kernel vxlan device on UDP port 8472")
    assert "--replace-kernel-device" not in finding["remedy"]  # deletes the device of our name only


def test_a_daemon_that_is_not_ready(made: Lab, patient: Host) -> None:
    daemon = patient.processes[made.start_daemon(patient)]
    made.put_config('{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}')
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: not patient.ask("status")["ready"], "the daemon has noticed")
    code, found = _doctor(patient)
    assert code == 2
    (sentence,) = _amiss(found)["daemon"]
    assert sentence.startswith("the daemon is not ready: network-config: network config: Backend")


def test_a_smaller_mtu_on_the_way_is_measured(made: Lab, patient: Host) -> None:
    other = made.hosts[1]
    with narrowed(made, other, 1400):
        code, found = _doctor(patient)
    assert code == 1
    (sentence,) = _amiss(found)["path-mtu"]
    assert f"the way to {other.address} carries packets of 1400 bytes at most, not 1500" == sentence


def test_for_people(patient: Host) -> None:
    with _setting(patient, "net.ipv4.ip_forward", 0):
        done = subprocess.run(
            [
                *("ip", "netns", "exec", patient.name, sys.executable, "-m", "pyflannel"),
                *("doctor", "--etcd-endpoints", ETCD, "--iface", "eth0"),
                *("--control-dir", str(patient.folder)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    *findings, last = done.stdout.splitlines()
    assert any(
        x.startswith("WARNING: net.ipv4.ip_forward is 0") and "; sysctl -w" in x for x in findings
    )
    assert "checks" in last
