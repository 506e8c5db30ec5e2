"""A node whose root is nobody outside: its network namespace belongs to a user namespace.

h1 ---------------------------+
h2, in a user namespace ------+-- switch, etcd
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.hosts import Host, Lab, container_address, is_reached, lab
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

RMEM_MAX = Path("/proc/sys/net/core/rmem_max")
LINUX_DEFAULT = "212992"
"""Of RMEM_MAX, in bytes; it is that of the whole machine."""


@contextmanager
def user_namespace() -> Iterator[int]:
    """Yield the pid of a process that has a user namespace and, of that, a network namespace."""
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


@contextmanager
def small_rmem_max() -> Iterator[None]:
    before = RMEM_MAX.read_text()
    RMEM_MAX.write_text(LINUX_DEFAULT)
    try:
        yield
    finally:
        RMEM_MAX.write_text(before)


@pytest.fixture(scope="module")
def owner() -> Iterator[int]:
    require_root()
    for program in (
        "etcd",
        "etcdctl",
        "ip",
        "iptables-save",
        "nsenter",
        "ping",
        "setpriv",
        "unshare",
    ):
        require_program(program)
    with user_namespace() as pid:
        yield pid


@pytest.fixture(scope="module")
def wrapper(owner: int) -> tuple[str, ...]:
    """Return what runs a command in the user namespace."""
    return ("nsenter", "--target", str(owner), "--user", "--preserve-credentials")


@pytest.fixture(scope="module")
def made(owner: int, wrapper: tuple[str, ...]) -> Iterator[Lab]:
    with small_rmem_max(), lab(1) as made:
        made.put_config()
        made.add_host(owner)
        for host, inside in zip(made.hosts, ((), wrapper)):
            made.start_daemon(host, "--ip-masq", wrapper=inside)
            made.add_container(host)
        yield made


def test_it_needs_no_right_outside(made: Lab) -> None:
    here, there = made.hosts
    (daemon,) = there.processes
    mine, its = (Path(f"/proc/{pid}/ns/user").readlink() for pid in ("self", daemon.pid))
    assert its != mine
    for source, target in ((here, there), (there, here)):
        assert source.container is not None
        assert is_reached(source.container, container_address(target))
    assert "FLANNEL-POSTRTG" in there.exec("iptables-save")


def test_what_is_less_there_is_told(made: Lab, wrapper: tuple[str, ...]) -> None:
    here, there = made.hosts
    sentence = "receive buffers hold 208 KB instead of 4096"
    assert there.log.read_text().count(sentence) == 1
    assert sentence not in here.log.read_text()
    there.wait_for_log("packet threads run at normal priority")
    assert _receive_buffer(here, here.folder, *wrapper) == []
    # Whom it lacks the right for is told that.
    nowhere = made.folder
    assert _receive_buffer(here, nowhere, "setpriv", "--bounding-set=-net_admin") == []
    # The daemon's are looked at, or what one that is started so would have.
    for found in (_receive_buffer(there, there.folder), _receive_buffer(there, nowhere, *wrapper)):
        (finding,) = found
        assert finding["sentence"].startswith(sentence)
        assert finding["remedy"].endswith("sysctl -w net.core.rmem_max=4194304")


def _receive_buffer(host: Host, folder: Path, *wrapper: str) -> list[dict[str, str]]:
    """Return what `doctor` finds about it, with the daemon whose control socket is in a folder."""
    # fmt: off
    text = host.exec(
        *wrapper, sys.executable, "-m", "pyflannel", "doctor", "--json", "--iface", host.iface,
        "--control-dir", str(folder), "--state-dir", str(host.folder / "state"),
        "--etcd-endpoints", "http://192.0.2.1:9", check=False,
    )
    # fmt: on
    findings = json.loads(text)["findings"]
    return [finding for finding in findings if finding["check"] == "receive-buffer"]
