"""What systemd is told, what SIGHUP does, and what happens when a packet thread hangs.

h1 (ours) --- switch, etcd
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyflannel.management.notify import notify
from pyflannel.node.pulse import watchdog_seconds
from tests.lab.hosts import CONFIG, PREFIX, Host, Lab, freeze, lab, wait_until
from tests.lab.require import require_program, require_root

PORT = 8081
LEASES = 4000
QUEUE_LENGTH = Path("/proc/sys/net/unix/max_dgram_qlen")
# sys/ptrace.h
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WAIT_ALL_THREADS = 0x40000000


class Supervisor:
    """Stands in for systemd's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.told: list[str] = []

    def env(self, *more: str) -> tuple[str, ...]:
        return ("env", f"NOTIFY_SOCKET={self.path}", *more)

    def has(self, state: str) -> bool:
        try:
            while True:
                self.told.append(self._socket.recv(1000).decode())
        except BlockingIOError:
            return any(state in message for message in self.told)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl"):
        require_program(program)
    with lab(1) as made:
        yield made


@pytest.fixture
def host(made: Lab) -> Iterator[Host]:
    made.put_config()
    host = made.hosts[0]
    host.log.unlink(missing_ok=True)
    yield host
    for index in range(len(host.processes)):
        host.stop(index)
    host.processes.clear()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "notify")
    yield made
    made.close()


def _page(made: Lab, host: Host, name: str) -> tuple[int, str]:
    program = (
        "import urllib.request as r,urllib.error as e\n"
        f"try: a=r.urlopen('http://{host.address}:{PORT}/{name}')\n"
        "except e.HTTPError as error: a=error\n"
        "print(a.status, a.read().decode(), end='')"
    )
    status, _, body = made.switch.exec("python3", "-c", program).partition(" ")
    return int(status), body


def test_ready_reloading_stopping(made: Lab, host: Host, supervisor: Supervisor) -> None:
    index = made.start_daemon(host, wrapper=supervisor.env())
    wait_until(lambda: supervisor.has("READY=1"), "READY")
    supervisor.told.clear()
    host.processes[index].send_signal(signal.SIGHUP)
    wait_until(lambda: supervisor.has("READY=1"), "READY after the reload")
    reloading, ready = supervisor.told
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert ready == "READY=1"
    assert host.stop(index) == 0
    assert supervisor.has("STOPPING=1")
    assert not supervisor.has("WATCHDOG=1")


def test_ready_means_that_every_lease_is_in_force(
    made: Lab, host: Host, supervisor: Supervisor
) -> None:
    made.put_config('{"Network":"10.0.0.0/8","SubnetMin":"10.200.0.0","Backend":{"Type":"vxlan"}}')
    made.add_leases(LEASES)
    index = made.start_daemon(host, wrapper=supervisor.env(), wait=False)
    try:
        wait_until(lambda: supervisor.has("READY=1"), "READY")
        freeze(host.processes[index])
        assert host.ip("route").count(" dev flannel.1 onlink") == LEASES
        host.processes[index].send_signal(signal.SIGCONT)
        assert len(host.ask("peers")) == LEASES
    finally:
        made.etcdctl("del", "--prefix", f"{PREFIX}/subnets/")


def test_sighup_uses_what_it_can_and_names_the_rest(made: Lab, host: Host) -> None:
    options = host.folder / "options.env"
    options.write_text("# of this host\nFLANNELD_V=0\nFLANNELD_POLL_US='0'\n")
    index = made.start_daemon(host, "--options-file", str(options))
    options.write_text("FLANNELD_V=2\nFLANNELD_POLL_US='50'\nFLANNELD_IFACE=eth1\n")
    made.put_config(CONFIG.replace("16", "17"))
    host.processes[index].send_signal(signal.SIGHUP)
    wait_until(lambda: "Reloaded: " in host.log.read_text(), "the reload is told")
    (line,) = (x for x in host.log.read_text().splitlines() if "Reloaded: " in x)
    assert "verbosity 2 instead of 0" in line
    # --iface is on the command line, which outweighs the file.
    assert "; --poll-us changed and need a restart" in line
    assert "the network configuration has another ipv4, which needs a restart" in line
    assert host.processes[index].poll() is None


