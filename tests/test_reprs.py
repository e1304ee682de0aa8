"""What users print, and look at in a notebook: each is one readable line."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from places import TINY

import polars_async as pa
from polars_async import Collector
from polars_async.testing import simulate_gpu

LINES = "a message\nof two lines"


def test_collector_and_handles_tell_their_state(blocked):
    with Collector(max_running=1) as collector:
        assert repr(collector) == "<Collector on threads: 0 running, 0 waiting>"
        handle = collector.collect_async(blocked.lf, label="sales", engine="streaming")
        assert blocked.started.wait(30)
        number = handle._query.id
        told = f"query {number} 'sales', running, streaming engine"
        assert repr(handle) == f"<QueryHandle: {told}>"
        assert repr(collector) == "<Collector on threads: 1 running, 0 waiting>"
        background = collector.collect_background(TINY, engine="in-memory")
        told = f"query {number + 1}, waiting, in-memory engine"
        assert repr(background) == f"<BackgroundQuery: {told}>"
        blocked.gate.set()
    assert repr(collector) == "<Collector on threads: 0 running, 0 waiting, closed>"
    assert repr(handle).startswith(f"<QueryHandle: query {number} 'sales', completed")


def test_streams_tell_their_state(blocked):
    with Collector(max_running=1) as collector:
        batches = collector.collect_batches_async(blocked.lf, label="export")
        assert blocked.started.wait(30)
        number = batches._query.id
        told = f"query {number} 'export', running, streaming engine"
        assert repr(batches) == f"<ResultStream: batches of {told}>"
        results = collector.as_completed([TINY, TINY])
        assert repr(results) == "<ResultStream: 2 results to come>"
        blocked.gate.set()


def test_resolution_reads_as_its_message():
    resolution = pa.resolve_engine("streaming")
    assert str(resolution) == "the streaming engine runs: asked for by the engine argument"
    assert repr(resolution) == f"<Resolution: {resolution}>"
    assert str(replace(resolution, message=LINES)) == "a message of two lines"


def test_statuses_read_as_one_line():
    with simulate_gpu(2, memory=80 * 2**30):
        status = pa.gpu_status()
        assert str(status) == f"usable: {status.message}"
        assert repr(status) == f"<GpuStatus: {status}>"
        first, second = status.devices
        assert str(first) == f"GPU 0 (Simulated GPU, 80 GiB, selected): {first.message}"
        assert repr(second) == f"<GpuDevice: GPU 1 (Simulated GPU, 80 GiB): {second.message}>"
    with simulate_gpu(0, driver=None):
        status = pa.gpu_status()
        assert str(status) == f"not usable: {status.message}"
    unknown = pa.GpuDevice(index=3, usable=False, message=LINES)
    assert str(unknown) == "GPU 3 (name unknown): a message of two lines"


def test_support_reads_as_one_line():
    support = pa.GpuSupport(answer=pa.Support.NO, message=LINES)
    assert str(support) == "no: a message of two lines"
    assert repr(support) == "<GpuSupport: no: a message of two lines>"


@pytest.mark.parametrize("gpu", ["downgrade", "offload"])
def test_line_of_a_real_decision_is_one(gpu):
    with simulate_gpu(3, memory=2**34), Collector(gpu=gpu) as collector:
        with pytest.warns(pa.EngineDowngradeWarning):
            handle = collector.collect_async(TINY, engine=pl.GPUEngine(device=9))
        assert "\n" not in repr(handle.resolution)
        assert "\n" not in f"{pa.gpu_status()!r}{pa.gpu_status().devices!r}"
