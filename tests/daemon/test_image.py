"""The Dockerfile and docker-compose.yml as they are: two containers that are hosts of one overlay.

A docker engine of our own, without rules on this host, builds the images. Where no registry is to
be had, Debian's own packages make the base image.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from tests.lab.hosts import run as host_run
from tests.lab.hosts import wait_until
from tests.lab.machine import ROOT
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.slow

BASE = "debian:bookworm-slim"
TUN = Path("/dev/net/tun")
SOURCES, CERTIFICATES = "etc/apt/sources.list.d/debian.sources", Path("/etc/machine.crt")
# A build fetches packages by the network that this host has.
OVERRIDE = """\
version: "2.4"
services:
  etcd: {build: {network: host}}
  config: {build: {network: host}}
  host1: {build: {network: host}}
  host2: {build: {network: host}}
"""
Run = Callable[..., str]


def _start_engine(folder: Path, stack: ExitStack) -> Run:
    """Start dockerd; return what runs a program that speaks to it and returns its output."""
    socket = f"unix://{folder}/docker.sock"
    # Containers in this host's network leave a mount behind, which holds the folder.
    stack.callback(host_run, "umount", str(folder / "exec/netns/default"), check=False)
    # fmt: off
    engine = subprocess.Popen(
        ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec",
         "--host", socket, "--pidfile", folder / "pid",
         "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"],
        stdout=(folder / "dockerd.log").open("wb"), stderr=subprocess.STDOUT,
    )
    # fmt: on
    stack.callback(engine.wait, 30)
    stack.callback(engine.send_signal, signal.SIGTERM)

    def run(*words: str, fails: bool = False, stdin: IO[bytes] | None = None) -> str:
        done = subprocess.run(
            words,
            env={**os.environ, "DOCKER_HOST": socket},
            cwd=ROOT,
            capture_output=True,
            timeout=400,
            stdin=stdin,
        )
        output = (done.stdout + done.stderr).decode()
        assert fails or done.returncode == 0, f"{words}: {output[-3000:]}"
        return output

    wait_until(lambda: "Server:" in run("docker", "version", fails=True), "the engine answers")
    return run


def _make_base(folder: Path, run: Run) -> None:
    """Get the base image from a registry, or make it of the packages that this host gets."""
    if "Downloaded" in run("docker", "pull", BASE, fails=True):
        return
    root, sources = folder / "root", Path("/", SOURCES).read_text()
    (mirror,) = {line.split()[1] for line in sources.splitlines()[:3] if line.startswith("URIs:")}
    run("debootstrap", "--variant=minbase", "bookworm", str(root), mirror)
    (root / "etc/apt/sources.list").unlink()
    (root / SOURCES).write_text(sources)
    for file in Path("/etc/apt/apt.conf.d").glob("99*"):
        (root / file.relative_to("/")).write_text(file.read_text())
    changes = ['CMD ["bash"]']
    if trusted := os.environ.get("PIP_CERT"):
        (root / CERTIFICATES.relative_to("/")).write_text(Path(trusted).read_text())
        changes.append(f"ENV PIP_CERT={CERTIFICATES}")
    tar = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
    # fmt: off
    run("docker", "import", *(x for change in changes for x in ("-c", change)), "-", BASE,
        stdin=tar.stdout)
    # fmt: on
    assert tar.wait() == 0


def _compose_file(folder: Path) -> Path:
    """Return docker-compose.yml, with another TUN where this host's is not for everybody (udev)."""
    text = (ROOT / "docker-compose.yml").read_text()
    if TUN.stat().st_mode & 0o006 != 0o006:
        everybodys = folder / "tun"
        os.mknod(everybodys, 0o020666, TUN.stat().st_rdev)
        everybodys.chmod(0o666)
        assert f"[{TUN}]" in text
        text = text.replace(f"[{TUN}]", f'["{everybodys}:{TUN}"]')
    path = folder / "compose.yml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The services of docker-compose.yml, running; runs docker-compose and docker."""
    require_root()
    for program in ("dockerd", "docker", "docker-compose", "debootstrap"):
        require_program(program)
    folder = tmp_path_factory.mktemp("engine")
    with ExitStack() as stack:
        run = _start_engine(folder, stack)
        _make_base(folder, run)
        override = folder / "override.yml"
        override.write_text(OVERRIDE)
        files = ("-f", str(_compose_file(folder)), "-f", str(override))
        command = ("docker-compose", "-p", "pfu", "--project-directory", str(ROOT), *files)
        stack.callback(run, *command, "down", "-t", "0")
        run(*command, "up", "-d", "--build")
        yield run


def _health(run: Run, name: str) -> str:
    return run("docker", "inspect", "-f", "{{.State.Health.Status}}", f"pfu_{name}_1").strip()


def test_the_services_are_hosts_of_one_overlay(compose: Run) -> None:
    def inside(host: str, *words: str, fails: bool = False) -> str:
        return compose("docker", "exec", f"pfu_{host}_1", *words, fails=fails)

    for host in ("host1", "host2"):
        wait_until(lambda: _health(compose, host) == "healthy", f"{host} is healthy")  # noqa: B023
        assert inside(host, "id", "-u").strip() == "999"
        assert "FLANNEL_MTU=1450" in inside(host, "cat", "/run/flannel/subnet.env")
    (peer,) = [
        line.split("/")[0]
        for line in inside("host1", "ip", "route").splitlines()
        if "dev flannel.1 onlink" in line
    ]
    wait_until(lambda: "1 received" in inside("host1", "ping", "-c1", peer, fails=True), "a ping")
    status = inside("host2", "/opt/pyflannel/bin/pyflannel-udp", "status")
    assert "state     ready" in status
    compose("docker", "stop", "--time", "5", "pfu_host1_1")
    assert compose("docker", "inspect", "-f", "{{.State.ExitCode}}", "pfu_host1_1").strip() == "0"
    assert "Exiting cleanly" in compose("docker", "logs", "pfu_host1_1")


def test_the_image_is_as_small_as_it_says(compose: Run) -> None:
    ours, base = (
        int(compose("docker", "image", "inspect", "-f", "{{.Size}}", name))
        for name in ("pfu_host1", BASE)
    )
    (said,) = re.findall(r"image adds (\d+) MB to", (ROOT / "README.md").read_text())
    print(f"{ours / 1e6:.0f} MB, of which the base has {base / 1e6:.0f}")
    assert ours - base <= 1.15 * int(said) * 1e6  # Debian's packages grow a little


def test_the_image_has_no_compiler_and_no_pip(compose: Run) -> None:
    # fmt: off
    found = compose("docker", "run", "--rm", "--network", "none", "--entrypoint", "sh", "pfu_host1",
                    "-c", "for name in gcc pip pip3 sh; do command -v $name; done; "
                    "ls /opt/pyflannel/lib/python3*/site-packages")
    # fmt: on
    names = {Path(word).name for word in found.split()}
    assert {"sh", "pyflannel"} <= names
    assert not names & {"gcc", "pip", "pip3"}
