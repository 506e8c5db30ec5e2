"""Runs a command as on a kernel without nfnetlink, so without nftables.

`without_nfnetlink.py COMMAND…`: in the command, and all that it starts, socket(2) refuses
NETLINK_NETFILTER.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence

SOCKET = {"x86_64": 41, "aarch64": 198}  # number of the system call
AF_NETLINK, NETLINK_NETFILTER = 16, 12
# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, EQUALS, RETURN = 0x20, 0x15, 0x06
# struct seccomp_data: number, then the low halves of the first and the third argument
NUMBER, FAMILY, PROTOCOL = 0, 16, 32


Instruction = tuple[int, int, int, int]
"""code, jt, jf, k of struct sock_filter"""


def install(program: Sequence[Instruction]) -> None:
    """Filter the system calls of this process and all that it starts."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *x) for x in program))
    filters = struct.pack("HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _refuse() -> None:
    program = [(LOAD, 0, 0, NUMBER), (EQUALS, 0, 5, SOCKET[platform.machine()])]
    program += [(LOAD, 0, 0, FAMILY), (EQUALS, 0, 3, AF_NETLINK)]
    program += [(LOAD, 0, 0, PROTOCOL), (EQUALS, 0, 1, NETLINK_NETFILTER)]
    program += [(RETURN, 0, 0, ERRNO | errno.EPROTONOSUPPORT), (RETURN, 0, 0, ALLOW)]
    install(program)


if __name__ == "__main__":
    _refuse()
    os.execvp(sys.argv[1], sys.argv[1:])
