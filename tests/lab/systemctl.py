"""Stands in for systemctl where no systemd runs: starts the machine's real unit files.

It reads units and their drop-ins, starts what they want, passes a socket, waits for READY=1. It
does not confine, restart or stop anything: a test ends with its process namespace.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = (Path("/etc/systemd/system"), Path("/lib/systemd/system"))
STARTED = Path("/run/systemctl-started")
READY_SECONDS = 60.0
FIRST_PASSED_FD = 3


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


def start(name: str) -> None:
    """Start a service and what it wants, unless it runs; an exception when it never gets ready."""
    if (STARTED / name).exists():
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
    notified = STARTED / f"{name}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notified))
        notify.settimeout(READY_SECONDS)
        environment = {**_environment(unit), "NOTIFY_SOCKET": str(notified)}
        _spawn(name, _command(unit["ExecStart"][-1], environment), environment)
        while b"READY=1" not in notify.recv(4096):
            continue
    (STARTED / name).touch()


def _spawn(name: str, command: list[str], environment: dict[str, str]) -> None:
    """Run a program in a process of its own, with the socket of its socket unit if it has one."""
    if os.fork():
        return
    os.setsid()
    log = os.open(STARTED / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    unit = name.replace(".service", ".socket")
    if any((folder / unit).exists() for folder in FOLDERS):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(read_unit(unit)["ListenStream"][0])
        listener.listen()
        os.dup2(listener.fileno(), FIRST_PASSED_FD)
        environment |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    os.execve(command[0], command, environment)


def main(words: list[str]) -> None:
    """Run one command of systemctl."""
    verb, *names = [word for word in words if not word.startswith("-")]
    if verb in ("start", "restart") or (verb == "enable" and "--now" in words):
        for name in names:
            start(name if name.endswith(".service") else f"{name}.service")
    elif verb != "daemon-reload":
        raise SystemExit(f"this stand-in for systemctl does not know {verb}")


if __name__ == "__main__":
    main(sys.argv[1:])
