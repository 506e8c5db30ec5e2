"""Runs a command under a filter of system calls that refuses one of them, as sandboxes have it.

`python -m tests.lab.without_call NAME COMMAND…`; the call fails with EPERM.
"""

from __future__ import annotations

import errno
import os
import platform
import sys

from tests.lab.without_nfnetlink import ALLOW, EQUALS, ERRNO, LOAD, NUMBER, RETURN, install

CALLS = {
    "x86_64": {"recvmmsg": 299, "sendmmsg": 307, "clone3": 435},
    "aarch64": {"recvmmsg": 243, "sendmmsg": 269, "clone3": 435},
}

if __name__ == "__main__":
    number = CALLS[platform.machine()][sys.argv[1]]
    program = [(LOAD, 0, 0, NUMBER), (EQUALS, 0, 1, number)]
    install([*program, (RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)])
    os.execvp(sys.argv[2], sys.argv[2:])
