"""The files in deploy/ say what systemd and the daemon understand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from pyflannel.command_line.flags import FLAGS
from tests.lab.require import require_program

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
UNIT = DEPLOY / "pyflannel-udp.service"


def test_unit_is_as_hardened_as_it_says() -> None:
    require_program("systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
    )
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    said = re.search(r"systemd-analyze security`: ([0-9]\.[0-9])\.", UNIT.read_text())
    assert said
    assert float(found[1]) <= float(said[1])


def test_unit_has_no_directive_that_systemd_does_not_know(tmp_path: Path) -> None:
    require_program("systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^(Exec\w+)=\S+", r"\1=/bin/true", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert UNIT.name not in done.stderr, done.stderr


def test_environment_file_names_variables_that_exist() -> None:
    text = (DEPLOY / "pyflannel-udp.default").read_text()
    named = set(re.findall(r"^#?(FLANNELD_\w+)=", text, re.M))
    assert named
    assert named <= {flag.variable for flag in FLAGS}
    for option in re.findall(r"^#?PYFLANNEL_UDP_OPTIONS=.*", text, re.M):
        assert "$PYFLANNEL_UDP_OPTIONS" in UNIT.read_text(), option
