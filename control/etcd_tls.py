"""Certificates for the connection to etcd: the operator's files or the system's CAs."""

from __future__ import annotations

import errno
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


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
        """Read the files and make grpc's credentials; OSError for one that cannot be read."""
        return grpc.ssl_channel_credentials(
            _read(self.ca) or _system_certificates(), _read(self.key), _read(self.cert)
        )


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _system_certificates() -> bytes:
    """Return the host's CA bundle; grpc would use one of its own instead."""
    given = ssl.get_default_verify_paths().cafile
    for path in (given, *_CA_BUNDLES):
        if path is not None and Path(path).is_file():
            return Path(path).read_bytes()
    raise FileNotFoundError(
        errno.ENOENT, "this host has no CA bundle; name one with --etcd-cafile", _CA_BUNDLES[0]
    )
