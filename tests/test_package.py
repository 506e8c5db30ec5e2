"""One source archive, one wheel of it, and that wheel under every CPython of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
VERSIONS = range(10, 15)
# 3.10 and newer with a GIL: the stable ABI of the wheel is theirs.
SUITS = (
    "import sys, sysconfig; "
    "sys.exit(sys.version_info < (3, 10) or bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
)
USE = """
import pyflannel.daemon
from pyflannel.dataplane.fastpath import DROP_REASONS
assert "no_route" in DROP_REASONS
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def interpreters() -> list[Path]:
    """Return this interpreter and the others on the PATH and beside it, one of each version."""
    found = {sys.version_info.minor: Path(sys.executable)}
    siblings = Path(sys.base_prefix).parent
    for minor in VERSIONS:
        on_path = shutil.which(f"python3.{minor}")
        candidates = [Path(on_path)] if on_path else []
        for candidate in [*candidates, *siblings.glob(f"*/bin/python3.{minor}")]:
            if subprocess.run([candidate, "-c", SUITS], capture_output=True).returncode == 0:
                found.setdefault(minor, candidate)
    return list(found.values())


def files(source: Path, *suffixes: str) -> list[Path]:
    """Return the files of src/pyflannel, those behind its symbolic links among them."""
    walk = os.walk(source / "src/pyflannel", followlinks=True)
    found = (Path(folder, name) for folder, _, names in walk for name in names)
    return [path for path in found if path.suffix in suffixes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the package is made of, so that building leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("package") / "source"
    made = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("control", "dataplane", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=made)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-c", build, cwd=source)
    (built,) = source.parent.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    wheels = archive.parent / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, archive, "-w", wheels)
    (built,) = wheels.iterdir()
    return built


def test_without_a_compiler_it_tells_what_to_install(source: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=source,
        env={**os.environ, "CC": "none-such-cc"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode
    assert "`apt-get install gcc libc6-dev python3-dev`" in done.stderr.splitlines()[-1]


def test_there_is_one_wheel_for_all(wheel: Path) -> None:
    machine = os.uname().machine
    assert re.fullmatch(rf"pyflannel_udp-[\d.]+-cp310-abi3-linux_{machine}\.whl", wheel.name)


def test_it_holds_all_packages_and_one_compiled_module(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(
        [
            *(str(path.relative_to(source / "src")) for path in files(source, ".py")),
            "pyflannel/dataplane/_fastpath.abi3.so",
        ]
    )


def test_the_archive_holds_all_sources(source: Path, archive: Path) -> None:
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert packed >= {str(path.relative_to(source)) for path in files(source, ".py", ".c", ".h")}


@pytest.mark.parametrize("python", interpreters(), ids=lambda python: python.name)
def test_it_is_installed_and_runs(wheel: Path, tmp_path: Path, python: Path) -> None:
    run(python, "-m", "venv", "--without-pip", tmp_path / "venv")
    there = tmp_path / "venv" / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        there / "python",
        "install",
        "-q",
        "--no-compile",
        wheel,
    )
    run(there / "python", "-c", USE, cwd=tmp_path)
    version = wheel.name.split("-")[1]
    assert run(there / "pyflannel-udp", "--version", cwd=tmp_path).strip() == version
    assert "--iface " in run(there / "pyflannel-udp", "--help", cwd=tmp_path)
    assert run(there / "python", "-m", "pyflannel", "--version", cwd=tmp_path).strip() == version
