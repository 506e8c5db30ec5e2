"""TLS and users against a real etcd: what works, and the one sentence about what does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import trustme

from pyflannel.command_line.options import parse_options
from pyflannel.control import etcd_connection
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.etcd_session import REFUSED_SECONDS, SessionState
from pyflannel.control.etcd_tls import EtcdTls
from pyflannel.dataplane.refusal import Refusal
from pyflannel.etcd_access import etcd_client
from pyflannel.node.parts import Node
from pyflannel.node.reload import reload_when_told
from tests.lab.etcd import EtcdCluster, etcd_on_loopback

SOON_SECONDS = REFUSED_SECONDS / 2
"""Whoever does not notice what has changed waits for twice as long."""


def save(folder: Path, name: str, cert: trustme.LeafCert) -> None:
    """Write a certificate with its chain, and its key."""
    (folder / f"{name}.crt").write_bytes(b"".join(x.bytes() for x in cert.cert_chain_pems))
    cert.private_key_pem.write_to_path(folder / f"{name}.key")


@dataclass(frozen=True)
class Pki:
    """Two CAs and what they signed: server, client; stranger is of the other CA."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def client(self, name: str = "client") -> EtcdTls:
        """Our files with a client certificate."""
        return EtcdTls(self / "ca.crt", self / f"{name}.crt", self / f"{name}.key")

    def server_flags(self, name: str = "server") -> list[str]:
        """etcd's flags for a server certificate."""
        return ["--cert-file", str(self / f"{name}.crt"), "--key-file", str(self / f"{name}.key")]

    @property
    def ctl(self) -> list[str]:
        """etcdctl's flags; it does not check the server's name."""
        files = ("--cert", str(self / "client.crt"), "--key", str(self / "client.key"))
        return ["--insecure-skip-tls-verify", *files]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(made / "ca.crt")
    theirs.cert_pem.write_to_path(made / "other-ca.crt")
    save(made.folder, "server", ours.issue_cert("127.0.0.1"))
    past, future = (datetime.now(timezone.utc) + timedelta(days=days) for days in (-1, 1))
    save(made.folder, "expired", ours.issue_cert("127.0.0.1", not_after=past))
    save(made.folder, "early", ours.issue_cert("127.0.0.1", not_before=future))
    save(made.folder, "misnamed", ours.issue_cert("etcd.example.org"))
    save(made.folder, "client", ours.issue_cert("client.example.org"))
    save(made.folder, "stranger", theirs.issue_cert("client.example.org"))
    (made / "garbage.crt").write_text("no certificate")
    return made


