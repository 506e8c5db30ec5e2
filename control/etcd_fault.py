"""What an error of etcd, of grpc or of TLS means: try elsewhere, log in again, or fix something.

Does no I/O.
"""

from __future__ import annotations

import re
from enum import Enum


class EtcdUnavailable(Exception):
    """etcd did not do what was asked; `str()` names the endpoint and the cause."""


class EtcdRejected(EtcdUnavailable):
    """etcd can be asked, but does not do this: its answer is no."""


class EtcdHeld(EtcdRejected):
    """etcd can be asked, but leaves a write hanging: it may still do it."""


class Fault(Enum):
    """What an error asks for."""

    ENDPOINT = "another endpoint"
    TOKEN = "a fresh token"
    CREDENTIALS = "other certificates, password or permission"
    REQUEST = "another request"


_ENDPOINT_CODES = ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED")
_TOKEN_ERRORS = {
    "invalid auth token": "our token expired",
    "revision of auth store is old": "users have changed",
    "user name is empty": "it wants a user; give --etcd-username and --etcd-password",
}
_REQUEST_ERRORS = {
    # It answers all the same, and so would the other members.
    "database space exceeded": "its database is full, so it takes no writes; compact and "
    "defragment it, then `etcdctl alarm disarm`",
}
_CERTIFICATE = "it wants a client certificate that it trusts; see --etcd-certfile, --etcd-keyfile"
_CREDENTIAL_ERRORS = {
    "is not yet valid": "its certificate is not valid yet, if this host's clock is right",
    "certificate has expired": "its certificate has expired, if this host's clock is right",
    "certificate_verify_failed": "its certificate is not signed by our CA (--etcd-cafile)",
    "hostname verification": "its certificate is for another name or address than the endpoint's",
    "not in peer certificate": "its certificate is for another name or address than the endpoint's",
    "bad_certificate": _CERTIFICATE,
    "certificate_required": _CERTIFICATE,
    "unknown_ca": _CERTIFICATE,
    # With TLS 1.3 the client is through with the handshake when the server says no.
    "unwrap failed (tsi_data_corrupted)": _CERTIFICATE,
    "secure read failed": _CERTIFICATE,  # the same, as grpc 1.73 to 1.78 says it
    "invalid user id or password": "wrong --etcd-username or --etcd-password",
}
_WRONG_SCHEME = ("handshake read failed", "socket closed")
_HINTS = {
    "https": "; if it does not speak TLS, write http:// in --etcd-endpoints",
    "http": "; if it speaks TLS, write https:// in --etcd-endpoints",
}
_PREAMBLE = re.compile(r"failed to connect to all addresses; last error: \w+: \S+: ")


def diagnose(code: str, details: str, scheme: str = "http") -> tuple[Fault, str]:
    """Return what an error asks for, and one clause about it.

    `code` is grpc's name, `scheme` the endpoint's.
    """
    low = details.lower()
    for text, clause in _TOKEN_ERRORS.items():
        if text in low:
            return Fault.TOKEN, clause
    for text, clause in _CREDENTIAL_ERRORS.items():
        if text in low:
            return Fault.CREDENTIALS, clause
    for text, clause in _REQUEST_ERRORS.items():
        if text in low:
            return Fault.REQUEST, clause
    if code == "DEADLINE_EXCEEDED":
        return Fault.ENDPOINT, "no answer in time"
    clause, connecting = _PREAMBLE.subn("", details.strip())
    clause = clause[:200] or code
    if code not in _ENDPOINT_CODES:
        return Fault.REQUEST, clause
    if connecting and any(text in low for text in _WRONG_SCHEME):
        clause += _HINTS[scheme]
    return Fault.ENDPOINT, clause
