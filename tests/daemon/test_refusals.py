"""What bad input gets: one sentence naming the thing and the remedy, exit code 1, nothing left.

One host on a switch with etcd; the daemon is started wrongly in every way the operator can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.lab.hosts import PREFIX, Host, Lab, lab, wait_until
from tests.lab.require import require_program, require_root


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in (
        "ip",
        "ethtool",
        "etcd",
        "etcdctl",
        "setpriv",
        "prlimit",
        "unshare",
        "ss",
        "curl",
    ):
        require_program(program)
    with lab(2) as made:
        yield made


@pytest.fixture
def host(made: Lab) -> Iterator[Host]:
    """A host without a flannel device, and an etcd with nothing but a good configuration."""
    made.etcdctl("del", "--prefix", PREFIX)
    made.put_config()
    host = made.hosts[0]
    yield host
    for index in range(len(host.processes)):
        host.stop(index)
    host.processes.clear()
    host.ip("link", "del", "flannel.1", check=False)


def _refused(
    made: Lab, host: Host, *flags: str, iface: str = "eth0", wrapper: tuple[str, ...] = ()
) -> str:
    """Start the daemon, return the one error line; it must exit with 1 and leave nothing."""
    links = host.ip("-o", "link")
    start = len(host.log.read_text()) if host.log.exists() else 0
    index = made.start_daemon(host, *flags, wait=False, iface=iface, wrapper=wrapper)
    assert host.processes[index].wait(20) == 1
    printed = host.log.read_text()[start:]
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("E")]
    assert len(errors) == 1, printed
    wait_until(lambda: host.ip("-o", "link") == links, "the links are as before")
    assert not host.subnet_file.exists()
    return errors[0]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "not JSON"),
        ('{"Network":"10.244.0.0/16"}', "Backend is missing"),
        ('{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}', 'Backend.Type "udp"'),
        (
            '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","GBP":true}}',
            "Backend.GBP true",
        ),
        (
            '{"Network":"10.244.0.0/16","EnableIPv4":false,"EnableIPv6":true,'
            '"IPv6Network":"2001:db8::/48","Backend":{"Type":"vxlan"}}',
            "etcd has no key for a lease without IPv4",
        ),
        ('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":60}}', "check Backend.MTU"),
        ('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":50}}', "check Backend.MTU"),
    ],
)
def test_bad_configuration(made: Lab, host: Host, config: str, named: str) -> None:
    made.put_config(config)
    assert named in _refused(made, host)


def test_interface_that_does_not_exist(made: Lab, host: Host) -> None:
    error = _refused(made, host, iface="nope0")
    assert "there is no interface nope0" in error
    assert "--iface" in error


def test_interface_without_address(made: Lab, host: Host) -> None:
    host.ip("link", "add", "bare0", "type", "bridge")
    try:
        assert "bare0" in _refused(made, host, iface="bare0")
    finally:
        host.ip("link", "del", "bare0")


def test_network_is_exhausted(made: Lab, host: Host) -> None:
    made.put_config('{"Network":"10.244.0.0/28","SubnetLen":30,"Backend":{"Type":"vxlan"}}')
    for base in (4, 8, 12):
        made.etcdctl("put", f"{PREFIX}/subnets/10.244.0.{base}-30", '{"PublicIP":"192.0.2.1"}')
    assert "every subnet from 10.244.0.4 to 10.244.0.12" in _refused(made, host)


def test_port_is_taken_by_a_process(made: Lab, host: Host) -> None:
    program = "import socket,time;s=socket.socket(2,2);s.bind(('',8472));time.sleep(60)"
    holder = host.start("python3", "-c", program, log=made.folder / "holder.log")
    wait_until(lambda: ":8472" in host.exec("ss", "-lun"), "the port is taken")
    error = _refused(made, host)
    assert "8472" in error
    assert str(host.processes[holder].pid) in error


def test_port_is_taken_by_a_kernel_device_of_another_name(made: Lab, host: Host) -> None:
    vxlan = ("type", "vxlan", "id", "9", "dev", "eth0", "dstport", "8472")
    host.ip("link", "add", "other0", *vxlan)
    host.ip("link", "set", "other0", "up")
    try:
        error = _refused(made, host)
    finally:
        host.ip("link", "del", "other0")
    assert "held by the kernel vxlan device other0" in error
    assert "ip link delete other0" in error


def test_a_second_daemon(made: Lab, host: Host) -> None:
    made.start_daemon(host)
    index = made.start_daemon(host, wait=False)
    assert host.processes[index].wait(20) == 1
    assert "another pyflannel-udp" in host.log.read_text()
    host.subnet_file.unlink()


def test_without_cap_net_admin(made: Lab, host: Host) -> None:
    wrapper = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert "CAP_NET_ADMIN" in _refused(made, host, wrapper=wrapper)


def test_without_cap_net_admin_beside_a_device_of_the_last_run(made: Lab, host: Host) -> None:
    host.stop(made.start_daemon(host))
    host.subnet_file.unlink()
    wait_until(lambda: "NO-CARRIER" in host.ip("link"), "the device is without its daemon")
    wrapper = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert "CAP_NET_ADMIN" in _refused(made, host, wrapper=wrapper)


def test_without_dev_net_tun(made: Lab, host: Host) -> None:
    hide = 'mount -t tmpfs none /dev/net && exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", hide, "sh")
    error = _refused(made, host, wrapper=wrapper)
    assert "/dev/net/tun" in error
    assert "modprobe tun" in error


@pytest.mark.parametrize("name", ["recvmmsg", "sendmmsg"])
def test_a_sandbox_in_which_no_packet_would_move(made: Lab, host: Host, name: str) -> None:
    wrapper = (sys.executable, "-m", "tests.lab.without_call", name)
    error = _refused(made, host, wrapper=wrapper)
    assert f"the system call {name}, by which packets move, is not permitted here" in error


def test_too_few_threads(made: Lab, host: Host) -> None:
    wrapper = (sys.executable, "-m", "tests.lab.without_call", "clone3")
    assert "this process may have 0 more threads" in _refused(made, host, wrapper=wrapper)


@pytest.mark.parametrize("limit", [48, 64, 128, 137, 144, 150])
def test_too_few_descriptors(made: Lab, host: Host, limit: int) -> None:
    """The sockets are opened first, then the TUN's queues, and at last one here and there."""
    error = _refused(made, host, wrapper=("prlimit", f"--nofile={limit}:{limit}"))
    assert f"{limit} open files are too few" in error
    assert "LimitNOFILE=" in error
    assert "modprobe" not in error


