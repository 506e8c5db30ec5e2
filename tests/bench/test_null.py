"""Every design of the null forwarder moves bytes whole: h1 eth1 ---- eth1 h2."""

from __future__ import annotations

import pytest

from bench.transfer import transfer_is_intact
from bench.variants import VARIANTS, build, compile_tools
from tests.lab.require import require_program, require_root

TRANSFER_MEGABYTES = 32


@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if variant.kind == "null"]
)
def test_transfer_is_intact(name: str) -> None:
    require_root()
    for program in ("ethtool", "gcc", "iperf3", "make"):
        require_program(program)
    compile_tools()
    stack = build(VARIANTS[name], "wire-nocsum")
    try:
        assert transfer_is_intact(stack, TRANSFER_MEGABYTES)
    finally:
        stack.close()
