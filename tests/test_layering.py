"""The rules about who may import whom, checked on the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLANES = ("control", "dataplane")
PURE = (
    "etcd_fault",
    "etcd_session",
    "history",
    "family_routes",
    "lease",
    "lease_table",
    "network_config",
    "own_lease",
    "subnet_pool",
    "subnet_file",
    "vtep_identity",
)
FOR_CONTROL = {"route", "refusal"}
# Folders of src/pyflannel; each may import those before it, and what is for all of them.
COMPOSITION = ("command_line", "management", "node", "commands")
FOR_ALL = {"etcd_access"}


def _imports(path: Path) -> set[str]:
    """Return the dotted names a file imports; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


SOURCE = ROOT / "src/pyflannel"
FOLDERS = [*(ROOT / plane for plane in PLANES), *(SOURCE / name for name in COMPOSITION), SOURCE]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))


def test_the_files_are_found() -> None:
    assert {path.parent for path in FILES} == set(FOLDERS)
    assert {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *PLANES,
        *COMPOSITION,
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_layers(path: Path) -> None:
    imports = _imports(path)
    ours = {name.removeprefix("pyflannel.") for name in imports if name.startswith("pyflannel.")}
    if path.parent.name == "dataplane":
        assert all(name.split(".")[0] == "dataplane" for name in ours), path
    if path.parent.name == "control":
        for name in ours:
            plane, _, module = name.partition(".")
            assert plane in PLANES, path
            if plane == "dataplane" and module:
                assert module.split(".")[0] in FOR_CONTROL, f"{path} imports {name}"
        if path.stem in PURE:
            used = {part for name in imports for part in name.split(".")}
            assert not used & {"asyncio", "grpc", "quiet_grpc", "socket"}, path
    if path.parent.name in COMPOSITION:
        below = COMPOSITION[: COMPOSITION.index(path.parent.name) + 1]
        used = {name.split(".")[0] for name in ours} - {""}
        assert used <= {*PLANES, *below, *FOR_ALL}, path
    if path.name not in ("fastpath.py", "_fastpath_build.py"):
        assert not any("_fastpath" in name for name in imports), path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_init_is_only_a_map(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)
