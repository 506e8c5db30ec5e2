"""Stands in for systemctl where no systemd runs: starts the machine's real unit files.

It reads units and their drop-ins, starts what they want, passes a socket, waits for READY=1,
follows MAINPID=, reloads by ExecReload=, sends signals. What it leaves out of systemd: confinement
(users, capabilities, mounts), the watchdog, restarts after a failure, descriptors kept for a
service. A service ends with the process namespace at the latest. tests/lab/booted.py boots a real
systemd.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDERS = (Path("/etc/systemd/system"), Path("/lib/systemd/system"))
STARTED = Path("/run/systemctl-started")
READY_SECONDS = 60.0
STOP_SECONDS = 20.0
FIRST_PASSED_FD = 3
PR_SET_CHILD_SUBREAPER = 36


def read_unit(name: str) -> dict[str, list[str]]:
    """Return every directive's values in order; an empty value forgets those before it."""
    found: dict[str, list[str]] = {}
    for path in _files(name):
        for line in path.read_text().splitlines():
            key, equals, value = line.partition("=")
            if not equals or line.startswith(("#", ";")):
                continue
            if value:
                found.setdefault(key, []).append(_specifiers(value, name))
            else:
                found.pop(key, None)
    return found


def _files(name: str) -> Iterator[Path]:
    main = next((folder / name for folder in FOLDERS if (folder / name).exists()), None)
    if main is None:
        raise SystemExit(f"Unit {name} not found.")
    yield main
    for folder in FOLDERS:
        yield from sorted((folder / f"{name}.d").glob("*.conf"))


def _specifiers(value: str, name: str) -> str:
    return value.replace("%p", name.rsplit(".", 1)[0]).replace("%H", socket.gethostname())


def _environment(unit: dict[str, list[str]]) -> dict[str, str]:
    """Read Environment= and EnvironmentFile=, which is read anew for each command."""
    pairs = [word for value in unit.get("Environment", []) for word in shlex.split(value)]
    for value in unit.get("EnvironmentFile", []):
        path = Path(value.removeprefix("-"))
        if path.exists() or not value.startswith("-"):
            lines = path.read_text().splitlines()
            pairs += [" ".join(shlex.split(x)) for x in lines if x and x[0] not in "#;"]
    return {**os.environ, **dict(pair.split("=", 1) for pair in pairs)}


def _command(line: str, environment: dict[str, str]) -> list[str]:
    """Expand `$NAME` to words and `${NAME}` in place, as systemd.service(5) says."""
    words: list[str] = []
    for word in shlex.split(line):
        if re.fullmatch(r"\$\w+", word):
            words += environment.get(word[1:], "").split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: environment.get(m[1], ""), word))
    return [shutil.which(words[0]) or words[0], *words[1:]]


def _pid_file(name: str) -> Path:
    """Return the file that is there while the service runs and holds its process id."""
    return STARTED / f"{name}.pid"


def _wait(condition: Callable[[], bool], seconds: float, name: str, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} did not {what} in {seconds:.0f} s.")
        time.sleep(0.02)


def start(name: str) -> None:
    """Start a service and what it wants, unless it runs; an exception when it never gets ready."""
    if _pid_file(name).exists():
        return
    unit = read_unit(name)
    for wanted in " ".join((*unit.get("Wants", []), *unit.get("Requires", []))).split():
        if wanted.endswith(".service") and any((folder / wanted).exists() for folder in FOLDERS):
            start(wanted)
    for key, parent in (("RuntimeDirectory", "/run"), ("StateDirectory", "/var/lib")):
        for value in unit.get(key, []):
            Path(parent, value).mkdir(parents=True, exist_ok=True)
    for line in unit.get("ExecStartPre", []):
        may_fail = line.startswith("-")
        command = _command(line.removeprefix("-"), _environment(unit))
        if may_fail and shutil.which(command[0]) is None:
            continue
        subprocess.run(command, check=not may_fail)
    STARTED.mkdir(exist_ok=True)
    (STARTED / f"{name}.ready").unlink(missing_ok=True)
    supervisor = os.fork()
    if supervisor == 0:
        _supervise(name, unit)

    def settled() -> bool:
        return (STARTED / f"{name}.ready").exists() or os.waitpid(supervisor, os.WNOHANG)[0] != 0

    _wait(settled, READY_SECONDS, name, "get ready")
    if not _pid_file(name).exists():
        raise SystemExit(f"Job for {name} failed; see journalctl -u {name}.")


