"""Imports grpc with its own log switched off, unless the operator asked for it.

grpc's C core writes each failed handshake to standard error, in words of its own. We log what
failed once; so its log must be off, and the variable is read when grpc is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

__all__ = ["grpc"]
