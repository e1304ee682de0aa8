from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
patch = "import gevent.monkey; gevent.monkey.patch_all()"
if sys.argv[1] == "before":
    exec(patch)
from polars_async._runtime import unpatched
if sys.argv[1] == "after":
    exec(patch)
lock = unpatched.allocate_lock()
told = unpatched.SimpleQueue()
lock.acquire()
unpatched.start_new_thread(lambda: (told.put(1), lock.release()), ())
assert told.get() == 1
lock.acquire()
print(*(type(each).__module__ for each in (lock, told)), unpatched.start_new_thread.__module__)
"""


@pytest.mark.parametrize("patched", ["before", "after", "never"])
def test_names_are_the_interpreters_own_under_gevents_patch(patched):
    command = [sys.executable, "-c", SCRIPT, patched]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)
    assert run.stdout.split() == ["_thread", "_queue", "_thread"]


def test_importing_it_does_not_import_gevent():
    script = (
        "import sys; from polars_async._runtime import unpatched; "
        "assert 'gevent' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=150)
