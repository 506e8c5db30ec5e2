"""`python -m bench`: compare variants in turns and print ratios to the kernel's vxlan device."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import ExitStack

from bench.cases import CASES, QUICK, Case, Sample
from bench.machine import describe, wait_for_quiet
from bench.summary import paired_ratio, spread
from bench.variants import VARIANTS, Stack, build, compile_tools, parse_variant
from tests.lab.hosts import UNDERLAYS

BASELINE = "kernel"
ATTEMPTS = 3
Samples = dict[tuple[str, str], list[Sample]]


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a subset in under 3 minutes")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE",
                        help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--variant", nargs="+", action="extend",
                        metavar="NAME[:KIND][@CHECKOUT][=FLAGS]",
                        help=f"what to compare: {', '.join(VARIANTS)}, or a name of your own for "
                        "other flags or another checkout: 'w0=--workers=0' 'before@../old' "
                        "'short:null=--queue=64'")
    parser.add_argument("--mode", default="wire-nocsum", choices=UNDERLAYS, help="underlay")
    parser.add_argument("--rounds", type=int, help="rounds in turns (5)")
    parser.add_argument("--seconds", type=float, help="length of a sample (4; quick 2)")
    parser.add_argument("--ours-flags", default="", help="flags for every pyflannel-udp")
    # fmt: on
    given = parser.parse_args()
    names = given.variant or ["plain", "kernel", "ours"]
    try:
        common = tuple(shlex.split(given.ours_flags))
        given.variants = [parse_variant(name, common) for name in names]
    except ValueError as error:
        parser.error(str(error))
    given.only = given.only or (QUICK if given.quick else tuple(CASES))
    given.rounds = given.rounds or 5
    given.seconds = given.seconds or (2 if given.quick else 4)
    return given


def sample(case: Case, stack: Stack, seconds: float) -> Sample:
    """Measure until nobody disturbed it, at most ATTEMPTS times."""
    for _ in range(ATTEMPTS):
        taken = case.measure(stack, seconds)
        if not taken.cpu.disturbed:
            break
        say(f"    others used {taken.cpu.foreign / taken.cpu.elapsed:.0%} of a core: once more")
        wait_for_quiet(say)
    return taken


def describe_sample(taken: Sample) -> str:
    """Return a sample's numbers on one line."""
    values = [f"{number(value)} {metric.unit}" for metric, value in taken.values.items()]
    notes = [f"{name} {count:.0f}" for name, count in taken.notes.items() if count]
    return ", ".join(values + notes)


def measure(given: argparse.Namespace, stacks: list[Stack]) -> Samples:
    """Take all samples in turns; the plain underlay once, since nothing is compared with it."""
    samples: Samples = {}
    for turn in range(given.rounds):
        for name in given.only:
            # Who begins changes, so that no variant always follows the same one.
            first = turn % len(stacks)
            for stack in stacks[first:] + stacks[:first]:
                variant = stack.variant
                if variant.kind == "plain" and samples.get((variant.name, name)):
                    continue
                taken = sample(CASES[name], stack, given.seconds)
                samples.setdefault((variant.name, name), []).append(taken)
                say(f"  {turn + 1}/{given.rounds} {name:<13}{variant.name:<14}"
                    f"{describe_sample(taken)}")  # fmt: skip
    return samples


def cell(values: list[float], baseline: list[float] | None) -> str:
    """Return a variant's median with its ratio, or with its spread where there is none."""
    seen = spread(values)
    if baseline is None or not all(baseline + values):
        return f"{number(seen.median)} ({number(seen.low)}..{number(seen.high)})"
    ratio = paired_ratio(values, baseline)
    interval = " [{:.2f}..{:.2f}]".format(*ratio.interval) if ratio.interval else ""
    return f"{number(seen.median)}  x{ratio.median:.2f}{interval}"


def number(value: float) -> str:
    """Format with three or more digits, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def report(given: argparse.Namespace, samples: Samples) -> None:
    """Print a table: medians with the median of the paired ratios to the baseline."""
    names = [variant.name for variant in given.variants]
    say(f"\nunderlay {given.mode}, {given.rounds} rounds of {given.seconds:g} s in turns")
    say(", ".join(f"{name} {value}" for name, value in describe().items()))
    say(f"medians; (lowest..highest), or xRATIO to {BASELINE} [95 % interval]; "
        "higher is better for +, lower for -\n")  # fmt: skip
    lines = [["", *names]]
    for case in given.only:
        taken = {name: samples[name, case] for name in names}
        for metric in taken[names[0]][0].values:
            series = {name: [one.values[metric] for one in taken[name]] for name in names}
            base = series.get(BASELINE)
            sign = "+" if metric.more_is_better else "-"
            lines.append(
                [f"{CASES[case].title}: {metric.title}, {metric.unit} {sign}"]
                + [cell(series[name], None if name == BASELINE else base) for name in names]
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        say("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    if os.geteuid() != 0:
        say("run it as root: it makes network namespaces")
        return 1
    compile_tools()
    os.nice(-15)
    if not wait_for_quiet(say):
        say("the machine did not become quiet; numbers below are disturbed")
    with ExitStack() as opened:
        stacks: list[Stack] = []
        for variant in given.variants:
            stack = build(variant, given.mode)
            opened.callback(stack.close)
            stacks.append(stack)
            say(f"built {variant.name} {' '.join(variant.flags)}")
        samples = measure(given, stacks)
    report(given, samples)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\ninterrupted; everything that was started is stopped and removed")
        sys.exit(130)
