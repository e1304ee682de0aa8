"""Frames that a process has shared are its own still when it has become that of another user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NOBODY = 65534


def nobody_can_run_python():
    command = [sys.executable, "-c", "import polars"]
    try:
        return subprocess.run(command, user=NOBODY, group=NOBODY, check=False).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="files in memory need Linux"),
    pytest.mark.skipif(
        sys.platform == "linux" and os.geteuid() != 0,
        reason="root alone can become another user, or change its root",
    ),
]

BEFORE = """
import os, pickle, sys, warnings
import asyncio, cloudpickle, pyarrow.ipc  # nobody may not read them later
import polars as pl, polars_async as pa

warnings.simplefilter("ignore")
large = pl.LazyFrame({"n": [0]}).select(k=pl.int_range(0, 100_000))
one = pl.LazyFrame({"a": [1]})
before = pa.share(large.collect())
collectors = {
    "threads": pa.Collector(),
    "processes": pa.Collector(executor="processes", max_running=1),
}

def total(lf, place="processes"):
    return collectors[place].collect_async(lf).result(30).sum().item()

def counted(frame):
    return frame * 0 + before.collect().height

def check():
    after = pa.share(large.collect())
    found = {total(lf, place) for place in collectors for lf in (before, after)}
    found |= {total(large), total(pa.share(pickle.loads(pickle.dumps(before)).collect()))}
    found |= {before.collect().sum().item(), after.collect().sum().item()}
    print(*found)
    print(len(pickle.dumps(before)) > 800_000)  # since no other process could open the file
    in_functions = one.select(pl.col("a").map_batches(counted, return_dtype=pl.Int64))
    print(total(in_functions), total(one.map_batches(counted)))
"""

END = """
for collector in collectors.values():
    collector.close()
sys.stdout.flush()
os._exit(0)
"""

FOUND = ["4999950000", "True", "100000", "100000"]

SEES = {
    "another user": f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})",
    "another user for a while": f"os.seteuid({NOBODY})",
    "no /proc": "os.chroot(sys.argv[1]); os.chdir('/')",
}


@pytest.mark.parametrize("change", SEES)
def test_shared_frames_and_results_are_had_after_a_change(run_script, tmp_path, change):
    warm = "for place in collectors: total(before, place)\n"
    script = "\n".join((BEFORE, warm, SEES[change], "check()", END))
    assert run_script(script, str(tmp_path)) == FOUND


def test_workers_that_start_after_a_change_of_the_user_have_shared_frames(run_script, tmp_path):
    if not nobody_can_run_python():
        pytest.skip("nobody may not run this Python, which is in the folder of another user")
    script = "\n".join((BEFORE, SEES["another user"], "check()", END))
    assert run_script(script, str(tmp_path)) == FOUND