def _supervise(name: str, unit: dict[str, list[str]]) -> None:
    """Be the parent of a service until it is gone; listen to what it says."""
    os.setsid()
    log = os.open(STARTED / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # A successor that the service starts becomes ours when the service ends.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    notified = STARTED / f"{name}.notify"
    notified.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notified))
        notify.settimeout(0.05)
        environment = {**_environment(unit), "NOTIFY_SOCKET": str(notified)}
        main = os.fork()
        if main == 0:
            _become(name, _command(unit["ExecStart"][-1], environment), environment)
        _pid_file(name).write_text(str(main))
        ended: set[int] = set()
        while main not in ended:
            # Then all that was said: a successor is named before its predecessor ends.
            ended |= set(_reaped())
            for line in _said(notify):
                if line == "READY=1":
                    (STARTED / f"{name}.ready").touch()
                elif line.startswith("MAINPID="):
                    main = int(line.partition("=")[2])
                    _pid_file(name).write_text(str(main))
    _pid_file(name).unlink()
    os._exit(0)


def _said(notify: socket.socket) -> Iterator[str]:
    """Yield what has come on the notify socket, until it is silent for a moment."""
    while True:
        try:
            yield from notify.recv(4096).decode().splitlines()
        except TimeoutError:
            return


def _reaped() -> Iterator[int]:
    """Yield the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            yield pid


def _become(name: str, command: list[str], environment: dict[str, str]) -> None:
    """Become the service, with the socket of its socket unit if it has one."""
    unit = name.replace(".service", ".socket")
    if any((folder / unit).exists() for folder in FOLDERS):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(read_unit(unit)["ListenStream"][0])
        listener.listen()
        os.dup2(listener.fileno(), FIRST_PASSED_FD)
        environment |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    os.execve(command[0], command, environment)


def stop(name: str) -> None:
    """Stop a service by SIGTERM, if it runs."""
    if _pid_file(name).exists():
        os.kill(int(_pid_file(name).read_text()), signal.SIGTERM)
        _wait(lambda: not _pid_file(name).exists(), STOP_SECONDS, name, "stop")


def reload(name: str) -> None:
    """Run the service's ExecReload=."""
    unit = read_unit(name)
    environment = _environment(unit)
    environment["MAINPID"] = _pid_file(name).read_text()
    subprocess.run(_command(unit["ExecReload"][-1], environment), check=True, env=environment)


def main(words: list[str]) -> None:
    """Run one command of systemctl."""
    verb, *names = [word for word in words if not word.startswith("-")]
    units = [name if name.endswith(".service") else f"{name}.service" for name in names]
    for unit in units:
        if verb == "reload":
            reload(unit)
        elif verb == "kill":
            (number,) = (x.partition("=")[2] for x in words if x.startswith("--signal="))
            os.kill(int(_pid_file(unit).read_text()), signal.Signals[number])
        elif verb not in ("start", "stop", "restart", "enable", "disable", "is-active"):
            raise SystemExit(f"this stand-in for systemctl does not know {verb}")
        if verb in ("stop", "restart") or (verb == "disable" and "--now" in words):
            stop(unit)
        if verb in ("start", "restart") or (verb == "enable" and "--now" in words):
            start(unit)
        if verb == "is-active" and not _pid_file(unit).exists():
            raise SystemExit("inactive")
    if not units and verb != "daemon-reload":
        raise SystemExit(f"this stand-in for systemctl does not know {verb}")


if __name__ == "__main__":
    main(sys.argv[1:])
