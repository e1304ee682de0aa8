"""Random queries with random faults: a little of what ci/soak does at length."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOAK = "import sys; sys.path.insert(0, sys.argv.pop(1)); import soak; soak.main()"
FOLDER = str(Path(__file__).parent)


@pytest.mark.parametrize("loop", ["asyncio", "trio", "gevent"])
def test_soak_finds_nothing(run_script, loop):
    said = run_script(SOAK, FOLDER, "--loop", loop, "--seconds", "3.3", "--seed", "7")
    assert said[0] == "Polars"
