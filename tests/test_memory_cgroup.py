"""A limit of memory that kills: Polars' own functions exceed it, and a collector does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]

MEGABYTES = 600
NAME = f"polars-async-test-{os.getpid()}"

PROGRAM = """
import asyncio
import os
import resource
import sys

if __name__ == "__main__":
    who, group, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if group:
        with open(group, "w") as file:
            file.write(str(os.getpid()))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    import polars as pl
    import polars_async as pa

    frame = pl.select(a=pl.int_range(1_000_000).shuffle(1), b=pl.int_range(1_000_000))
    lf = pa.share(frame) if who == "processes" else frame.lazy()
    sorts = [lf.sort(pl.col("a") + n) for n in range(48)]

    async def height(query):
        return (await query).height

    async def main():
        if who == "native":
            queries = [height(lf.collect_async(engine="in-memory")) for lf in sorts]
            return await asyncio.gather(*queries)
        share = "60%" if group else 0.6 * limit
        # On threads all of them would run at once, but for the limit.
        options = {"max_running": 48} if who == "threads" else {}
        async with pa.Collector(
            engine="in-memory", executor=who, max_memory=share, **options
        ) as collector:
            return await asyncio.gather(*[height(collector.collect_async(lf)) for lf in sorts])

    print(sum(asyncio.run(main())))
"""


@pytest.fixture
def group():
    """Return the file of a cgroup with that limit; an empty text where none can be made."""
    for root in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")):
        folder = root / NAME
        limits = ("memory.max", "memory.limit_in_bytes")
        with suppress(OSError):
            folder.mkdir()
            for limit in limits:
                if (folder / limit).exists():
                    (folder / limit).write_text(f"{MEGABYTES}M")
                    yield str(folder / "cgroup.procs")
                    _remove(folder)
                    return
            folder.rmdir()
    yield ""


def _remove(folder):
    end = monotonic() + 20
    while folder.exists() and monotonic() < end:
        with suppress(OSError):  # a process of it has not ended yet
            folder.rmdir()
        sleep(0.05)


def run(who, group):
    limit = str(MEGABYTES << 20)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, who, group, limit],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_limit_kills_polars_own_functions(group):
    ended = run("native", group)
    assert ended.returncode in ({-signal.SIGKILL} if group else {-signal.SIGABRT, -signal.SIGSEGV})


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_limit_kills_no_collector_with_a_share_of_it(group, executor):
    ended = run(executor, group)
    assert (ended.returncode, ended.stdout) == (0, "48000000\n"), ended.stderr
