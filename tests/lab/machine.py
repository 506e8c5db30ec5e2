"""A host as an operator finds it: with /etc, /opt, /var/lib and /run of its own, and a shell.

Each has process, mount and network namespaces of its own. /etc, /opt, /usr/local and /var/lib are
overlays of the machine's, /run is empty; all that is written is gone with the host. systemd is not
there: tests/lab/systemctl.py stands in for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.hosts import Host, Lab, run, wait_until

ROOT = Path(__file__).parent.parent.parent
STAND_IN = Path(__file__).parent / "systemctl.py"
SHELL_SECONDS = 150

HOLD = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
for folder in etc opt usr/local var/lib; do
  own="$1/$folder"
  mkdir -p "$own/upper" "$own/work"
  mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$own/upper,workdir=$own/work" "/$folder"
done
for folder in docker containerd; do
  mkdir -p "/var/lib/$folder"
  mount -t tmpfs tmpfs "/var/lib/$folder"
done
rm -rf /var/lib/etcd /etc/docker /opt/pyflannel
echo held
exec sleep infinity
"""

JOURNALCTL = """#!/bin/sh
exec cat "/run/systemctl-started/$2.service.log"
"""


@dataclass
class Machine:
    """A host that looks freshly installed; `shell` runs what an operator types there.

    `tools` is a folder in front of its PATH, `checkout` a copy of this project, `env` what every
    shell has in its environment.
    """

    host: Host
    pid: int
    checkout: Path
    tools: Path
    env: dict[str, str] = field(default_factory=dict)

    def install(self, name: str, script: str) -> None:
        """Put a program on its PATH."""
        (self.tools / name).write_text(script)
        (self.tools / name).chmod(0o755)

    def shell(self, commands: str, stdin: bytes = b"", *, fails: bool = False) -> str:
        """Run commands, stop at the first that fails; return what they print.

        `fails` expects that they do.
        """
        # The package index cannot be reached from the lab's switch.
        namespaces = ("-m", "-p") if "pip install" in commands else ("-m", "-p", "-n")
        path = f"{self.tools}:{os.environ['PATH']}"
        done = subprocess.run(
            [
                "nsenter",
                "-t",
                str(self.pid),
                *namespaces,
                "bash",
                "-ec",
                f"cd {self.checkout}\n{commands}",
            ],
            env={**os.environ, **self.env, "PATH": path},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SHELL_SECONDS,
        )
        printed = done.stdout.decode()
        assert bool(done.returncode) == fails, (
            f"{self.host.name}, code {done.returncode}:\n{commands}\n{printed}\n{self.logs()}"
        )
        return printed

    def logs(self) -> str:
        """Return the end of what the services logged."""
        root = Path(f"/proc/{self.pid}/root/run/systemctl-started")
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(root.glob("*.log"))
        )


def start_machines(
    stack: ExitStack, addresses: Mapping[str, str]
) -> tuple[Lab, dict[str, Machine]]:
    """Make hosts on a switch, each with the address that its name is given, as 192.0.2.11/24."""
    made = Lab()
    stack.callback(made.close)
    # Overlays want another file system below them than the one of a container.
    run("mount", "-t", "tmpfs", "tmpfs", str(made.folder))
    stack.callback(run, "umount", "-l", str(made.folder))
    made.start_switch()
    found = {}
    for name, address in addresses.items():
        host = made.add_host()
        host.ip("addr", "flush", "dev", "eth0")
        host.ip("addr", "add", address, "dev", "eth0")
        found[name] = _boot(host, stack)
    return made, found


def _boot(host: Host, stack: ExitStack) -> Machine:
    """Hold the namespaces of a host by a process whose end is the end of all others in it."""
    # fmt: off
    holder = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{host.name}", "unshare", "-m", "-p", "-f", "--kill-child",
         "--mount-proc", "sh", "-c", HOLD, "sh", str(host.folder)],
        stdout=subprocess.PIPE, text=True,
    )
    # fmt: on
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    wait_until(lambda: bool(children.read_text().split()), "the holder's child")
    (pid,) = map(int, children.read_text().split())
    tools, checkout = host.folder / "bin", host.folder / "checkout"
    tools.mkdir()
    checkout.mkdir()
    machine = Machine(host, pid, checkout, tools)
    machine.install("systemctl", f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    machine.install("journalctl", JOURNALCTL)
    return machine


def check_out(machine: Machine) -> None:
    """Copy what the index lists, as it is now: no build products, not only what is committed."""
    for name in run("git", "-C", str(ROOT), "ls-files").splitlines():
        target = machine.checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