@pytest.mark.parametrize("megabytes", [128, 256, 511])
def test_too_little_address_space(made: Lab, host: Host, megabytes: int) -> None:
    limit = megabytes << 20
    error = _refused(made, host, wrapper=("prlimit", f"--as={limit}:{limit}"))
    assert f"{megabytes} MB of address space are too few" in error
    assert "ulimit -v" in error


def test_as_little_address_space_as_is_needed(made: Lab, host: Host) -> None:
    made.start_daemon(host, wrapper=("prlimit", f"--as={512 << 20}"))
    host.subnet_file.unlink()


def test_a_low_limit_that_may_be_raised(made: Lab, host: Host) -> None:
    made.start_daemon(host, wrapper=("prlimit", "--nofile=64:1024"))
    host.subnet_file.unlink()


def test_leftover_kernel_device_and_its_replacement(made: Lab, host: Host) -> None:
    mac = "0a:00:00:00:00:05"
    # fmt: off
    host.ip("link", "add", "flannel.1", "address", mac, "type", "vxlan", "id", "1", "dev", "eth0",
            "dstport", "8472", "nolearning")
    # fmt: on
    host.ip("link", "set", "flannel.1", "up")
    error = _refused(made, host)
    assert "kernel vxlan device" in error
    assert "--replace-kernel-device" in error
    state = host.folder / "state" / "flannel.1.json"
    state.unlink(missing_ok=True)
    made.start_daemon(host, "--replace-kernel-device")
    ((_, lease),) = made.leases().items()
    assert lease["BackendData"] == {"VNI": 1, "VtepMAC": mac}
    host.subnet_file.unlink()


