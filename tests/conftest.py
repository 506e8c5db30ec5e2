"""What holds for all tests."""

from __future__ import annotations

import os

# The daemon is started some two hundred times: it shall be compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
