"""The command line and the FLANNELD_* variables: spec section 2, and the exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest

from pyflannel import cli
from pyflannel.command_line.flags import FLAGS, Flag
from pyflannel.command_line.options import (
    HelpRequested,
    Options,
    UsageError,
    VersionRequested,
    parse_options,
    unserved_flags,
)
from pyflannel.command_line.usage import SUBCOMMANDS, WIDTH, help_text
from pyflannel.dataplane.refusal import Refusal

VALUED = [flag for flag in FLAGS if flag.name != "version" and not flag.is_boolean]
BOOLEAN = [flag for flag in FLAGS if flag.name != "version" and flag.is_boolean]
SAMPLES = {
    "etcd-endpoints": "https://192.0.2.1:2379",
    "healthz-ip": "192.0.2.1",
    "iface-can-reach": "192.0.2.1",
    "public-ip": "192.0.2.1",
    "public-ipv6": "2001:db8::1",
    "peer-source": "192.0.2.7/32=10.5.72.0/24",
    "anti-spoofing": "log",
    "reserved-bits": "ignore",
    "flannel-mtu": "1400",
    "log-format": "json",
    "offload": "off",
    "workers": "0",
    "sched": "normal",
    "options-file": "/dev/null",
    "subnet-lease-renew-margin": "7",
}
# Spec section 2.1: name and default, empty where flannel has none.
FLANNELS = {
    "etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "etcd-prefix": "/coreos.com/network",
    "etcd-keyfile": "",
    "etcd-certfile": "",
    "etcd-cafile": "",
    "etcd-username": "",
    "etcd-password": "",
    "iface": "",
    "iface-regex": "",
    "iface-can-reach": "",
    "subnet-file": "/run/flannel/subnet.env",
    "public-ip": "",
    "public-ipv6": "",
    "subnet-lease-renew-margin": "60",
    "ip-masq": "false",
    "ip-masq-fully-random-disable": "false",
    "kube-subnet-mgr": "false",
    "kube-api-url": "",
    "kubeconfig-file": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com",
    "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": "true",
    "healthz-ip": "0.0.0.0",
    "healthz-port": "0",
    "iptables-resync": "5",
    "iptables-forward-rules": "true",
    "ip-blackhole-route": "false",
    "version": "false",
    "v": "0",
    "vmodule": "",
    "log_backtrace_at": "",
}


def sample(flag: Flag) -> str:
    """Return a value the flag takes, another than its default where that is possible."""
    if flag.is_boolean:
        return "false" if flag.default == "true" else "true"
    if flag.name in SAMPLES:
        return SAMPLES[flag.name]
    return str(int(flag.default) + 1) if flag.default.isdigit() else "/x"


def parse(*argv: str, **environ: str) -> Options:
    return parse_options(argv, environ)


def identity(flag: Flag) -> str:
    return flag.name


def test_flannels_flags_have_flannels_defaults() -> None:
    ours = {flag.name: flag.default for flag in FLAGS}
    assert {name: ours.get(name) for name in FLANNELS} == FLANNELS
    options = parse()
    assert options.given == frozenset()
    assert options.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert (options.iface, options.public_ip, options.etcd_cafile) == ((), None, None)


@pytest.mark.parametrize("flag", VALUED, ids=identity)
def test_a_value_comes_in_every_form(flag: Flag) -> None:
    value = sample(flag)
    expected = parse(f"--{flag.name}={value}")
    assert expected.given == {flag.field}
    for argv in ((f"-{flag.name}", value), (f"--{flag.name}", value), (f"-{flag.name}={value}",)):
        assert parse(*argv) == expected
    assert parse(**{flag.variable: value}) == expected
    if value != flag.default:
        assert getattr(expected, flag.field) != getattr(parse(), flag.field)


@pytest.mark.parametrize("flag", VALUED, ids=identity)
def test_a_missing_value_is_a_usage_error(flag: Flag) -> None:
    with pytest.raises(UsageError, match=f"--{flag.name} needs a value"):
        parse(f"--{flag.name}")


@pytest.mark.parametrize("flag", BOOLEAN, ids=identity)
def test_a_boolean_needs_no_value_and_takes_gos_words(flag: Flag) -> None:
    for words, wanted in (
        (("1", "t", "T", "TRUE", "true", "True"), True),
        (("0", "f", "F", "FALSE", "false", "False"), False),
    ):
        for word in words:
            assert getattr(parse(f"-{flag.name}={word}"), flag.field) is wanted
            assert getattr(parse(**{flag.variable: word}), flag.field) is wanted
    assert getattr(parse(f"--{flag.name}"), flag.field) is True
    for word in ("yes", "on", "TrUe", ""):
        with pytest.raises(UsageError, match="must be true or false"):
            parse(f"--{flag.name}={word}")
    with pytest.raises(UsageError, match="'false' is not a flag"):
        parse(f"--{flag.name}", "false")


def test_a_value_may_look_like_a_flag_and_contain_an_equals_sign() -> None:
    assert parse("--etcd-password", "--iface").etcd_password == "--iface"
    assert parse("--etcd-password=a=b").etcd_password == "a=b"


def test_repeatable_flags_append_and_do_not_split_at_commas() -> None:
    options = parse("--iface", "eth0", "-iface=eth1,eth2", "--iface-regex=^a", "-iface-regex", "b")
    assert options.iface == ("eth0", "eth1,eth2")
    assert options.iface_regex == ("^a", "b")
    assert parse(FLANNELD_IFACE="eth0,eth1").iface == ("eth0,eth1",)
    pairs = parse(
        "--peer-source=192.0.2.7/32=10.5.1.0/24", "--peer-source=192.0.2.8/32=10.5.2.0/24"
    )
    assert pairs.peer_source[1] == (IPv4Network("192.0.2.8/32"), IPv4Network("10.5.2.0/24"))


def test_of_another_flag_the_last_one_counts() -> None:
    assert parse("--iptables-resync=7", "--iptables-resync=9").iptables_resync == 9


def test_the_command_line_beats_the_environment() -> None:
    environ = {"FLANNELD_IFACE": "eth9", "FLANNELD_ETCD_PREFIX": "/env", "FLANNELD_V": "3"}
    options = parse("--iface=eth0", **environ)
    assert (options.iface, options.etcd_prefix, options.v) == (("eth0",), "/env", 3)


def test_an_empty_variable_is_none_and_a_wrong_one_is_told_and_ignored() -> None:
    assert parse(FLANNELD_ETCD_PREFIX="") == parse()
    options = parse(FLANNELD_IP_MASQ="maybe", FLANNELD_PUBLIC_IP="192.0.2.300", FLANNELD_V="2")
    assert options == replace(parse(FLANNELD_V="2"), notes=options.notes)
    assert options.notes == (
        "FLANNELD_PUBLIC_IP='192.0.2.300' is ignored: must be an IPv4 address",
        "FLANNELD_IP_MASQ='maybe' is ignored: must be true or false",
    )


def test_values_have_types() -> None:
    options = parse(
        "--public-ip=192.0.2.1", "--public-ipv6=2001:db8::1", "--subnet-file=/x/y", "-healthz-ip=::"
    )
    assert options.public_ip == IPv4Address("192.0.2.1")
    assert options.public_ipv6 == IPv6Address("2001:db8::1")
    assert options.subnet_file == Path("/x/y")
    assert options.healthz_ip == IPv6Address("::")


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--etcd-endpoints=192.0.2.1:2379", "must be http://HOST:PORT"),
        ("--etcd-endpoints=ftp://192.0.2.1", "must be http://HOST:PORT"),
        ("--etcd-endpoints=,", "at least one"),
        ("--healthz-port=65536", "must be in 0..65535"),
        ("--healthz-port=eighty", "must be a whole number"),
        ("--anti-spoofing=maybe", "must be one of off, log, enforce"),
        ("--peer-source=192.0.2.7", "must be CIDR=SUBNET"),
        ("--peer-source=192.0.2.7/24=10.5.1.0/24", "must be CIDR=SUBNET"),
        ("--public-ip=eth0", "must be an IPv4 address"),
        ("--log-format=xml", "must be one of text, json"),
        ("--subnet-lease-renew-margin=soon", "must be a whole number"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_flag_value_and_rule(
    word: str, named: str
) -> None:
    flag, _, value = word.partition("=")
    with pytest.raises(UsageError) as caught:
        parse(word)
    assert str(caught.value).startswith(f"{flag} {value!r}: ")
    assert named in str(caught.value)


@pytest.mark.parametrize("margin", ["0", "-5", "1440"])
def test_the_margin_is_refused_as_flannel_refuses_it(margin: str) -> None:
    with pytest.raises(Refusal, match=r"must be in 1\.\.1439 minutes"):
        parse("--subnet-lease-renew-margin", margin)


@pytest.mark.parametrize("word", ["--nope", "-nope=1", "---iface=eth0", "--=x", "--IFACE=eth0"])
def test_unknown_flags(word: str) -> None:
    with pytest.raises(UsageError, match="unknown flag"):
        parse(word)


@pytest.mark.parametrize("name", ["networks", "listen", "remote", "networks-dir"])
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_removed_flags_are_told_apart_with_what_to_do(name: str, dashes: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} was removed: .*--etcd-"):
        parse(f"{dashes}{name}=a")


def test_words_that_are_no_flags() -> None:
    assert parse("--iface=eth0", "--") == parse("--iface=eth0")
    for argv in (("eth0",), ("-",), ("--", "eth0"), ("--ip-masq", "true")):
        with pytest.raises(UsageError, match="takes flags only"):
            parse(*argv)


@pytest.mark.parametrize("word", ["-h", "--h", "-help", "--help"])
def test_help_names_every_flag_with_its_default(word: str) -> None:
    with pytest.raises(HelpRequested) as caught:
        parse(word)
    text = str(caught.value)
    assert text == help_text()
    entries = [" ".join(x.split()) for x in re.split(r"\n(?=\n|  \S)", text)]
    for flag in FLAGS:
        (entry,) = [x for x in entries if x.split()[:1] == [f"--{flag.name}"]]
        assert flag.help in entry
        assert not flag.default or f"(default {flag.default})" in entry
        assert ("may be repeated" in entry) == flag.repeatable
    assert max(map(len, text.splitlines())) <= WIDTH


def test_help_names_every_command_and_each_has_a_help_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [command.name for command in SUBCOMMANDS] == list(cli.COMMANDS)
    for command in SUBCOMMANDS:
        assert f"\n  {command.synopsis} " in help_text()
        assert cli.main([command.name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"Usage: pyflannel-udp {command.synopsis}")
        for own in command.flags:
            assert f"\n  {own.left} " in printed


def test_version_is_asked_for() -> None:
    for argv in (("-version",), ("--version=true",), ("--iface=eth0", "--version")):
        with pytest.raises(VersionRequested):
            parse(*argv)
    assert parse("--version=false").given == {"version"}


def test_flags_that_do_nothing_yet_are_told() -> None:
    assert unserved_flags(parse("--iface=eth0")) == ()
    (sentence,) = unserved_flags(parse("--vmodule=a=1"))
    assert sentence.startswith("--vmodule is ignored")


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--help"], 0, "Usage: pyflannel-udp", ""),
        (["--version"], 0, "", "0."),
        (["--nope"], 2, "", "unknown flag --nope; see pyflannel-udp --help"),
        (["--networks=a"], 2, "", "--networks was removed"),
        (["--healthz-port=x"], 2, "", "must be a whole number"),
        (["nope"], 2, "", "no command 'nope'"),
        (["--subnet-lease-renew-margin=0"], 1, "", "must be in 1..1439"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, out: str, err: str
) -> None:
    assert cli.main(argv) == code
    printed = capsys.readouterr()
    assert (out in printed.out, bool(printed.out)) == (True, bool(out))
    assert (err in printed.err, bool(printed.err)) == (True, bool(err))
    assert len(printed.err.splitlines()) <= 1


def test_module_and_command_are_the_same_and_a_refusal_is_one_log_line() -> None:
    for command in (
        [sys.executable, "-m", "pyflannel"],
        [Path(sys.executable).parent / "pyflannel-udp"],
    ):
        done = subprocess.run(
            [*command, "--kube-subnet-mgr"],
            env={**os.environ, "FLANNELD_V": "loud", "FLANNELD_LOG_FORMAT": "text"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, "")
        note, refusal = done.stderr.splitlines()
        assert note.startswith("W") and "FLANNELD_V='loud' is ignored" in note
        assert refusal.startswith("E") and "--kube-subnet-mgr" in refusal


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_costs_no_traceback(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyflannel", "man"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
