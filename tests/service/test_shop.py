"""What the suite of a service looks like: it uses public names alone, and needs no GPU."""

from __future__ import annotations

import asyncio

import polars as pl
import pytest
from shop import Shop

import polars_async as pa

SALES = pl.LazyFrame({"shop": ["a", "b", "a", "c"], "sum": [3, 4, 5, 1]})
BEST = [("a", 8), ("b", 4)]


def ask(question, sales=SALES, **options):
    """Open a shop, and give what it answers."""

    async def run():
        async with Shop(sales, **options) as shop:
            return await question(shop)

    return asyncio.run(run())


async def best(shop):
    return await shop.best(2), shop.health()


@pytest.mark.gpu_host
def test_questions_are_answered_on_the_gpu(engine_log):
    answer, health = ask(best)
    assert (answer, health.on_gpu, health.complaint) == (BEST, True, None)
    assert ask(lambda shop: shop.compared("a", "c")) == {"a": 8, "c": 1}
    assert ask(lambda shop: shop.export()).count(b"\n") == 4
    engine_log.assert_ran_on("gpu")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("unsupported", pa.Reason.UNSUPPORTED_QUERY),
        ("translation", pa.Reason.TRANSLATION_FAILED),
        ("oom", pa.Reason.OUT_OF_MEMORY),
        ("cuda", pa.Reason.CUDA_ERROR),
        ("import", pa.Reason.CUDF_BROKEN),
    ],
)
def test_answers_are_right_when_the_gpu_fails(gpu_host, engine_log, fault, reason):
    gpu_host.fail = fault
    answer, health = ask(best)
    assert (answer, health.on_gpu) == (BEST, False)
    assert "so the in-memory engine runs" in health.complaint
    engine_log.assert_ran_on("in-memory", because=reason)


@pytest.mark.gpu_host(fail={2: "oom"})
def test_health_follows_the_last_query(gpu_host, engine_log):
    async def three_times(shop):
        return [(await best(shop))[1].on_gpu for _ in range(3)]

    assert ask(three_times) == [True, False, True]
    assert gpu_host.queries == 3
    assert [each.name for each in engine_log] == ["gpu", "in-memory", "gpu"]


@pytest.mark.gpu_host(fail="cuda")
def test_gpu_that_keeps_failing_is_left_alone(gpu_host, engine_log):
    async def often(shop):
        return [(await best(shop))[0] for _ in range(6)]

    with pytest.warns(pa.EngineDowngradeWarning, match="it keeps failing, and is in a cooldown"):
        assert ask(often) == [BEST] * 6
    assert gpu_host.queries < 6
    engine_log.assert_ran_on("in-memory")
    assert engine_log[-1].reason == pa.Reason.GPU_COOLDOWN


@pytest.mark.usefixtures("no_gpu_host")
def test_service_runs_without_a_gpu_and_says_so(engine_log):
    with pytest.warns(pa.EngineDowngradeWarning, match="no GPU is usable here"):
        answer, health = ask(best)
    assert (answer, health.on_gpu) == (BEST, False)
    assert "install the NVIDIA driver" in health.complaint
    engine_log.assert_ran_on("in-memory", because="no_library")


@pytest.mark.gpu_host(driver=(11, 8))
def test_old_driver_is_named(engine_log):
    with pytest.warns(pa.EngineDowngradeWarning):
        _, health = ask(best)
    assert "driver" in health.complaint
    engine_log.assert_ran_on("in-memory", because=pa.Reason.DRIVER_TOO_OLD)


@pytest.mark.usefixtures("no_gpu_host")
def test_service_that_needs_a_gpu_does_not_start_without(engine_log):
    with pytest.raises(pa.EngineUnavailableError, match="install the NVIDIA driver"):
        ask(best, gpu="require")
    assert not engine_log


@pytest.mark.gpu_host
def test_error_of_a_query_is_no_fault_of_the_gpu(engine_log):
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        ask(best, SALES.rename({"sum": "total"}))
    engine_log.assert_ran_on("gpu")


@pytest.mark.gpu_host(fail="slow")
def test_others_are_answered_while_the_gpu_takes_its_time():
    async def meanwhile(shop):
        slow = asyncio.create_task(shop.best(1))
        await asyncio.sleep(0)  # it has asked
        return slow.done(), await slow

    assert ask(meanwhile) == (False, BEST[:1])
