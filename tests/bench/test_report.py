"""What a run leaves behind: JSON that comes back, tables, plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench import report
from bench.cases import CASES
from bench.records import Record, Run
from bench.suites import QUICK, SUITES
from bench.variants import parse_variant
from tests.lab.hosts import UNDERLAYS

KERNEL = Record("quick", "wire", 0, "tcp1", "kernel", {"throughput": 4.0, "cpu": 1.5}, {}, 0.0)
OURS = replace(KERNEL, variant="ours", values={"throughput": 5.0, "cpu": 3.0})


def _run() -> Run:
    records = [
        one
        for turn in range(2)
        for base in (KERNEL, OURS)
        for one in (
            replace(base, turn=turn),
            replace(base, turn=turn, case="rtt", values={"rtt_p50": 80.0}, round_trips=[79, 81]),
        )
    ]
    return Run({"kernel": "6.18"}, 4, records, ["tcp1-bbr: no bbr"])


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    _run().save(tmp_path / "results.json")
    assert Run.load(tmp_path / "results.json") == _run()


def test_tables_pair_rounds() -> None:
    text = report.markdown(_run())
    row = next(line for line in text.splitlines() if "throughput" in line)
    assert "4 (4..4)" in row
    assert "5 x1.25 [1.25..1.25]" in row
    assert "3 x2.00" in text
    assert "tcp1-bbr: no bbr" in text
    assert "kernel 6.18" in text
    assert "(`wire`, 2 rounds)" in text


def test_ratios_are_to_the_variant_that_was_chosen(tmp_path: Path) -> None:
    replace(_run(), baseline="ours").save(tmp_path / "results.json")
    text = report.markdown(Run.load(tmp_path / "results.json"))
    row = next(line for line in text.splitlines() if "throughput" in line)
    assert "to `ours`" in text
    assert "4 x0.80 [0.80..0.80]" in row
    assert "5 (5..5)" in row


def test_a_variant_that_missed_a_round_is_paired_with_what_there_is() -> None:
    run = _run()
    run.records.append(replace(KERNEL, turn=2, values={"throughput": 400.0}))
    assert "5 x1.25 [1.25..1.25]" in report.text(run)


def test_plots_are_drawn(tmp_path: Path) -> None:
    files = report.write(_run(), tmp_path)
    assert {path.name for path in files} == {
        "results.md",
        "quick-wire-throughput.png",
        "quick-wire-cpu.png",
        "quick-wire-round-trips.png",
    }
    assert all(path.stat().st_size > 1000 for path in files if path.suffix == ".png")


def test_suites_name_what_exists() -> None:
    for suite in (*SUITES, QUICK):
        assert set(suite.cases) <= set(CASES)
        assert set(suite.modes) <= set(UNDERLAYS)
        for text in suite.variants:
            parse_variant(text)
