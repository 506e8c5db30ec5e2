"""Debian's systemd as process 1 of a lab host, with the real unit file of deploy/.

It has process, mount, cgroup, IPC and host name namespaces of its own. Its root is an overlay of
the machine's, written to a tmpfs; pivot_root(2) leaves no way to the machine's folders. Of the
units of systemd there are only UNITS, and no generators: nothing that cleans up, mounts or tunes a
machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.hosts import Host, run, wait_until

ROOT = Path(__file__).parent.parent.parent
SERVICE = "pyflannel-udp"
UNIT = f"{SERVICE}.service"
UNITS = (
    "basic.target network-online.target network.target shutdown.target sysinit.target"
    " systemd-journald.service systemd-journald.socket umount.target"
)

BOOT = """
set -e
own=$1 tag=$2
mount -t tmpfs tmpfs "$own"
cd "$own"
mkdir cgroup upper work root
mount -t cgroup2 cgroup2 cgroup
mkdir "cgroup/$tag"
echo 0 >"cgroup/$tag/cgroup.procs"
umount cgroup
mount -t overlay overlay -o "lowerdir=/,upperdir=upper,workdir=work" root
units=root/usr/lib/systemd/system
mkdir units
for name in $3; do cp "/usr/lib/systemd/system/$name" units; done
for folder in dev etc/systemd/system opt run tmp usr/lib/systemd/system \
    usr/lib/systemd/system-generators var/lib var/log var/tmp; do
  mount -t tmpfs -o mode=755 tmpfs "root/$folder"
done
chmod 1777 root/tmp root/var/tmp
cp units/* root/usr/lib/systemd/system
mkdir root/etc/systemd/system/sysinit.target.wants
ln -s /usr/lib/systemd/system/systemd-journald.service root/etc/systemd/system/sysinit.target.wants
mkdir -p root/opt/checkout root/opt/packages root/opt/python root/opt/pyflannel/bin
mount --bind -o ro "$4" root/opt/checkout
mount --bind -o ro "$5" root/opt/packages
mount --bind -o ro "$6" root/opt/python
cp "$own".unit "root/etc/systemd/system/pyflannel-udp.service"
cp "$own".default root/etc/default/pyflannel-udp
cp "$own".program root/opt/pyflannel/bin/pyflannel-udp
for name in null zero full random urandom tty; do cp -a "/dev/$name" root/dev; done
mkdir root/dev/net root/dev/pts root/dev/shm
mknod root/dev/net/tun c 10 200
chmod 666 root/dev/net/tun
mount -t tmpfs tmpfs root/dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts root/dev/pts
ln -s pts/ptmx root/dev/ptmx
ln -s /proc/self/fd root/dev/fd
mount -t proc proc root/proc
mount --bind root/proc/sys root/proc/sys
mount -o remount,bind,ro root/proc/sys
mount -t sysfs -o ro sysfs root/sys
cd root
mkdir run/machine
pivot_root . run/machine
exec unshare --cgroup sh -c '
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
umount -l /run/machine
rmdir /run/machine
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  setpriv --bounding-set=-sys_boot,-sys_module,-sys_time \
  /lib/systemd/systemd --system --unit=basic.target --log-target=journal
'
"""

REMOVE = """
mount -t cgroup2 cgroup2 "$1"
for _ in $(seq 600); do
  [ ! -e "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} + 2>/dev/null
  [ -e "$1/$2" ] || exit 0
  sleep 0.05
done
echo "the cgroup $2 has not become empty" >&2
exit 1
"""

PROGRAM = """#!/bin/sh
export PYTHONPATH=/opt/checkout/src:/opt/packages LD_LIBRARY_PATH=/opt/python/lib
exec /opt/python/bin/{python} -m pyflannel "$@"
"""


@dataclass
class Booted:
    """A host whose services systemd runs; `pid` is process 1, seen from outside."""

    host: Host
    pid: int

    def run(self, *command: str, check: bool = True) -> str:
        """Run a program inside."""
        namespaces = ("-m", "-p", "-n", "-i", "-u", "-C")
        return run("nsenter", "-t", str(self.pid), *namespaces, "--", *command, check=check)

    def systemctl(self, *words: str, check: bool = True) -> str:
        """Run systemctl; it has no terminal and asks nothing."""
        return self.run("systemctl", "--no-pager", *words, check=check)

    def show(self, name: str) -> str:
        """Return a property of the service."""
        return self.systemctl("show", "--value", "-p", name, SERVICE).strip()

    def journal(self) -> str:
        """Return what the service and systemd have logged until now."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "-o", "cat", check=False)

    def path(self, name: str) -> Path:
        """Return a file's path as seen from outside."""
        return Path(f"/proc/{self.pid}/root") / name.lstrip("/")


@contextmanager
def booted(host: Host, settings: str) -> Iterator[Booted]:
    """Boot a host with the service installed, not started, and these lines as its settings."""
    own = host.folder / "systemd"
    own.mkdir()
    own.with_suffix(".default").write_text(settings)
    own.with_suffix(".program").write_text(
        PROGRAM.format(python=Path(sys.executable).resolve().name)
    )
    own.with_suffix(".program").chmod(0o755)
    shutil.copy(ROOT / "deploy" / UNIT, own.with_suffix(".unit"))
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    log = host.folder / "boot.log"
    # fmt: off
    with log.open("wb") as output:
        holder = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{host.name}", "unshare", "-m", "-p", "-f", "-i", "-u",
             "--kill-child", "--propagation", "private",
             "sh", "-c", BOOT, "sh", str(own), host.name, UNITS, str(ROOT), packages,
             sys.base_prefix],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )
    # fmt: on
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")

        def is_booted() -> bool:
            assert holder.poll() is None, log.read_text()
            pids = children.read_text().split()
            if not pids or Path(f"/proc/{pids[0]}/comm").read_text() != "systemd\n":
                return False
            return (
                "active"
                in Booted(host, int(pids[0]))
                .systemctl("is-active", "basic.target", check=False)
                .split()
            )

        wait_until(is_booted, "systemd has booted")
        yield Booted(host, int(children.read_text()))
    finally:
        holder.kill()
        holder.wait()
        _remove_cgroup(host)


def _remove_cgroup(host: Host) -> None:
    """Remove its cgroups, as soon as they are empty: all processes end after process 1."""
    mounted = host.folder / "cgroup"
    mounted.mkdir()
    run("unshare", "-m", "sh", "-c", REMOVE, "sh", str(mounted), host.name)
