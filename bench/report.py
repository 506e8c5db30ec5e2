"""Tables of a run, as text and as Markdown; `python -m bench.report FILE` renders them again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from bench.cases import CASES
from bench.records import METRICS, Record, Run, Table
from bench.suites import QUICK, SUITES
from bench.summary import paired_ratio, spread


def number(value: float) -> str:
    """Format with three or more digits, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def describe(record: Record) -> str:
    """Return a sample's numbers on one line."""
    values = [f"{number(value)} {METRICS[name].unit}" for name, value in record.values.items()]
    notes = [f"{name} {count:.0f}" for name, count in record.notes.items() if count]
    return ", ".join(values + notes)


def _cell(values: dict[int, float], baseline: dict[int, float]) -> str:
    """Return a variant's median with its ratio, or with its spread where there is none."""
    if not values:
        return ""
    seen = spread(list(values.values()))
    pairs = [(values[turn], baseline[turn]) for turn in values if turn in baseline]
    if not pairs or not all(value * base for value, base in pairs):
        return f"{number(seen.median)} ({number(seen.low)}..{number(seen.high)})"
    ratio = paired_ratio(*zip(*pairs))
    interval = " [{:.2f}..{:.2f}]".format(*ratio.interval) if ratio.interval else ""
    return f"{number(seen.median)} x{ratio.median:.2f}{interval}"


def cells(table: Table, baseline: str) -> list[list[str]]:
    """Return a table's lines, the head first, with ratios to the variant `baseline`."""
    lines = [["", *table.variants]]
    for case, name in table.rows:
        metric = METRICS[name]
        base = table.series(case, name, baseline)
        title = f"{CASES[case].title}: {metric.title}, {metric.unit}"
        line = [f"{title} {'+' if metric.more_is_better else '-'}"]
        for variant in table.variants:
            values = table.series(case, name, variant)
            line.append(_cell(values, {} if variant == baseline else base))
        lines.append(line)
    return lines


def _aligned(lines: Sequence[Sequence[str]], separator: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    return [
        separator.join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
        for line in lines
    ]


def _about(run: Run) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    return f"Samples of {run.seconds:g} s in turns; {machine}"


def _legend(run: Run) -> str:
    return (
        f"Medians; (lowest..highest), or xRATIO to `{run.baseline}` as the median of the rounds' "
        "ratios [95 % interval]. More is better for +, less for -."
    )


def text(run: Run) -> str:
    """Return the tables for a terminal."""
    lines = [_about(run), _legend(run), *run.absent]
    for table in run.tables():
        head = f"underlay {table.mode}, {table.rounds} rounds"
        lines += ["", head, *_aligned(cells(table, run.baseline), "  ")]
    return "\n".join(lines)


def markdown(run: Run) -> str:
    """Return the tables as a Markdown page."""
    titles = {suite.name: suite.title for suite in (*SUITES, QUICK)}
    lines = ["# Results", "", f"{_about(run)}.", "", _legend(run)]
    lines += ["", *(f"* not measured: {sentence}" for sentence in run.absent)] * bool(run.absent)
    for table in run.tables():
        head, *body = cells(table, run.baseline)
        title = titles.get(table.suite, table.suite)
        lines += ["", f"## {title} (`{table.mode}`, {table.rounds} rounds)", ""]
        lines += [f"|{line}|" for line in _aligned([head, ["---"] * len(head), *body], "|")]
    return "\n".join(lines) + "\n"


def write(run: Run, folder: Path) -> list[Path]:
    """Write results.md and, where matplotlib is installed, the plots; return the files."""
    page = folder / "results.md"
    page.write_text(markdown(run))
    try:
        from bench.plots import draw
    except ImportError:
        return [page]
    return [page, *draw(run, folder)]


if __name__ == "__main__":
    stored = Path(sys.argv[1])
    for path in write(Run.load(stored), stored.parent):
        print(path)
