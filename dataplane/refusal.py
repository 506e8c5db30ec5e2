"""The one exception that ends a start: the host, the operator or the configuration says no.

A leaf: it knows nothing of sockets, etcd or exit codes. The command line turns it into one line
on stderr and exit code 1.
"""

from __future__ import annotations

import resource


class Refusal(Exception):
    """A start cannot go on; `str()` is one sentence that names the thing and the remedy."""


def too_few_descriptors() -> Refusal:
    """Return what to say of EMFILE."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Refusal(
        f"{limit} open files are too few for the queues and sockets: raise the limit (ulimit -n, "
        "systemd: LimitNOFILE=, docker run --ulimit nofile=1024)"
    )
