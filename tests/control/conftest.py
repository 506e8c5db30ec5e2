"""A real etcd on loopback, shared by the tests of a module; each has a prefix of its own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from pyflannel.control.etcd import Etcd
from tests.lab.etcd import EtcdCluster, etcd_on_loopback
from tests.lab.require import require_program

_COUNTER = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member."""
    require_program("etcd")
    require_program("etcdctl")
    with etcd_on_loopback(tmp_path_factory.mktemp("etcd")) as made:
        yield made


@pytest_asyncio.fixture
async def etcd(cluster: EtcdCluster) -> AsyncIterator[Etcd]:
    """A client of it."""
    made = Etcd(cluster.endpoints)
    yield made
    await made.close()


@pytest.fixture
def prefix() -> str:
    """A network prefix that no other test uses."""
    return f"/test-{next(_COUNTER)}/network"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for an etcd of a test's own."""
    return tmp_path
