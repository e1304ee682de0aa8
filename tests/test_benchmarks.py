"""The benchmarks run, in a size that says nothing, and no contender goes without figures."""

from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.contenders import NATIVE, OWN

CACHE = Path(__file__).parents[1] / ".cache" / "data"


@pytest.mark.parametrize("row", ["p6", "p7", "p8", "r3"])
def test_load_measures_every_contender(row, capsys):
    sizes = ["--quick", "--runs=1", "--exits=1", "--scale=0.03", f"--data={CACHE}"]
    assert load.main([row, *sizes, "--max-running", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{OWN} max_running=1" in printed
    assert "failed" not in printed
    # Polars' own may abort at the exit, after its figures.
    assert not [line for line in printed.splitlines() if OWN in line and "run 1 of 1:" in line]


def test_load_says_why_a_contender_has_no_figures(capsys):
    assert load.main(["p7", "--quick", "--runs=1", "--timeout=0.01"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [f"  P7 {who}, run 1 of 1: no end after 0.01 s" for who in (NATIVE, OWN)]
