"""The arithmetic of the benchmarks, and how variants are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.summary import Spread, paired_ratio, spread
from bench.variants import Variant, parse_variant


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


def test_ratio_is_paired_by_round() -> None:
    # The machine slows down between rounds, and the ratio of each round stays.
    ratio = paired_ratio([2.0, 1.0, 0.5], [4.0, 2.0, 1.0])
    assert ratio.median == 0.5
    assert ratio.interval == pytest.approx((0.5, 0.5))


def test_interval_is_students() -> None:
    ratio = paired_ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert ratio.median == 2.0
    # log2: mean 1, deviation 1, t(2) = 4.303, so 1 +- 4.303 / sqrt(3)
    assert ratio.interval == pytest.approx((2 ** (1 - 2.4844), 2 ** (1 + 2.4844)), rel=1e-3)


def test_one_round_has_no_interval() -> None:
    assert paired_ratio([1.0], [2.0]).interval is None


def test_variants_are_read(tmp_path: Path) -> None:
    assert parse_variant("kernel", ("--v=2",)) == Variant("kernel", "kernel")
    assert parse_variant("ours", ("--v=2",)) == Variant("ours", "ours", ("--v=2",))
    assert parse_variant("ports=--source-ports=1 --v=1").flags == ("--source-ports=1", "--v=1")
    assert parse_variant("g:null=--design=gaps") == Variant("g", "null", ("--design=gaps",))
    assert parse_variant("null-flat").flags == ("--design=flat", "--threads=2")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert parse_variant(f"before@{tmp_path}").checkout == tmp_path


@pytest.mark.parametrize(
    ("text", "named"), [("nope", "nope"), ("a:nope=", "nope"), ("a@/nonexistent", "/nonexistent")]
)
def test_a_wrong_variant_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_variant(text)
