"""Plots of a run as PNG files: bars of medians with the spread, and round-trip distributions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.cases import CASES
from bench.records import METRICS, Run, Table
from bench.summary import spread

BARS = {"throughput": "throughput", "cpu": "cpu", "rate": "packets"}
LOADED, IDLE = "tcp4", "rtt"


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw what the run has samples for; return the files."""
    files = []
    for table in run.tables():
        stem = f"{table.suite}-{table.mode}"
        for metric, name in BARS.items():
            if any(metric == row[1] for row in table.rows):
                files.append(_save(folder / f"{stem}-{name}.png", _bars, table, metric))
        if any(one.case in (IDLE, LOADED) for one in table.records):
            files.append(_save(folder / f"{stem}-round-trips.png", _distributions, table))
    return files


def _save(path: Path, plot: Callable[..., Figure], table: Table, *words: str) -> Path:
    figure = plot(table, *words)
    FigureCanvasAgg(figure)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def _bars(table: Table, metric: str) -> Figure:
    cases = [case for case, name in table.rows if name == metric]
    width = 0.8 / len(table.variants)
    figure = Figure(figsize=(max(7, 1.1 * len(cases) + 3), 4.5))
    axes = figure.subplots()
    for place, variant in enumerate(table.variants):
        seen = [spread(list(table.series(case, metric, variant).values()) or [0]) for case in cases]
        axes.bar(
            [at + (place - (len(table.variants) - 1) / 2) * width for at in range(len(cases))],
            [one.median for one in seen],
            width,
            label=variant,
            yerr=[
                [one.median - one.low for one in seen],
                [one.high - one.median for one in seen],
            ],
            error_kw={"elinewidth": 0.8},
        )
    titles = [CASES[case].title for case in cases]
    axes.set_xticks(range(len(cases)), titles, rotation=30, ha="right")
    about = METRICS[metric]
    axes.set_ylabel(f"{about.title}, {about.unit}")
    better = "more" if about.more_is_better else "less"
    axes.set_title(f"{table.suite}, underlay {table.mode} ({better} is better)", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _distributions(table: Table) -> Figure:
    cases = [case for case in (IDLE, LOADED) if any(one.case == case for one in table.records)]
    figure = Figure(figsize=(2 + 5 * len(cases), 4.5))
    row = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(row, cases):
        _distribution(axes, table, case)
        title = "idle" if case == IDLE else "beside 4 TCP streams"
        axes.set_title(f"{table.suite}, underlay {table.mode}: {title}", fontsize=10)
    row[0].set_ylabel("share of round trips that are faster")
    row[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _distribution(axes: Axes, table: Table, case: str) -> None:
    for variant in table.variants:
        times = sorted(
            time
            for one in table.records
            if (one.case, one.variant) == (case, variant)
            for time in one.round_trips
        )
        if times:
            shares = [(place + 1) / len(times) for place in range(len(times))]
            axes.plot(times, shares, label=variant)
    axes.set_xscale("log")
    axes.set_xlabel("round trip, us")
    axes.grid(alpha=0.3)
