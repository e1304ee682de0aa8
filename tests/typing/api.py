"""What users write, to be checked by mypy and pyright; nothing here is ever run."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from signal import Signals
from typing import TYPE_CHECKING, Any, assert_type

import polars as pl

import polars_async as pa
from polars_async.instrumentation.opentelemetry import PolarsAsyncInstrumentor
from polars_async.instrumentation.prometheus import register, unregister
from polars_async.starlette import unless_disconnected
from polars_async.testing import simulate_gpu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Iterator

    import fastapi
    import litestar
    import starlette.requests
    from distributed import Client
    from prometheus_client import CollectorRegistry

    from polars_async.pytest_plugin import EngineLog
    from polars_async.testing import SimulatedGpu

lf = pl.LazyFrame({"a": [1, 2]})


# The drop-in functions


async def awaits() -> None:
    assert_type(pa.collect_async(lf), pa.QueryHandle[pl.DataFrame])
    assert_type(await pa.collect_async(lf), pl.DataFrame)
    assert_type(await pa.collect_async(lf, engine="gpu", gevent=False), pl.DataFrame)
    assert_type(await pa.collect_async(lf, engine=pl.GPUEngine(raise_on_fail=True)), pl.DataFrame)
    assert_type(await pa.collect_async(lf, optimizations=pl.QueryOptFlags.none()), pl.DataFrame)

    assert_type(pa.collect_all_async([lf, lf]), pa.QueryHandle[list[pl.DataFrame]])
    assert_type(await pa.collect_all_async((lf, lf), engine="streaming"), list[pl.DataFrame])
    assert_type(await pa.collect_all_async(each for each in (lf, lf)), list[pl.DataFrame])


def compares() -> None:
    found = pa.compare_engines(lf)
    assert_type(found, pa.Comparison)
    assert_type(pa.compare_engines({"a": lf, "b": lf.sum, "c": lambda: lf}, runs=3), pa.Comparison)
    pa.compare_engines(lf, engines=["streaming", pl.GPUEngine()], progress=print)
    assert_type(found.results, tuple[pa.EngineRun, ...])
    assert_type(found.results[0].median, float | None)
    assert_type(found.gpu_support["query"], pa.GpuSupport)


async def uses_the_tools_of_asyncio() -> None:
    one, all_ = pa.collect_async(lf), pa.collect_all_async([lf])

    assert_type(await asyncio.gather(one, all_), tuple[pl.DataFrame, list[pl.DataFrame]])
    assert_type(await asyncio.wait_for(one, timeout=1.5), pl.DataFrame)
    assert_type(await asyncio.shield(asyncio.ensure_future(one)), pl.DataFrame)
    assert_type(await total(one), int)


async def makes_tasks_of_handles() -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(pa.collect_async(lf))
    assert_type(task.result(), pl.DataFrame)
    assert_type(asyncio.run(pa.collect_all_async([lf])), list[pl.DataFrame])


async def total(frame: Awaitable[pl.DataFrame]) -> int:
    return (await frame).height


async def takes_options() -> None:
    tags: pa.Tags = {"tenant": "a", "page": 3, "share": 0.5, "paid": True}
    one = pa.collect_async(lf, timeout=1.5, priority=-3, label="name", tags=tags)
    assert_type(one, pa.QueryHandle[pl.DataFrame])
    assert_type(one.tags, pa.Tags)
    pa.collect_all_async([lf], timeout=1, priority=1, label="name", tags={"tenant": "a"})
    async for number, frame in pa.as_completed([lf], timeout=1, tags=tags):
        assert_type((number, frame), tuple[int, pl.DataFrame])
    async for batch in pa.collect_batches_async(lf, chunk_size=10, label="name"):
        assert_type(batch, pl.DataFrame)
    assert_type(await pa.sink_async(lf.sink_csv("file", lazy=True), priority=1), None)
    assert_type(await pa.collect_schema_async(lf, gevent=False), pl.Schema)


def named(name: str, width: int = 3) -> bytes:
    return name.ljust(width).encode()


async def runs_functions(collector: pa.Collector) -> None:
    assert_type(pa.run(named, "a"), pa.QueryHandle[bytes])
    assert_type(await pa.run(named, "a", 5, timeout=1.5, label="name"), bytes)
    assert_type(await collector.run(named, "a", priority=1, tags={"tenant": "a"}), bytes)
    assert_type(await collector.run(pl.read_parquet, "a.parquet"), pl.DataFrame)
    assert_type(await pa.run(partial(pl.read_csv, "a.csv", has_header=False)), pl.DataFrame)
    assert_type(pa.run(lf.collect().write_csv, "a.csv").result(), None)
    pa.run(named, 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pa.run("named")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def without_a_loop(collector: pa.Collector) -> None:
    for batch in collector.collect_batches_async(lf):
        assert_type(batch, pl.DataFrame)
    with pa.as_completed([lf]) as results:
        assert_type(list(results), list[tuple[int, pl.DataFrame]])


def greenlets() -> None:
    one = pa.collect_async(lf, gevent=True)
    assert_type(one, pa.QueryHandle[pl.DataFrame])
    assert_type(one.get(), pl.DataFrame)
    assert_type(one.get(block=False), pl.DataFrame)
    assert_type(one.get(True, 1.5), pl.DataFrame)

    several = pa.collect_all_async([lf], gevent=True, engine="streaming")
    assert_type(several, pa.QueryHandle[list[pl.DataFrame]])
    assert_type(several.get(timeout=None), list[pl.DataFrame])


# The handle


def plain_threads(handle: pa.QueryHandle[pl.DataFrame]) -> None:
    assert_type(handle.result(), pl.DataFrame)
    assert_type(handle.result(timeout=2), pl.DataFrame)
    assert_type(handle.done(), bool)
    assert_type(handle.cancel(), bool)
    assert_type(handle.resolution, pa.Resolution)


# The collector


def configured() -> pa.Collector:
    pa.Collector()
    pa.Collector(engine=pl.StreamingEngine(), default_engine="streaming", max_running=None)
    pa.Collector(executor="processes", max_memory=2**30)
    pa.Collector(executor="auto")
    pa.Collector(executor=ThreadPoolExecutor())
    return pa.Collector(engine="auto", gpu="offload", default_engine="in-memory", max_running=2)


def passes_on(
    engine: pa.EngineRequest,
    name: pa.EngineName,
    gpu: pa.GpuPolicy,
    path: pa.QueryPath,
    executor: pa.ExecutorRequest,
) -> pa.Collector:
    pa.collect_async(lf, engine=name)
    pa.resolve_engine(engine, gpu=gpu, path=path, default_engine=name)
    pa.configure(engine=name, executor="processes", max_memory="4 GiB")
    return pa.Collector(engine=engine, gpu=gpu, executor=executor, max_memory=4e9)


def shares(frame: pl.DataFrame) -> None:
    assert_type(pa.share(frame), pl.LazyFrame)
    pa.share(lf)  # type: ignore[arg-type]


async def stops() -> None:
    collector = pa.configure(executor="processes", max_memory=10**9)
    await collector.aclose(cancel_running=True)
    collector.close(cancel_running=True)
    try:
        await collector.collect_async(lf)
    except pa.WorkerDiedError as error:
        assert_type(error.exitcode, int | None)
        assert_type(error.signal, Signals | None)
        assert_type(error.plan, str | None)
    except pa.QueryMemoryError as error:
        assert_type(error.max_memory, int)


async def collects(collector: pa.Collector, frames: Iterable[pl.LazyFrame]) -> None:
    assert_type(await collector.collect_async(lf), pl.DataFrame)
    assert_type(await collector.collect_async(lf, engine=None), pl.DataFrame)
    assert_type(collector.collect_async(lf, gevent=True), pa.QueryHandle[pl.DataFrame])
    assert_type(await collector.collect_all_async(frames, engine="gpu"), list[pl.DataFrame])
    assert_type(
        collector.collect_all_async(frames, gevent=True), pa.QueryHandle[list[pl.DataFrame]]
    )
    assert_type(collector.resolve_engine("gpu", path="background"), pa.Resolution)


def in_the_background(collector: pa.Collector) -> None:
    query = collector.collect_background(lf)
    assert_type(query, pa.BackgroundQuery[pl.DataFrame])
    assert_type(query.fetch(), pl.DataFrame | None)
    assert_type(query.fetch_blocking(), pl.DataFrame)
    query.cancel()


def closes() -> None:
    with pa.Collector(max_running=1) as collector:
        assert_type(collector, pa.Collector)
    collector.close()
    collector.close(wait=False, cancel_waiting=False)


# Executors


def runs_elsewhere(client: Client) -> None:
    executor = pa.dask_executor(client, resources={"GPU": 1}, retries=0, workers=["alice"])
    pa.dask_executor(client, wokers=["alice"])  # type: ignore[call-arg]
    assert_type(executor, Executor)
    pa.Collector(executor=executor)
    pa.Collector(executor="processes")


# The plug-in


async def plugs_in(collector: pa.Collector) -> None:
    engine = pa.AsyncEngine()
    assert_type(pa.AsyncEngine(collector, bound_sync=True).collector, pa.Collector)

    assert_type(lf.collect(engine=engine), pl.DataFrame)
    assert_type(await lf.collect_async(engine=engine), pl.DataFrame)
    assert_type(pl.collect_all([lf], engine=engine), list[pl.DataFrame])
    assert_type(await pl.collect_all_async([lf], engine=engine), list[pl.DataFrame])
    batches: Iterator[pl.DataFrame] = lf.collect_batches(engine=engine)
    assert_type(next(batches), pl.DataFrame)

    pl.Config.set_engine_affinity(engine)
    with pl.Config(engine_affinity=engine):
        assert_type(lf.collect(), pl.DataFrame)


def any_engine(engine: pl.Engine) -> None:
    any_engine(pa.AsyncEngine())
    pa.collect_async(lf, engine=engine)
    pa.Collector(engine=engine, default_engine=engine)
    pa.resolve_engine(engine)


# Resolution


def decides() -> str:
    resolution = pa.resolve_engine(engine="gpu", path="sync", gpu="require")
    assert_type(resolution, pa.Resolution)
    assert_type(resolution.requested, str | pl.Engine)
    assert_type(resolution.engine, pl.Engine)
    assert_type(resolution.name, str)
    assert_type(resolution.downgraded, bool)
    assert_type(resolution.reason, pa.Reason | None)
    assert_type(resolution.message, str)
    assert_type(resolution.gpu, pa.GpuStatus | None)
    assert_type(resolution.fell_back, bool)
    assert_type(resolution.cause, Exception | None)
    match resolution.source:
        case "argument" | "config" | "environment" | "default" | "adaptive":
            return explain(resolution.reason)


def explain(reason: pa.Reason | None) -> str:
    if reason is None:
        return "as asked"
    if reason in {pa.Reason.ASYNC_PATH, pa.Reason.BACKGROUND_PATH}:
        return "offload it"
    text: str = reason  # each is its own short name
    return text


def supports() -> None:
    support = pa.gpu_support(lf, engine=pl.GPUEngine(), optimizations=pl.QueryOptFlags.none())
    assert_type(support, pa.GpuSupport)
    assert_type(support.answer, pa.Support)
    assert_type(support.operations, tuple[str, ...])
    assert_type(support.reason, pa.Reason | None)
    assert_type(support.message, str)
    if support.answer == "yes" or support.answer is pa.Support.UNKNOWN:
        pa.collect_async(lf, engine="gpu")


def gpus() -> None:
    status = pa.gpu_status(refresh=True)
    assert_type(status, pa.GpuStatus)
    assert_type(status.usable, bool)
    assert_type(status.reason, pa.Reason | None)
    assert_type(status.message, str)
    assert_type(status.devices, tuple[pa.GpuDevice, ...])
    assert_type(status.driver_version, str | None)
    assert_type(status.cuda_version, tuple[int, int] | None)
    assert_type(status.cudf_polars_version, str | None)
    for device in status.devices:
        assert_type(device.memory_free, int | None)
        assert_type(device.compute_capability, tuple[int, int] | None)


# The plug-in for pytest


def tests(engine_log: EngineLog, gpu_host: SimulatedGpu) -> None:
    gpu_host.fail = "oom"
    assert_type(gpu_host.queries, int)
    engine_log.assert_ran_on("in-memory", because=pa.Reason.OUT_OF_MEMORY)
    engine_log.assert_ran_on("in-memory", "out_of_gpu_memory")
    assert_type(engine_log[0], pa.Resolution)
    assert_type([each.name for each in engine_log], list[str])


# Errors


async def catches() -> None:
    try:
        await pa.collect_async(lf, engine="gpu")
    except (pa.EngineUnavailableError, pa.CollectorClosedError, pa.ForkedProcessError) as error:
        base: pa.PolarsAsyncError = error
        raise base from None
    warning: type[UserWarning] = pa.EngineDowngradeWarning
    raise warning


# Mistakes: each ignore has to be needed, or else mypy says so


def mistakes(frame: pl.DataFrame, collector: pa.Collector) -> None:
    pa.collect_async(frame)  # type: ignore[arg-type]
    pa.collect_async(lf, "gpu")  # type: ignore[call-arg, arg-type]
    pa.collect_async(lf, engine=None)  # type: ignore[arg-type]
    pa.collect_all_async(lf)  # type: ignore[arg-type]
    pa.compare_engines([lf])  # type: ignore[arg-type]
    pa.resolve_engine(path="eager")  # type: ignore[arg-type]
    pa.resolve_engine(gpu="always")  # type: ignore[arg-type]
    pa.Collector("gpu")  # type: ignore[call-arg]
    pa.Collector(gpu="always")  # type: ignore[arg-type]
    pa.Collector(executor="fibres")  # type: ignore[arg-type]
    pa.AsyncEngine("gpu")  # type: ignore[arg-type]
    pa.resolve_engine().name = "gpu"  # type: ignore[misc]
    pa.gpu_status().usable = True  # type: ignore[misc]
    collector.engine = "gpu"  # type: ignore[misc]
    pa.collect_async(lf, engine="stream")  # type: ignore[arg-type]
    pa.collect_all_async([lf], engine="GPU")  # type: ignore[arg-type]
    pa.as_completed([lf], engine="stream")  # type: ignore[arg-type]
    pa.collect_batches_async(lf, engine="stream")  # type: ignore[arg-type]
    pa.sink_async(lf, engine="stream")  # type: ignore[arg-type]
    collector.collect_async(lf, engine="stream")  # type: ignore[arg-type]
    pa.Collector(engine="stream")  # type: ignore[arg-type]
    pa.Collector(default_engine="stream")  # type: ignore[arg-type]
    pa.configure(engine="stream")  # type: ignore[arg-type]
    pa.resolve_engine("stream")  # type: ignore[arg-type]
    pa.gpu_support(lf, engine="streaming")  # type: ignore[arg-type]
    pa.collect_async(lf, tags={"ids": [1, 2]})  # type: ignore[dict-item]
    pa.collect_async(lf, tags="tenant")  # type: ignore[arg-type]


async def under_load(collector: pa.Collector) -> None:
    handle = collector.collect_async(lf, timeout=1.5, priority=-3, label="name", engine="streaming")
    assert_type(await handle, pl.DataFrame)
    assert_type(handle.label, str | None)
    async for number, frame in collector.as_completed([lf], timeout=1):
        assert_type(number, int)
        assert_type(frame, pl.DataFrame)
    async with collector.collect_batches_async(lf, chunk_size=10) as batches:
        async for batch in batches:
            assert_type(batch, pl.DataFrame)
    assert_type(await collector.sink_async(lf.sink_csv("file", lazy=True)), None)
    assert_type(await collector.collect_schema_async(lf), pl.Schema)
    background = collector.collect_all_background([lf], label="name")
    assert_type(background.fetch(), list[pl.DataFrame] | None)
    assert_type(collector.stats(), dict[str, Any])
    assert_type(collector.COUNTERS, frozenset[str])
    assert_type(pa.__version__, str)
    async with pa.Collector(max_running=1, max_waiting=2, on_event=events.append) as other:
        assert_type(other, pa.Collector)
    assert_type(pa.configure(max_waiting=2), pa.Collector)
    assert_type(events[0].error, BaseException | None)
    assert_type(events[0].tags, pa.Tags)


async def serves(
    of_starlette: starlette.requests.Request,
    of_fastapi: fastapi.Request,
    of_litestar: litestar.Request[Any, Any, Any],
) -> None:
    assert_type(await unless_disconnected(of_starlette, pa.collect_async(lf)), pl.DataFrame)
    assert_type(
        await unless_disconnected(of_fastapi, pa.collect_all_async([lf])), list[pl.DataFrame]
    )
    assert_type(await unless_disconnected(of_litestar, pa.collect_async(lf)), pl.DataFrame)


events: list[pa.QueryEvent] = []


def simulated() -> None:
    with simulate_gpu(2, memory=2**30, driver=None, fail={2: "oom"}) as gpu:
        assert_type(gpu.queries, int)
        gpu.fail = "cuda"
        gpu.fail = "nonsense"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]

    @simulate_gpu(fail="slow")
    def slow() -> int:
        return 1

    assert_type(slow(), int)


# Instruments


def watches(collector: pa.Collector, registry: CollectorRegistry) -> None:
    register(collector)
    register(collector, registry, name="exports", by_label=True)
    unregister(collector, registry)
    PolarsAsyncInstrumentor().instrument()
    PolarsAsyncInstrumentor().instrument(in_workers=lambda: None)
    PolarsAsyncInstrumentor().instrument(in_workers="name")  # type: ignore[arg-type]
    PolarsAsyncInstrumentor().uninstrument()


def tells_what_it_was(event: pa.QueryEvent) -> None:
    assert_type(event.operation, str)
    assert_type(event.executor, str)
