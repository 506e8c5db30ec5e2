"""The command `pyflannel-udp`: argv to a sub-command or to options and the daemon, errors to one
line and an exit code.

Exit codes: 0 stopped by a signal, help or version; 1 a start that was refused; 2 usage.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version

from pyflannel.command_line import completion, manual
from pyflannel.command_line.options import (
    HelpRequested,
    UsageError,
    VersionRequested,
    parse_options,
)
from pyflannel.commands import docker_opts, show
from pyflannel.dataplane.refusal import Refusal, too_few_descriptors
from pyflannel.management.log import set_up_log

log = logging.getLogger(__name__)

DESCRIPTORS = 1024
THREADS = 16
"""What a node of one address family has on two cores, beside the first."""
ADDRESS_SPACE_BYTES = 512 << 20
"""Twice of what that takes without peers."""
_M_ARENA_MAX = -8  # malloc.h


def _doctor(argv: Sequence[str]) -> int:
    # It needs the compiled fast path, which the others do not.
    from pyflannel.commands.doctor import main

    return main(argv)


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "status": show.status_main,
    "peers": show.peers_main,
    "leases": show.leases_main,
    "trace": show.trace_main,
    "doctor": _doctor,
    "reload": show.reload_main,
    "docker-opts": docker_opts.main,
    "man": manual.main,
    "completion": completion.main,
}
"""Sub-commands: what runs each on the words behind its name, and returns the exit code."""


def _run_command(name: str, argv: Sequence[str]) -> int:
    if name not in COMMANDS:
        known = ", ".join(sorted(COMMANDS))
        print(f"pyflannel-udp: no command {name!r}; there are: {known}", file=sys.stderr)
        return 2
    try:
        code = COMMANDS[name](argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as head, has seen enough; Python's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HelpRequested as text:
        print(text)
        return 0
    except UsageError as error:
        print(f"pyflannel-udp {name}: {error}", file=sys.stderr)
        return 2
    except Refusal as error:
        print(f"pyflannel-udp {name}: {error}", file=sys.stderr)
        return 1


def _raise_descriptor_limit() -> None:
    """Take what we may have without asking, as Go does for flanneld, up to what is ever needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_address_space() -> None:
    """Refuse a limit on it (`ulimit -v`) under which threads or packet buffers would be missing."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_BYTES:
        raise Refusal(
            f"{limit >> 20} MB of address space are too few, {ADDRESS_SPACE_BYTES >> 20} are "
            "needed: raise the limit (ulimit -v, systemd: LimitAS=)"
        )
    # glibc would reserve another 64 MB of it for each thread; other C libraries do not.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _check_threads() -> None:
    """Refuse a host that allows too few threads: gRPC ends the process without a word then."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(THREADS):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise Refusal(
            f"this process may have {len(started)} more threads, and needs {THREADS}: raise the "
            "limit (systemd: TasksMax=, docker run --pids-limit=, ulimit -u)"
        ) from None
    finally:
        enough.set()
        for thread in started:
            thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        return _run_command(words[0], words[1:])
    try:
        options = parse_options(words, os.environ)
    except HelpRequested as text:
        print(text)
        return 0
    except VersionRequested:
        print(version("pyflannel-udp"), file=sys.stderr)
        return 0
    except UsageError as error:
        print(f"pyflannel-udp: {error}; see pyflannel-udp --help", file=sys.stderr)
        return 2
    except Refusal as error:
        print(f"pyflannel-udp: {error}", file=sys.stderr)
        return 1
    set_up_log(options.v, options.log_format)
    for note in options.notes:
        log.warning("%s", note)
    try:
        if options.kube_subnet_mgr:
            raise Refusal(
                "--kube-subnet-mgr: this version takes its network from etcd only; drop the flag "
                "and set --etcd-endpoints, or run flanneld on this node"
            )
        _raise_descriptor_limit()
        _check_address_space()
        _check_threads()
        # The compiled fast path is needed from here on, not for help and usage errors.
        import uvloop

        from pyflannel.daemon import run

        return uvloop.run(run(options, partial(parse_options, words, os.environ)))
    except Refusal as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        log.error("%s", too_few_descriptors())
        return 1
