"""`docker-opts` against what flannel's mk-docker-opts.sh prints for the same subnet.env."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from pyflannel.cli import main
from pyflannel.commands.docker_opts import gateway_of

SUBNET_ENV = (
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.35.1/24\n"
    "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
)
EACH = (
    'DOCKER_OPT_BIP="--bip=10.244.35.1/24"\n'
    'DOCKER_OPT_IPMASQ="--ip-masq=false"\n'
    'DOCKER_OPT_MTU="--mtu=1450"\n'
)
JOINED = " --bip=10.244.35.1/24 --ip-masq=false --mtu=1450"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "subnet.env"
    path.write_text(SUBNET_ENV)
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], f'{EACH}DOCKER_OPTS="{JOINED}"\n'),
        (["-ic"], f'{EACH}DOCKER_OPTS="{JOINED}"\n'),
        (["-i"], EACH),
        (["-c"], f'DOCKER_OPTS="{JOINED}"\n'),
        (["-c", "-k", "NETWORK"], f'NETWORK="{JOINED}"\n'),
        (["-cm"], 'DOCKER_OPTS=" --bip=10.244.35.1/24 --mtu=1450"\n'),
        (["-im"], EACH.replace('DOCKER_OPT_IPMASQ="--ip-masq=false"\n', "")),
    ],
)
def test_output(source: Path, tmp_path: Path, flags: list[str], expected: str) -> None:
    target = tmp_path / "new" / "docker.env"
    assert main(["docker-opts", "-f", str(source), "-d", str(target), *flags]) == 0
    assert target.read_text() == expected


def test_docker_masquerades_where_the_daemon_does_not(source: Path, tmp_path: Path) -> None:
    source.write_text(SUBNET_ENV.replace("IPMASQ=true", "IPMASQ=false"))
    target = tmp_path / "docker.env"
    assert main(["docker-opts", "-f", str(source), "-d", str(target)]) == 0
    assert "--ip-masq=true" in target.read_text()


def test_options_that_are_set_already_come_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_OPTS", "--debug")
    target = tmp_path / "docker.env"
    assert main(["docker-opts", "-f", str(source), "-d", str(target), "-c"]) == 0
    assert target.read_text() == f'DOCKER_OPTS="--debug {JOINED}"\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "is not there; start the daemon first, or name the file"),
        ("", "has no FLANNEL_SUBNET"),
        ("PATH=/bin\n", "has no FLANNEL_SUBNET"),
        ("FLANNEL_SUBNET=\n", "FLANNEL_SUBNET is ''"),
        (b"\x7fELF\xd0", "is no text"),
        ({}, "cannot be read (Is a directory)"),
        ("FLANNEL_SUBNET=10.244.35.1/99\n", "'10.244.35.1/99'"),
        (SUBNET_ENV.replace("1450", "$(id)"), "FLANNEL_MTU is '$(id)'"),
        (SUBNET_ENV.replace("true", "maybe"), "FLANNEL_IPMASQ is 'maybe'"),
    ],
)
def test_wrong_file_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | bytes | dict[str, str] | None,
    named: str,
) -> None:
    source, target = tmp_path / "subnet.env", tmp_path / "docker.env"
    if isinstance(text, dict):
        source.mkdir()
    elif text is not None:
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["docker-opts", "-f", str(source), "-d", str(target)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pyflannel-udp docker-opts: {source}")
    assert named in line
    assert not target.exists()


@pytest.mark.parametrize("argv", [["docker-opts", "-x"], ["docker-opts", "word"], ["nope"]])
def test_bad_usage_is_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_subnet_routed_to_a_gateway() -> None:
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    routed = "eth0\t0023F40A\t0C4DA8C0\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    connected = "docker0\t0023F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    subnet = IPv4Network("10.244.35.0/24")
    assert gateway_of(subnet, head + routed) == "eth0"
    assert gateway_of(subnet, head + connected) is None
    assert gateway_of(IPv4Network("10.244.36.0/24"), head + routed) is None
