"""Worker processes that go from one test to the next: each takes a fifth of a second to start."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress

from polars_async.executors.initializer import current
from polars_async.executors.processes import pool
from polars_async.executors.processes.process import WorkerProcess, shut_down

MOST = 4
"""Idle ones of a kind, as many as hardly a test has at once."""


class Spares:
    """
    The workers that pools in tests would start, and those that they would let go.

    Any thread may take one and give one back: the lists are only popped and appended to.
    """

    def __init__(self):
        self._idle = defaultdict(list)

    def lend_to_pools(self, monkeypatch):
        monkeypatch.setattr(pool, "WorkerProcess", self._start)
        monkeypatch.setattr(pool, "shut_down", self._keep)

    def end(self):
        while self._idle:
            for worker in self._idle.popitem()[1]:
                worker.kill()

    def _start(self, env):
        idle = self._idle[frozenset(env.items())]
        with suppress(IndexError):  # another thread may have taken the last one
            while current() is None:
                worker = idle.pop()
                if worker.is_alive():
                    return worker
                worker.kill()
        worker = WorkerProcess(env)
        worker.idle = idle
        return worker

    def _keep(self, workers):
        for worker in workers:
            is_as_new = worker.is_ready and not worker.is_exiting and worker.initializer is None
            if is_as_new and len(worker.idle) < MOST:
                worker.idle.append(worker)
            else:
                shut_down([worker])
