from __future__ import annotations

import subprocess
import sys
import threading

import polars as pl
import pytest

from polars_async import Collector

pytest_plugins = ["polars_async.pytest_plugin", "pytester"]

TINY = pl.LazyFrame({"a": [1]})


class Blocked:
    """A query that runs until the test lets it go on."""

    def __init__(self):
        self.started = threading.Event()
        self.gate = threading.Event()
        self.lf = TINY.map_batches(self._wait)

    def _wait(self, df):
        self.started.set()
        self.gate.wait()
        return df


@pytest.fixture
def blocked():
    query = Blocked()
    yield query
    query.gate.set()


@pytest.fixture
def collector(blocked):
    """One slot; all its queries are let go on before it is closed."""
    collector = Collector(max_running=1)
    yield collector
    blocked.gate.set()
    collector.close()
    assert not collector._cpu.admission.running
    assert not collector._cpu.admission.waiting


@pytest.fixture
def run_script():
    """Run a program of its own, and give what it printed; it must print no error."""

    def run(script, *arguments):
        command = [sys.executable, "-c", script, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout.split()

    return run
