"""`python -m bench`: compare variants in turns and print their ratios to one of them."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bench import report
from bench.cases import CASES, what_lacks
from bench.counters import read_counters
from bench.machine import describe, wait_for_quiet
from bench.program import begin, positive, run_program, say
from bench.records import BASELINE, Record, Run
from bench.suites import QUICK, SUITES, Suite
from bench.transfer import transfer_is_intact
from bench.variants import (
    VARIANTS,
    CannotBuildError,
    Stack,
    Variant,
    build,
    compile_tools,
    parse_variant,
)
from tests.lab.hosts import UNDERLAYS

ATTEMPTS = 3
TRANSFER_MEGABYTES = 32
RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a subset in under 3 minutes")
    parser.add_argument("--suite", nargs="+", choices=[suite.name for suite in SUITES],
                        help="some of the whole benchmark")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE",
                        help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--variant", nargs="+", action="extend",
                        metavar="NAME[:KIND][@CHECKOUT][=FLAGS]",
                        help=f"what to compare: {', '.join(VARIANTS)}, or a name of your own for "
                        "other flags or another checkout: 'w0=--workers=0' 'before@../old' "
                        "'short:null=--queue=64'")
    parser.add_argument("--baseline", metavar="NAME",
                        help="the variant that the others are compared with (kernel)")
    parser.add_argument("--mode", nargs="+", choices=UNDERLAYS, help="underlays (wire-nocsum)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds in turns (5)")
    parser.add_argument("--seconds", type=positive, help="length of a sample (4; quick 2)")
    parser.add_argument("--ours-flags", default="", help="flags for every pyflannel-udp")
    parser.add_argument("--output", type=Path,
                        help="folder for results.json, results.md and plots (suites: "
                        "bench/results; else none)")
    # fmt: on
    given = parser.parse_args()
    given.suites = chosen_suites(given)
    try:
        names = {parse_variant(text).name for suite in given.suites for text in suite.variants}
    except ValueError as error:
        parser.error(str(error))
    if given.baseline and given.baseline not in names:
        parser.error(f"{given.baseline!r} is not compared; there are {', '.join(sorted(names))}")
    given.seconds = given.seconds or (2 if given.quick else 4)
    given.output = given.output or (None if given.suites[0].name == QUICK.name else RESULTS)
    return given


def chosen_suites(given: argparse.Namespace) -> list[Suite]:
    """Return what the command line asks for; variants alone are a suite of their own."""
    suites = [suite for suite in SUITES if not given.suite or suite.name in given.suite]
    if given.quick or (given.variant and not given.suite):
        suites = [QUICK]
    return [
        replace(
            suite,
            variants=tuple(given.variant or suite.variants),
            cases=tuple(given.only or suite.cases),
            modes=tuple(given.mode or suite.modes),
        )
        for suite in suites
    ]


class Bench:
    """Runs suites and collects records."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._common = tuple(shlex.split(given.ours_flags))
        self.run = Run(describe(), given.seconds, baseline=given.baseline or BASELINE)
        self._done = 0
        self._total = sum(
            len(suite.modes) * given.rounds * len(suite.cases) * len(suite.variants)
            for suite in given.suites
        )
        self._began = time.monotonic()

    def measure(self, suite: Suite, mode: str) -> None:
        """Take all samples of a suite in one underlay."""
        absent = {case for case in suite.cases if self._lacks(case)}
        cases = [case for case in suite.cases if case not in absent]
        turns = range(self._given.rounds)
        # Rebuilding lets the luck of memory placement into the spread; --quick has no time for it.
        for together in [turns] if self._given.quick else [[turn] for turn in turns]:
            with self._stacks(suite, mode) as stacks:
                for turn in together:
                    for case in cases:
                        self._turn(suite, mode, turn, case, stacks)
            if self._given.output:
                self.run.save(self._given.output / "results.json")

    def _lacks(self, case: str) -> bool:
        missing = what_lacks(case)
        if missing:
            self._note_absent(f"{case}: there is no {missing}")
        return missing is not None

    def _note_absent(self, sentence: str) -> None:
        if sentence not in self.run.absent:
            self.run.absent.append(sentence)
            say(f"not measured: {sentence}")

    @contextmanager
    def _stacks(self, suite: Suite, mode: str) -> Iterator[list[Stack]]:
        stacks: list[Stack] = []
        with ExitStack() as closing:
            for text in suite.variants:
                stack = self._build(parse_variant(text, self._common), mode)
                if stack:
                    closing.callback(stack.close)
                    stacks.append(stack)
            yield stacks

    def _build(self, variant: Variant, mode: str) -> Stack | None:
        try:
            stack = build(variant, mode)
        except CannotBuildError as error:
            self._note_absent(str(error))
            return None
        if not transfer_is_intact(stack, TRANSFER_MEGABYTES):
            stack.close()
            raise SystemExit(f"{variant.name} in {mode} changed the bytes of a TCP transfer")
        return stack

    def _turn(self, suite: Suite, mode: str, turn: int, case: str, stacks: list[Stack]) -> None:
        # Who begins changes, so that no variant always follows the same one.
        first = turn % len(stacks)
        for stack in stacks[first:] + stacks[:first]:
            self._done += 1
            # Nothing is compared with the plain underlay.
            if stack.variant.kind == "plain" and turn:
                continue
            record = self._sample(suite, mode, turn, case, stack)
            self.run.records.append(record)
            left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
            say(
                f"[{self._done}/{self._total}, {left / 60:.0f} min left] {mode} {case:<13}"
                f"{stack.variant.name:<18}{report.describe(record)}"
            )

    def _sample(self, suite: Suite, mode: str, turn: int, case: str, stack: Stack) -> Record:
        """Measure until nobody disturbed it, at most ATTEMPTS times."""
        for _ in range(ATTEMPTS):
            before = read_counters(stack)
            taken = CASES[case].measure(stack, self._given.seconds)
            counted = read_counters(stack) - before
            foreign = taken.cpu.foreign / taken.cpu.elapsed
            if not taken.cpu.disturbed:
                break
            say(f"    others used {foreign:.0%} of a core: once more")
            wait_for_quiet()
        notes = taken.notes | {name: float(count) for name, count in counted.items()}
        # fmt: off
        return Record(suite.name, mode, turn, case, stack.variant.name, taken.values, notes,
                      foreign, taken.round_trips)
        # fmt: on


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    begin()
    compile_tools()
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
    os.nice(-10)
    wait_for_quiet()
    bench = Bench(given)
    for suite in given.suites:
        for mode in suite.modes:
            say(f"{suite.title}, underlay {mode}: {', '.join(suite.variants)}")
            bench.measure(suite, mode)
    say("\n" + report.text(bench.run))
    if given.output:
        for path in report.write(bench.run, given.output):
            say(str(path))
    return 0


if __name__ == "__main__":
    run_program(main)
