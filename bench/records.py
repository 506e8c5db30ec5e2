"""What a run leaves behind: samples as records, kept as JSON; no measuring, no printing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BASELINE = "kernel"


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a case: its unit, and whether more of it is better."""

    title: str
    unit: str
    more_is_better: bool


METRICS = {
    "throughput": Metric("throughput", "Gbit/s", True),
    "cpu": Metric("CPU, both ends", "s/GB", False),
    "rate": Metric("rate at < 1 % loss", "kpackets/s", True),
    "rtt_mean": Metric("round trip, mean", "us", False),
    "rtt_p50": Metric("round trip, p50", "us", False),
    "rtt_p99": Metric("round trip, p99", "us", False),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. `values` by metric; `notes`: what else was counted; `round_trips` in us."""

    suite: str
    mode: str
    turn: int
    case: str
    variant: str
    values: dict[str, float]
    notes: dict[str, float]
    foreign: float
    round_trips: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """All records of one invocation.

    `absent`: what could not be measured, and why; `baseline`: the variant of the ratios.
    """

    machine: dict[str, str]
    seconds: float
    records: list[Record] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    baseline: str = BASELINE

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text())
        stored["records"] = [Record(**record) for record in stored["records"]]
        return cls(**stored)

    def tables(self) -> Iterator[Table]:
        """Yield one table for each suite and mode, in the order of measuring."""
        for suite, mode in dict.fromkeys((one.suite, one.mode) for one in self.records):
            chosen = [one for one in self.records if (one.suite, one.mode) == (suite, mode)]
            yield Table(suite, mode, chosen)


@dataclass(frozen=True, slots=True)
class Table:
    """The records of one suite in one underlay."""

    suite: str
    mode: str
    records: Sequence[Record]

    @property
    def variants(self) -> list[str]:
        """Their names, in the order of the first round."""
        return list(dict.fromkeys(one.variant for one in self.records))

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len({one.turn for one in self.records})

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Case and metric of every row."""
        return list(dict.fromkeys((one.case, name) for one in self.records for name in one.values))

    def series(self, case: str, metric: str, variant: str) -> dict[int, float]:
        """Return the values of one cell by round."""
        return {
            one.turn: one.values[metric]
            for one in self.records
            if one.case == case and one.variant == variant and metric in one.values
        }