def test_kubernetes_is_refused(made: Lab, host: Host) -> None:
    assert "--kube-subnet-mgr" in _refused(made, host, "--kube-subnet-mgr")


def test_unknown_flag_is_a_usage_error(made: Lab, host: Host) -> None:
    index = made.start_daemon(host, "--nope", wait=False)
    assert host.processes[index].wait(20) == 2
    assert "unknown flag --nope" in host.log.read_text()


def _wait_for_page(host: Host, beginning: str) -> None:
    page = ("curl", "-s", "http://127.0.0.1:8081/readyz")
    wait_until(lambda: host.exec(*page, check=False).startswith(beginning), beginning)


def test_no_configuration_yet_is_waited_for_and_sigterm_ends_it_with_0(
    made: Lab, host: Host
) -> None:
    made.etcdctl("del", f"{PREFIX}/config")
    index = made.start_daemon(host, "--healthz-port", "8081", wait=False)
    _wait_for_page(host, f"starting: etcd key {PREFIX}/config is not there yet\n")
    assert host.stop(index) == 0


def test_what_etcd_lets_it_wait_for_is_on_the_ready_page(made: Lab, host: Host) -> None:
    away = "--etcd-endpoints=http://192.168.77.1:1"
    made.start_daemon(host, "--healthz-port", "8081", away, wait=False)
    _wait_for_page(host, "starting: etcd does not answer: http://192.168.77.1:1: ")


def test_a_wrong_interface_is_told_while_etcd_is_waited_for(made: Lab, host: Host) -> None:
    away = "--etcd-endpoints=http://192.168.77.1:1"
    index = made.start_daemon(host, away, iface="nope0", wait=False)
    said = "unless that changes, the start will end: no interface for the underlay: there is no"
    host.wait_for_log(f"{said} interface nope0")
    assert host.stop(index) == 0


def test_two_hosts_with_one_public_ip_are_reported_and_neither_fights(
    made: Lab, host: Host
) -> None:
    first = made.start_daemon(host, "--healthz-port", "8081")
    other = made.hosts[1]
    (other.folder / "state").mkdir(exist_ok=True)
    machine_id = json.loads((host.folder / "state" / "flannel.1.json").read_text())["machine_id"]
    (other.folder / "state" / "flannel.1.json").write_text(
        json.dumps({"machine_id": machine_id, "vtep_mac": "0a:00:00:00:00:06"})
    )
    made.start_daemon(other, "--public-ip", str(host.address))
    wait_until(lambda: "somebody else wrote to our lease" in host.log.read_text(), "a report")
    (lease,) = made.leases().values()
    assert lease["BackendData"] == {"VNI": 1, "VtepMAC": "0a:00:00:00:00:06"}
    program = (
        "import urllib.request as r,urllib.error as e\n"
        "try: print(r.urlopen('http://127.0.0.1:8081/readyz').read())\n"
        "except e.HTTPError as error: print(error.code, error.read())"
    )
    assert "503" in host.exec("python3", "-c", program)
    assert host.processes[first].poll() is None
    other.stop(0)
    other.processes.clear()
    host.subnet_file.unlink()


def test_reservation_stays_one(made: Lab, host: Host) -> None:
    key = f"{PREFIX}/subnets/10.244.9.0-24"
    made.etcdctl("put", key, f'{{"PublicIP":"{host.address}"}}')
    made.start_daemon(host)
    assert host.subnet_env()["FLANNEL_SUBNET"] == "10.244.9.1/24"
    (kv,) = json.loads(made.etcdctl("get", "-w", "json", key))["kvs"]
    assert kv.get("lease", 0) == 0
    assert list(made.leases()) == ["10.244.9.0-24"]
    host.subnet_file.unlink()
