"""Tells cffi how to compile the fast path; used by setup.py's `cffi_modules` and by nothing else.

The hand-written `_fastpath.c` lies beside the module that cffi generates under the same name, so
this file has no `__main__`: `ffibuilder.compile()` would overwrite it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from cffi import FFI

FOLDER = "src/pyflannel/dataplane"
C_FILES = (
    "backlog",
    "check",
    "checksum",
    "decap",
    "encap",
    "fib",
    "flow",
    "gro",
    "gso",
    "lane",
    "room",
    "send",
    "shift",
    "verdict",
    "worker",
)

ffibuilder = FFI()
ffibuilder.cdef((Path(FOLDER) / "_fastpath_abi.h").read_text(encoding="ascii"))
ffibuilder.set_source(
    "pyflannel.dataplane._fastpath",
    '#include "_fastpath.h"\n',
    sources=[f"{FOLDER}/_fastpath.c", *(f"{FOLDER}/csrc/{name}.c" for name in C_FILES)],
    include_dirs=[FOLDER, f"{FOLDER}/csrc"],
    libraries=["m"],
    undef_macros=["NDEBUG"],
    extra_compile_args=["-std=gnu11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
