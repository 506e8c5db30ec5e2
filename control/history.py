"""Whether what etcd shows continues the store that we knew, or that was wiped or rolled back.

Does no I/O. A wiped etcd can keep its cluster id, and a rolled-back one can have grown past our
revision by the time it answers, so both the revision and the keys are compared: a key that is said
to be older than our revision must be one we knew. Source: decision 17.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyflannel.control.lease import KeyValue, text_of


class History:
    """What we knew of the keys of one prefix, at one revision."""

    def __init__(self) -> None:
        self.revision = 0
        self._cluster_id = 0
        self._known: dict[bytes, tuple[int, int]] = {}

    def put(self, kv: KeyValue) -> None:
        """Take in a put event."""
        self._known[kv.key] = (kv.create_revision, kv.mod_revision)

    def deleted(self, key: bytes) -> None:
        """Take in a delete event."""
        self._known.pop(key, None)

    def advance(self, revision: int) -> None:
        """Take in that all events up to this revision are known."""
        self.revision = max(self.revision, revision)

    def reset(self, cluster_id: int, revision: int, kvs: Sequence[KeyValue]) -> str:
        """Take in a snapshot; return why it is of another history, "" if it is not."""
        why = self._break(cluster_id, revision, kvs) if self._cluster_id else ""
        self._cluster_id, self.revision = cluster_id, revision
        self._known = {kv.key: (kv.create_revision, kv.mod_revision) for kv in kvs}
        return why

    def _break(self, cluster_id: int, revision: int, kvs: Iterable[KeyValue]) -> str:
        if cluster_id != self._cluster_id:
            return f"it is another cluster ({cluster_id:x}, was {self._cluster_id:x})"
        if revision < self.revision:
            return f"it went back from revision {self.revision} to {revision}"
        for kv in kvs:
            created, modified = self._known.get(kv.key, (0, 0))
            if (kv.create_revision <= self.revision and kv.create_revision != created) or (
                kv.mod_revision <= self.revision and kv.mod_revision != modified
            ):
                return f"{text_of(kv.key)} is older than revision {self.revision} and was not known"
        return ""
