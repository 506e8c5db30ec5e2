"""README.md and docs/, command by command; docs/docker.md has a test of its own in daemon/.

host1 192.0.2.11 ---+
host2 192.0.2.12 ---+-- switch, etcd on 192.0.2.10
host3 192.0.2.13 ---+

Each page finds three hosts that have what docs/docker.md installs, in another Python environment,
and of which none is started. Real are etcd, the daemons, the kernel's vxlan device and the unit
files; tests/lab/ holds what stands in for systemctl, journalctl and flanneld.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest

import pyflannel
from pyflannel.command_line.flags import FLAGS
from pyflannel.command_line.usage import SUBCOMMANDS
from pyflannel.node.host_watch import HOST, HOST_V6
from tests.docs.page import Block, blocks
from tests.lab.etcd import EtcdCluster
from tests.lab.machine import ROOT, Machine, start_machines
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.slow

DOCKER = ROOT / "docs" / "docker.md"
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {DOCKER})
ETCD = "192.0.2.10"
HOSTS = {f"host{number}": f"192.0.2.{10 + number}" for number in (1, 2, 3)}
CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
FLANNELD = ROOT / "tests" / "lab" / "flanneld.py"

ELSEWHERE = {
    "sudo make demo": "tests/bench/test_demo.py runs what it runs",
    "sudo make test": "runs this test",
}
"""Commands of blocks without a host, each with who runs it."""

INSTALL = """
mkdir -p /opt/pyflannel/bin /run/flannel
ln -s {tools}/pyflannel-udp /opt/pyflannel/bin/
cp {root}/deploy/pyflannel-udp.service /etc/systemd/system/
cat >/etc/default/pyflannel-udp <<'END'
FLANNELD_ETCD_ENDPOINTS=http://{etcd}:2379
FLANNELD_IFACE=eth0
FLANNELD_IP_MASQ=true
FLANNELD_HEALTHZ_PORT=8081
END
cat >/run/flannel/subnet.env <<'END'
FLANNEL_NETWORK=10.5.0.0/16
FLANNEL_SUBNET=10.5.{number}.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
END
cat >/etc/systemd/system/flanneld.service <<'END'
[Service]
Type=notify
RuntimeDirectory=flannel
Environment=ETCDCTL_API=3 ETCDCTL_ENDPOINTS=http://{etcd}:2379
ExecStart={python} {flanneld} {address}
END
"""
"""What docs/docker.md does, without building it; the stand-in for flanneld; a subnet to prefer."""

STAY = """
{{ {0}}} >/run/stays.log 2>&1 &
until grep 'Running backend' /run/stays.log; do sleep 0.05; done
"""
"""Starts what stays, and waits until it is ready."""

Pages = dict[str, list[Block]]


@pytest.fixture(scope="module")
def pages() -> Pages:
    return {path.name: list(blocks(path)) for path in (*PAGES, DOCKER)}


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    require_root()
    for program in ("bridge", "curl", "etcd", "etcdctl", "ethtool", "ip", "nsenter", "ping"):
        require_program(program)
    with ExitStack() as stack:
        made, found = start_machines(stack, {name: f"{x}/24" for name, x in HOSTS.items()})
        made.switch.ip("addr", "add", f"{ETCD}/24", "dev", "br0")
        inside = ("ip", "netns", "exec", made.switch.name)
        etcd = EtcdCluster(made.folder, [(ETCD, 2379, 2380)], wrappers=[inside], ctl_wrapper=inside)
        stack.callback(etcd.close)
        etcd.start()
        etcd.run("put", "/coreos.com/network/config", CONFIG)
        for number, (name, machine) in enumerate(found.items(), 1):
            machine.install(
                "pyflannel-udp",
                f'#!/bin/sh\nPYTHONPATH={ROOT}/src exec {sys.executable} -m pyflannel "$@"\n',
            )
            machine.shell(
                INSTALL.format(
                    tools=machine.tools,
                    root=ROOT,
                    etcd=ETCD,
                    number=number,
                    python=sys.executable,
                    flanneld=FLANNELD,
                    address=HOSTS[name],
                )
            )
        yield found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(request: pytest.FixtureRequest, path: Path) -> None:
    steps = list(blocks(path))
    if not any(block.hosts for block in steps):
        return
    machines: dict[str, Machine] = request.getfixturevalue("machines")
    exports = dict.fromkeys(machines, "")
    printed = ""
    for block in steps:
        if block.kind == "text":
            place = f"{path.name}:{block.line}"
            assert block.is_quotation or block.is_printed_in(printed), f"{place}: {printed}"
            continue
        text = STAY.format(block.text) if block.ends == "stays" else block.text
        with ThreadPoolExecutor() as pool:
            at_once = [
                pool.submit(machines[host].shell, exports[host] + text, fails=block.ends == "fails")
                for host in block.hosts
            ]
        printed = "".join(x.result() for x in at_once) or printed
        for host in block.hosts:
            exports[host] += block.exports


def test_what_a_page_leaves_to_others_is_run_by_them(pages: Pages) -> None:
    run = {x for steps in pages.values() for block in steps if block.hosts for x in block.commands}
    for name, steps in pages.items():
        for block in steps:
            if block.kind == "sh" and not block.hosts:
                for command in block.commands:
                    bare = command.split(" #")[0].strip()
                    place = f"{name}:{block.line}"
                    assert bare in run | ELSEWHERE.keys(), f"{place}: nobody runs {bare}"


def test_commands_within_sentences_are_run_too(pages: Pages) -> None:
    programs = "pyflannel-udp|etcdctl|systemctl|journalctl|ip|iptables|nft|sysctl|curl|docker|man"
    run = " ".join(x for steps in pages.values() for block in steps for x in block.commands)
    for path in (*PAGES, DOCKER):
        for span in re.findall(rf"`((?:{programs}) [^`]+)`", path.read_text()):
            assert " ".join(span.split()) in run, f"{path.name}: nobody runs {span}"


def test_what_is_to_be_made_can_be_made() -> None:
    """What takes minutes is not run here; tests/bench/ and the tests of its parts do."""
    for name in ("README.md", "CONTRIBUTING.md", "bench/README.md"):
        commands = re.findall(r"(?:`|sudo )(make [^`#&\n]+)", (ROOT / name).read_text())
        assert commands
        for command in commands:
            subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_flags_variables_and_commands_that_pages_name_exist() -> None:
    flags = {f"--{flag.name}" for flag in FLAGS} | {"--json", "--vni", "--help"}
    variables = {flag.variable for flag in FLAGS}
    names = {command.name for command in SUBCOMMANDS}
    for path in (*PAGES, DOCKER):
        text = path.read_text()
        assert set(re.findall(r"`(--[a-z][a-z-]+)", text)) <= flags, path.name
        assert set(re.findall(r"\bFLANNELD_[A-Z_]+[A-Z]", text)) <= variables, path.name
        assert set(re.findall(r"`pyflannel-udp ([a-z][a-z-]+)", text)) <= names, path.name


def test_every_reason_not_to_be_ready_is_explained() -> None:
    """A reason is a constant of the module that says it; HostWatch's are one for each family."""
    given = {"starting", HOST, HOST_V6}
    folder = Path(pyflannel.__file__).parent
    for path in (*folder.glob("*.py"), *folder.glob("*/*.py")):
        for name in re.findall(r"eadiness\.set\(\s*([A-Z_]+),", path.read_text()):
            module = ".".join(path.relative_to(folder).with_suffix("").parts)
            given.add(getattr(import_module(f"pyflannel.{module}"), name))
    assert len(given) > 3
    told = (ROOT / "docs" / "troubleshoot.md").read_text()
    table = told.split("| reason | meaning |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) == given


def test_links_lead_somewhere() -> None:
    for path in (*PAGES, DOCKER):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
