"""The nodes and the members, shared by the tests of a file; both daemons outlive each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.lab.faults import STREAM, Cpu, Faults, tokens_cluster
from tests.lab.hosts import container_address, lab, ping, wait_until
from tests.lab.require import require_program, require_root


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "nft", "ping"):
        require_program(program)
    with lab(5) as made:
        cluster = tokens_cluster(made)
        try:
            cluster.start()
            faults = Faults(made, cluster)
            faults.provision()
            # fmt: off
            flags = ["--etcd-endpoints", ",".join(cluster.endpoints),
                     "--etcd-username", "root", "--etcd-password", "secret"]
            # fmt: on
            for host in faults.nodes:
                made.start_daemon(host, *flags)
            source, target = (made.add_container(host) for host in faults.nodes)
            target.start(sys.executable, STREAM, "echo", "7", log=made.folder / "echo.log")
            wait_until(lambda: ping(source, container_address(faults.nodes[1])), "a ping")
            # What is sent to a port that nobody has comes back as an error and ends the stream.
            wait_until(lambda: bool(target.exec("ss", "-Hlun", "sport = :7")), "the echo listens")
            yield faults
        finally:
            for host in made.hosts[:2]:
                # Shown with a failure only.
                print(host.log.read_text() if host.log.exists() else "no log")
            cluster.close()


@pytest.fixture(scope="module", autouse=True)
def cpu(faults: Faults) -> Iterator[Cpu]:
    made = Cpu([host.processes[0].pid for host in faults.nodes])
    made.start()
    yield made
    made.end()


@pytest.fixture(autouse=True)
def alive(faults: Faults) -> Iterator[None]:
    """Both daemons outlive each test, and forget nobody."""
    before = {host.name: set(host.ip("route").splitlines()) for host in faults.nodes}
    yield
    for host in faults.nodes:
        assert host.processes[0].poll() is None, host.log.read_text()
        assert "Traceback" not in host.log.read_text()
        assert set(host.ip("route").splitlines()) >= before[host.name]
