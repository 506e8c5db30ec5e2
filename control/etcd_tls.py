"""Certificates for the connection to etcd: the operator's files or the system's CAs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyflannel.control.quiet_grpc import grpc

_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class BadCertificates(Exception):
    """The files cannot be used; `str()` says why and which."""


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """Certificate files; all None with https means the system's CAs."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """The flag and path of each file that is given."""
        named = (
            ("etcd-cafile", self.ca),
            ("etcd-certfile", self.cert),
            ("etcd-keyfile", self.key),
        )
        return tuple((flag, path) for flag, path in named if path is not None)

    def signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what changes when a file is written or replaced."""
        found: list[tuple[int, int, int] | None] = []
        for _, path in self.files:
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(found)

    def credentials(self) -> Any:
        """Read the files and make grpc's credentials; BadCertificates, with a sentence."""
        self._check()
        return grpc.ssl_channel_credentials(
            _read(self.ca) or _system_certificates(), _read(self.key), _read(self.cert)
        )

    def _check(self) -> None:
        """Look into the files, as grpc says of a bad one only that it failed."""
        for flag, path in self.files:
            try:
                path.read_bytes()
            except OSError as error:
                raise BadCertificates(f"--{flag} {path}: {error.strerror}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise BadCertificates(f"--etcd-cafile {self.ca} is not a PEM certificate") from error
        try:
            if self.cert is not None:
                # A password would be asked for on the terminal.
                context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            raise BadCertificates(
                f"--etcd-certfile {self.cert} and --etcd-keyfile {self.key} must be a PEM "
                "certificate and its key, without a password"
            ) from error


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _system_certificates() -> bytes:
    """Return the host's CA bundle; grpc would use one of its own instead."""
    given = ssl.get_default_verify_paths().cafile
    for path in (given, *_CA_BUNDLES):
        if path is not None and Path(path).is_file():
            return Path(path).read_bytes()
    raise BadCertificates("this host has no CA bundle; name one with --etcd-cafile")
