"""Builds the fast path: one abi3 module for every CPython from 3.10 on."""

import sysconfig
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
REMEDY = (
    "the fast path is compiled at installation, which needs a C compiler and the headers of libc "
    "and Python: `apt-get install gcc libc6-dev python3-dev`"
)


class BuildExt(build_ext):
    """Tells what to install where the compiler fails; its own words say what it missed."""

    def build_extension(self, ext: Any) -> None:
        """Compile one module."""
        try:
            super().build_extension(ext)
        except CCompilerError as error:
            raise type(error)(f"{error}\n{REMEDY}") from error


setup(
    cmdclass={"build_ext": BuildExt},
    cffi_modules=["src/pyflannel/dataplane/_fastpath_build.py:ffibuilder"],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
