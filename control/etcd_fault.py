"""What an error of etcd, of grpc or of TLS means: try elsewhere, log in again, or fix something.

Does no I/O.
"""

from __future__ import annotations

from enum import Enum


class EtcdUnavailable(Exception):
    """etcd did not do what was asked; `str()` names the endpoint and the cause."""


class EtcdRejected(EtcdUnavailable):
    """etcd answered, and the answer to this request is no."""


class Fault(Enum):
    """What an error asks for."""

    ENDPOINT = "another endpoint"
    TOKEN = "a fresh token"
    CREDENTIALS = "other certificates, password or permission"
    REQUEST = "another request"


_TOKEN_ERRORS = ("invalid auth token", "revision of auth store is old", "token is not provided")
_ENDPOINT_CODES = ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED")
_CREDENTIAL_ERRORS = {
    "certificate_verify_failed": "its certificate is not signed by our CA (--etcd-cafile)",
    "hostname verification": "its certificate is for another name or address than the endpoint's",
    "is not in peer certificate": "its certificate is for another name or address",
    "wrong_version_number": "it does not speak TLS; write http:// in --etcd-endpoints",
    "bad_certificate": "it rejects our certificate (--etcd-certfile)",
    "bad certificate": "it rejects our certificate (--etcd-certfile)",
    "certificate_required": "it wants a client certificate; give --etcd-certfile and "
    "--etcd-keyfile",
    "unknown_ca": "it does not know the CA of our certificate (--etcd-certfile)",
    "invalid user id or password": "wrong --etcd-username or --etcd-password",
    "user name is empty": "it wants a user; give --etcd-username and --etcd-password",
    "authentication is not enabled": "it has no users; leave out --etcd-username",
}


def diagnose(code: str, details: str) -> tuple[Fault, str]:
    """Return what an error asks for, and one clause about it; `code` is grpc's name."""
    low = details.lower()
    if any(text in low for text in _TOKEN_ERRORS) or code == "UNAUTHENTICATED":
        return Fault.TOKEN, details
    for text, clause in _CREDENTIAL_ERRORS.items():
        if text in low:
            return Fault.CREDENTIALS, clause
    if code == "DEADLINE_EXCEEDED":
        return Fault.ENDPOINT, "no answer in time"
    fault = Fault.ENDPOINT if code in _ENDPOINT_CODES else Fault.REQUEST
    return fault, details.strip()[:200] or code