def test_sighup_with_an_options_file_that_is_gone_changes_nothing(made: Lab, host: Host) -> None:
    options = host.folder / "options.env"
    options.write_text("FLANNELD_V=2\n")
    index = made.start_daemon(host, "--options-file", str(options))
    options.unlink()
    host.processes[index].send_signal(signal.SIGHUP)
    wait_until(lambda: "Reloaded: options stay" in host.log.read_text(), "the reload is told")
    assert "cannot be read" in host.log.read_text()


def test_a_configuration_that_went_bad_is_told_and_the_old_one_stays(made: Lab, host: Host) -> None:
    index = made.start_daemon(host, "--healthz-port", str(PORT))
    assert _page(made, host, "readyz") == (200, "pyflannel-udp is ready\n")
    made.put_config('{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}')
    host.processes[index].send_signal(signal.SIGHUP)
    wait_until(lambda: _page(made, host, "readyz")[0] == 503, "it becomes unready")
    _, body = _page(made, host, "readyz")
    assert 'Backend.Type "udp"' in body
    assert "stays in use" in body
    assert _page(made, host, "healthz")[0] == 200
    made.put_config()
    host.processes[index].send_signal(signal.SIGHUP)
    wait_until(lambda: _page(made, host, "readyz")[0] == 200, "it becomes ready again")


def test_a_peer_whose_route_the_kernel_refuses_makes_it_unready(made: Lab, host: Host) -> None:
    made.start_daemon(host, "--healthz-port", str(PORT))
    # A gateway that is our own address is none.
    host.ip("addr", "add", "10.244.200.0/32", "dev", "flannel.1")
    key = f"{PREFIX}/subnets/10.244.200.0-24"
    vtep = '{"VNI":1,"VtepMAC":"0a:00:00:00:00:03"}'
    address = '"PublicIP":"192.168.77.200"'
    made.etcdctl("put", key, f'{{{address},"BackendType":"vxlan","BackendData":{vtep}}}')
    wait_until(lambda: _page(made, host, "readyz")[0] == 503, "it becomes unready")
    _, body = _page(made, host, "readyz")
    assert body.startswith("routes: the kernel refuses the route to 10.244.200.0/24: Invalid argu")
    host.ip("addr", "del", "10.244.200.0/32", "dev", "flannel.1")
    wait_until(lambda: _page(made, host, "readyz")[0] == 200, "it becomes ready again")
    assert "10.244.200.0/24" in host.ip("route")
    made.etcdctl("del", key)


@pytest.mark.parametrize("workers", ["1", "auto"])
def test_a_thread_that_hangs_starves_the_watchdog_until_it_goes_on(
    made: Lab, host: Host, supervisor: Supervisor, workers: str
) -> None:
    wrapper = supervisor.env("WATCHDOG_USEC=1000000")
    index = made.start_daemon(
        host, "--healthz-port", str(PORT), "--workers", workers, wrapper=wrapper
    )
    wait_until(lambda: supervisor.has("WATCHDOG=1"), "the watchdog is fed")
    pid = host.processes[index].pid
    hanging = [
        int(task.name)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if (task / "comm").read_text().startswith("fp-")
    ][-1]
    with _stopped(hanging):
        wait_until(lambda: _page(made, host, "healthz")[0] == 503, "/healthz fails")
        assert "a packet thread of flannel.1 has hung" in _page(made, host, "readyz")[1]
        supervisor.has("")
        supervisor.told.clear()
    wait_until(lambda: _page(made, host, "healthz")[0] == 200, "/healthz is well again")
    assert _page(made, host, "readyz")[0] == 200
    wait_until(lambda: supervisor.has("WATCHDOG=1"), "the watchdog is fed again")


@contextmanager
def _stopped(thread: int) -> Iterator[None]:
    """Keep one thread of a process from running, by ptrace(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(PTRACE_SEIZE, thread, None, None) == 0, os.strerror(ctypes.get_errno())
    try:
        assert libc.ptrace(PTRACE_INTERRUPT, thread, None, None) == 0
        os.waitpid(thread, WAIT_ALL_THREADS)
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, thread, None, None)


def test_a_supervisor_that_does_not_read_does_not_stop_the_node(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(supervisor.path))
    more_than_fit = int(QUEUE_LENGTH.read_text()) + 10
    for _ in range(more_than_fit):
        notify("WATCHDOG=1")
    assert supervisor.has("WATCHDOG=1")
    assert len(supervisor.told) < more_than_fit


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_watchdog_variables(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ) == seconds