@pytest.fixture(scope="module")
def server(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd with a server certificate."""
    folder = tmp_path_factory.mktemp("server")
    with etcd_on_loopback(folder, tls=pki.server_flags(), ctl=pki.ctl) as made:
        yield made


@pytest.fixture(scope="module")
def mutual(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd that wants client certificates."""
    flags = [*pki.server_flags(), "--client-cert-auth", "--trusted-ca-file", str(pki / "ca.crt")]
    with etcd_on_loopback(tmp_path_factory.mktemp("mutual"), tls=flags, ctl=pki.ctl) as made:
        yield made


@pytest.fixture(scope="module")
def users(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd with the users root and bob, whose tokens end after two seconds."""
    keys = f"pub-key={pki / 'client.crt'},priv-key={pki / 'client.key'}"
    flags = ["--auth-token", f"jwt,{keys},sign-method=ES256,ttl=2s"]
    with etcd_on_loopback(tmp_path_factory.mktemp("users"), flags=flags) as made:
        for words in ("root:secret", "bob:bob"):
            made.run("user", "add", words)
        made.run("user", "grant-role", "root", "root")
        made.run("auth", "enable")
        made.ctl = ("--user", "root:secret")
        yield made


async def refusal(etcd: Etcd) -> str:
    """Return why etcd refuses; it does so with one sentence, and then we wait."""
    started = time.monotonic()
    with pytest.raises(EtcdUnavailable) as caught:
        await etcd.get("x")
    assert time.monotonic() - started < 10
    assert etcd.session.state is SessionState.REFUSED
    assert etcd.session.last_error == str(caught.value)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(etcd.get("x"), 0.3)
    await etcd.close()
    return str(caught.value)


async def test_a_ca_alone_is_tls(server: EtcdCluster, pki: Pki) -> None:
    etcd = Etcd(server.endpoints, EtcdTls(pki / "ca.crt"))
    await etcd.get("x")
    await etcd.close()


async def test_https_without_files_is_checked_with_the_systems_cas(
    server: EtcdCluster, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not signed by our CA" in await refusal(Etcd(server.endpoints))
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca.crt"))
    etcd = Etcd(server.endpoints)
    await etcd.get("x")
    await etcd.close()


async def test_client_certificates(mutual: EtcdCluster, pki: Pki) -> None:
    etcd = Etcd(mutual.endpoints, pki.client())
    await etcd.get("x")
    await etcd.close()
    for tls in (EtcdTls(pki / "ca.crt"), pki.client("stranger")):
        assert "wants a client certificate" in await refusal(Etcd(mutual.endpoints, tls))


async def test_a_wrong_certificate_is_one_sentence(
    server: EtcdCluster, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = EtcdTls(pki / "other-ca.crt")
    sentence = await refusal(Etcd(server.endpoints, wrong))
    assert sentence == (
        f"{server.endpoints[0]}: its certificate is not signed by our CA (--etcd-cafile)"
    )
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    with etcd_on_loopback(tmp_path, tls=pki.server_flags("misnamed"), ctl=pki.ctl) as cluster:
        sentence = await refusal(Etcd(cluster.endpoints, EtcdTls(pki / "ca.crt")))
        assert "for another name or address" in sentence


@pytest.mark.parametrize(
    ("name", "said"), [("expired", "has expired"), ("early", "is not valid yet")]
)
async def test_a_certificate_of_another_time_is_not_called_anothers(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """A host without a clock of its own starts in 1970, until NTP sets it."""
    setting = 0.0
    monkeypatch.setattr(etcd_connection, "_clock_setting", lambda: setting)
    with etcd_on_loopback(tmp_path, tls=pki.server_flags(name), ctl=pki.ctl) as cluster:
        etcd = Etcd(cluster.endpoints, EtcdTls(pki / "ca.crt"))
        assert await refusal(etcd) == (
            f"{cluster.endpoints[0]}: its certificate {said}, if this host's clock is right"
        )
        asked = etcd.session.failures
        setting = 3600.0
        with pytest.raises(EtcdUnavailable):
            await asyncio.wait_for(etcd.get("x"), SOON_SECONDS)
        assert etcd.session.failures > asked
        await etcd.close()


def test_grpc_adds_no_noise_of_its_own(server: EtcdCluster, pki: Pki) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from pyflannel.control.etcd import Etcd\n"
        "from pyflannel.control.etcd_tls import EtcdTls\n"
        "async def main():\n"
        "    await Etcd([sys.argv[1]], EtcdTls(Path(sys.argv[2]))).get('x')\n"
        "try: asyncio.run(main())\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.endpoints[0], str(pki / "other-ca.crt")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert "not signed by our CA" in done.stdout
    assert done.stderr.count("\n") == 1, done.stderr


async def test_the_wrong_scheme_is_hinted_at(
    server: EtcdCluster, cluster: EtcdCluster, pki: Pki
) -> None:
    for endpoint, tls, hint in (
        (server.endpoints[0].replace("https", "http"), None, "write https://"),
        (cluster.endpoints[0].replace("http", "https"), EtcdTls(pki / "ca.crt"), "write http://"),
    ):
        etcd = Etcd([endpoint], tls)
        with pytest.raises(EtcdUnavailable, match=hint):
            await etcd.get("x")
        await etcd.close()


@pytest.mark.parametrize(
    ("ca", "cert", "key", "named"),
    [
        ("none.crt", None, None, "--etcd-cafile .*: No such file"),
        ("garbage.crt", None, None, "--etcd-cafile .* is not a PEM certificate"),
        ("ca.crt", "client.crt", None, "--etcd-certfile and --etcd-keyfile go together"),
        ("ca.crt", "client.crt", "stranger.key", "must be a PEM certificate and its key"),
        ("ca.crt", "garbage.crt", "client.key", "must be a PEM certificate and its key"),
    ],
)
def test_bad_files_are_refused_at_start(
    pki: Pki, ca: str, cert: str | None, key: str | None, named: str
) -> None:
    tls = EtcdTls(pki / ca, pki / cert if cert else None, pki / key if key else None)
    with pytest.raises(Refusal, match=named):
        Etcd(["https://127.0.0.1:1"], tls)


def test_files_without_https_are_refused(pki: Pki) -> None:
    with pytest.raises(Refusal, match="plain http"):
        Etcd(["http://127.0.0.1:1"], EtcdTls(pki / "ca.crt"))


async def test_changed_files_are_read_again(server: EtcdCluster, pki: Pki, tmp_path: Path) -> None:
    ours = tmp_path / "ca.crt"
    ours.write_bytes((pki / "other-ca.crt").read_bytes())
    etcd = Etcd(server.endpoints, EtcdTls(ours))
    with pytest.raises(EtcdUnavailable):
        await etcd.get("x")
    waiting = asyncio.ensure_future(etcd.get("x"))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    (tmp_path / "new").write_bytes((pki / "ca.crt").read_bytes())
    (tmp_path / "new").replace(ours)
    await asyncio.wait_for(waiting, SOON_SECONDS)
    assert etcd.session.is_well
    # A half-written file does not disturb the connection that stands.
    ours.write_text("")
    await etcd.get("x")
    await etcd.close()
    with pytest.raises(EtcdUnavailable, match="is not a PEM certificate"):
        await etcd.get("x")
    assert etcd.session.state is SessionState.REFUSED


async def test_a_client_certificate_is_renewed_under_us(
    mutual: EtcdCluster, pki: Pki, tmp_path: Path
) -> None:
    for name in ("crt", "key"):
        (tmp_path / name).write_bytes((pki / f"client.{name}").read_bytes())
    etcd = Etcd(mutual.endpoints, EtcdTls(pki / "ca.crt", tmp_path / "crt", tmp_path / "key"))
    await etcd.get("x")
    for name in ("crt", "key"):
        (tmp_path / name).write_bytes((pki / f"stranger.{name}").read_bytes())
    await etcd.close()
    assert "wants a client certificate" in await refusal(etcd)


async def test_certificates_are_read_again_at_sighup(
    mutual: EtcdCluster, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def install(name: str) -> None:
        for end in ("crt", "key"):
            (tmp_path / end).write_bytes((pki / f"{name}.{end}").read_bytes())

    install("client")
    files = {"ca": pki / "ca.crt", "cert": tmp_path / "crt", "key": tmp_path / "key"}
    flags = [f"--etcd-{name}file={path}" for name, path in files.items()]
    options = parse_options(["--etcd-endpoints", ",".join(mutual.endpoints), *flags], {})
    node, hangup = Node(options), asyncio.Event()
    etcd = node.etcd = etcd_client(options)
    reloading = asyncio.ensure_future(reload_when_told(node, lambda: options, hangup))
    await etcd.get("x")
    install("stranger")
    # The connection that stands is not disturbed, until we are told.
    await etcd.get("x")
    hangup.set()
    while "certificates are read again" not in caplog.text:
        await asyncio.sleep(0.01)
    assert "wants a client certificate" in await refusal(etcd)
    install("client")
    hangup.set()
    await asyncio.wait_for(etcd.get("x"), SOON_SECONDS)
    reloading.cancel()
    await etcd.close()


async def test_user_and_password(users: EtcdCluster) -> None:
    etcd = Etcd(users.endpoints, username="root", password="secret")
    await etcd.get("x")
    await etcd.close()
    wrong = Etcd(users.endpoints, username="root", password="guess")
    assert "wrong --etcd-username or --etcd-password" in await refusal(wrong)
    assert "give --etcd-username" in await refusal(Etcd(users.endpoints))
    bob = Etcd(users.endpoints, username="bob", password="bob")
    with pytest.raises(EtcdRejected, match="permission denied"):
        await bob.get("x")
    assert bob.session.last_error.endswith("permission denied")
    await bob.close()


async def _see(etcd: Etcd, start: int, number: int) -> None:
    """Watch until so many events have come."""
    watch = etcd.watch("/token/", prefix=True, after_revision=start)
    async with contextlib.aclosing(watch) as batches:
        async for batch in batches:
            number -= len(batch.events)
            if number <= 0:
                break


async def test_a_token_that_ends_is_replaced_and_the_watch_goes_on(users: EtcdCluster) -> None:
    etcd = Etcd(users.endpoints, username="root", password="secret")
    start = (await etcd.get("none")).revision
    watch = etcd.watch("/token/", prefix=True, after_revision=start)
    async with contextlib.aclosing(watch) as batches:
        await batches.__anext__()
        first = etcd.session
        ends = time.monotonic() + 2.5
        number = 0
        while time.monotonic() < ends or number <= 10:
            assert (await etcd.put_if(f"/token/{number}", b"x", 0, 0)).succeeded
            batch = await batches.__anext__()
            assert len(batch.events) == 1
            number += 1
        assert etcd.session.failures == first.failures == 0
    # A new watch with an old token delivers nothing in etcd's own words; ours must.
    for _ in range(3):
        with contextlib.suppress(EtcdRejected):  # which says so, and the next has a new one
            await _see(etcd, start, number)
            break
    else:
        raise AssertionError("refused again and again")
    await etcd.close()


async def test_a_store_without_users_is_read_with_a_user(cluster: EtcdCluster) -> None:
    """As after a wipe; flannel's client does so too."""
    etcd = Etcd(cluster.endpoints, username="root", password="secret")
    await etcd.get("x")
    await etcd.close()
