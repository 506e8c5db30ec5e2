"""A real etcd of one or three members, on loopback or inside a namespace, to be mistreated.

Members are killed, frozen, wiped and restored here, never faked.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.hosts import LONE_MEMBER, etcd_serves, freeze, wait_until

PREFIX = "/coreos.com/network"
SUBNETS = f"{PREFIX}/subnets/"


@dataclass
class Member:
    """One member and its process."""

    name: str
    client_url: str
    peer_url: str
    folder: Path
    wrapper: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """Its data directory."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """What it wrote."""
        return self.folder / f"{self.name}.log"

    def signal(self, number: int) -> None:
        """Send a signal to it."""
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Make it hang, its connections stay open."""
        assert self.process is not None
        freeze(self.process)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without notice."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class EtcdCluster:
    """Members that are started together; `close` ends them."""

    def __init__(
        self,
        folder: Path,
        addresses: Sequence[tuple[str, int, int]],
        *,
        flags: Sequence[str] = (),
        tls: Sequence[str] = (),
        ctl: Sequence[str] = (),
        wrappers: Sequence[Sequence[str]] = (),
        ctl_wrapper: Sequence[str] = (),
    ) -> None:
        scheme = "https" if tls else "http"
        self.members = [
            Member(
                f"m{number}",
                f"{scheme}://{host}:{client}",
                f"http://{host}:{peer}",
                folder,
                tuple(wrapper),
            )
            for number, ((host, client, peer), wrapper) in enumerate(
                zip(addresses, wrappers or [()] * len(addresses))
            )
        ]
        self._flags = (*(LONE_MEMBER if len(addresses) == 1 else ()), *flags, *tls)
        self._ctl_wrapper = tuple(ctl_wrapper)
        self.ctl = tuple(ctl)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The client URLs of all members."""
        return tuple(member.client_url for member in self.members)

    def start(self, *members: Member, wait: bool = True) -> None:
        """Start these members, or all."""
        with ExitStack() as stack:
            for member in members or self.members:
                if wait:
                    stack.enter_context(etcd_serves(member.log))
                self._start(member)
        if wait:
            self.wait_healthy()

    def _start(self, member: Member) -> None:
        # fmt: off
        command = [
            *member.wrapper, "etcd", "--name", member.name, "--data-dir", str(member.data),
            "--listen-client-urls", member.client_url,
            "--advertise-client-urls", member.client_url,
            "--listen-peer-urls", member.peer_url,
            "--initial-advertise-peer-urls", member.peer_url,
            "--initial-cluster", self._initial_cluster, *self._flags,
        ]
        # fmt: on
        unsupported = {"ETCD_UNSUPPORTED_ARCH": "arm64"} if os.uname().machine == "aarch64" else {}
        with member.log.open("ab") as output:
            member.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **unsupported},
            )

    @property
    def _initial_cluster(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def wait_healthy(self) -> None:
        """Wait until a linearizable read works at every member that runs."""
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                wait_until(
                    lambda url=member.client_url: (  # type: ignore[misc]  # bound at once
                        "is healthy" in self.run("endpoint", "health", endpoint=url, check=False)
                    ),
                    f"{member.name} is healthy",
                )

    def run(self, *words: str, endpoint: str | None = None, check: bool = True) -> str:
        """Run etcdctl; what it printed, standard error too."""
        # fmt: off
        done = subprocess.run(
            [*self._ctl_wrapper, "etcdctl", f"--endpoints={endpoint or ','.join(self.endpoints)}",
             "--command-timeout=5s", *self.ctl, *words],
            capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"}, timeout=60,
        )
        # fmt: on
        if check and done.returncode:
            raise RuntimeError(f"etcdctl {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def kvs(self, prefix: str = SUBNETS) -> list[dict[str, Any]]:
        """Return the entries under a prefix as `etcdctl -w json` gives them."""
        answer = json.loads(self.run("get", "--prefix", prefix, "-w", "json"))
        found: list[dict[str, Any]] = answer.get("kvs", [])
        return found

    def revision(self) -> int:
        """Return the revision of the store."""
        return int(json.loads(self.run("get", "none", "-w", "json"))["header"]["revision"])

    def leader(self) -> Member:
        """Return the member that leads."""
        for member in self.members:
            if member.process is None or member.process.poll() is not None:
                continue
            answer = json.loads(
                self.run("endpoint", "status", "-w", "json", endpoint=member.client_url)
            )
            status = answer[0]["Status"]
            if status["leader"] == status["header"]["member_id"]:
                return member
        raise AssertionError("no member leads")

    def wipe(self) -> None:
        """Kill all members and delete what they stored."""
        for member in self.members:
            member.kill()
            shutil.rmtree(member.data)

    def save(self, path: Path) -> None:
        """Save a snapshot of the store."""
        path.unlink(missing_ok=True)
        self.run("snapshot", "save", str(path), endpoint=self.endpoints[0])

    def restore(self, path: Path) -> None:
        """Kill all members and put a saved snapshot in the place of their stores."""
        self.wipe()
        for member in self.members:
            # fmt: off
            self.run("snapshot", "restore", str(path), "--name", member.name,
                     "--data-dir", str(member.data), "--initial-cluster", self._initial_cluster,
                     "--initial-advertise-peer-urls", member.peer_url)
            # fmt: on

    def close(self) -> None:
        """End all members."""
        for member in self.members:
            member.kill()


_reservations: list[socket.socket] = []
"""Names that keep a port for this process, as tests run in several at once."""


def free_port() -> int:
    """Return a TCP port on loopback that nobody listens on, and that no other call has returned.

    It lies below those that the kernel gives to clients: one of them could take it while a member
    is down.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        reservation = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, suppress(OSError):
            reservation.bind(f"\0pfu-port-{port}")
            probe.bind(("127.0.0.1", port))
            _reservations.append(reservation)
            return port
        reservation.close()


@contextmanager
def etcd_on_loopback(
    folder: Path, members: int = 1, **settings: Sequence[str]
) -> Iterator[EtcdCluster]:
    """Run an etcd on loopback for the time of the context."""
    addresses = [("127.0.0.1", free_port(), free_port()) for _ in range(members)]
    cluster = EtcdCluster(folder, addresses, **settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
