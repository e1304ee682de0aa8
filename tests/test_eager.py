"""Operations on DataFrames, which Polars runs on the CPU, where the GPU engine is asked for."""

from __future__ import annotations

import io

import polars as pl
import pytest
from conftest import TINY

from polars_async import AsyncEngine, Collector

STRICT = pl.GPUEngine(raise_on_fail=True)

EAGER = {
    "collect": lambda here, flags: here.collect(TINY, optimizations=flags),
    "collect_all": lambda here, flags: pl.collect_all([TINY], engine=here, optimizations=flags),
    "execute": lambda here, flags: here.execute(TINY, optimizations=flags),
    "batches": lambda here, flags: list(here.collect_batches(TINY, optimizations=flags)),
    "sink": lambda here, flags: TINY.sink_csv(io.BytesIO(), engine=here, optimizations=flags),
    "background": lambda here, flags: here.collect(
        TINY, background=True, optimizations=flags
    ).fetch_blocking(),
    "async": lambda here, flags: here.collect_async(TINY, optimizations=flags).result(30),
    "all async": lambda here, flags: here.collect_all_async([TINY], optimizations=flags).result(30),
}


@pytest.mark.parametrize("host", ["GPU", "no GPU"])
@pytest.mark.parametrize("engine", ["gpu", STRICT], ids=["gpu", "strict"])
@pytest.mark.parametrize("policy", ["downgrade", "offload", "require"])
@pytest.mark.parametrize("way", EAGER)
def test_operation_on_a_frame_is_left_to_the_cpu_as_by_polars(
    way, policy, engine, host, request, engine_log
):
    gpu = request.getfixturevalue("gpu_host") if host == "GPU" else None
    if gpu is None:
        request.getfixturevalue("no_gpu_host")
    else:
        gpu.fail = "oom"

    with Collector(engine=engine, gpu=policy) as collector:
        EAGER[way](AsyncEngine(collector), pl.QueryOptFlags._eager())

    engine_log.assert_ran_on("in-memory")
    assert {(each.downgraded, each.reason) for each in engine_log} == {(False, None)}
    assert gpu is None or gpu.queries == 0
