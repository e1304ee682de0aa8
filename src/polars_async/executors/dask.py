"""The executor of a dask cluster, after a check that its workers can run queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async.errors import PolarsAsyncError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Executor

    from distributed import Client

_RELEASE_SERIES: Final = pl.__version__.partition(".")[0]


def dask_executor(
    client: Client,
    *,
    resources: Mapping[str, float] | None = None,
    workers: str | Iterable[str] | None = None,
    allow_other_workers: bool = False,
    retries: int | None = None,
) -> Executor:
    """
    Return the executor of a dask cluster, for ``Collector(executor=...)``.

    It is that of ``client.get_executor``, with ``pure=False``: else equal queries would share one
    result. The present workers are asked whether they can run queries, which blocks for a moment.

    A query whose worker dies runs again on another one, from its start, and what it has written
    until then stays written. A query that has killed four workers raises `WorkerDiedError`; the
    number is one more than ``distributed.scheduler.allowed-failures`` of the scheduler's
    configuration. A query that raises does not run again, whatever ``retries`` says.

    Parameters
    ----------
    client
        The client, which has to be synchronous.
    resources
        The resources that a query takes of its worker, such as ``{"GPU": 1}``: only workers that
        were started with as much run queries, and only as many at once as these suffice for.
    workers
        The addresses or names of the workers that may run queries; None for all.
    allow_other_workers
        Whether others may run them, too, where these are busy.
    retries
        As ``client.submit`` has it; see above.

    Returns
    -------
    concurrent.futures.Executor
        It belongs to the client: close that when the collector is closed.

    Raises
    ------
    ValueError
        The client is asynchronous, or no worker has the `resources`: queries would wait for ever.
    PolarsAsyncError
        A worker cannot run queries: it has another release series of Polars, or no polars-async.
    """
    if client.asynchronous:
        raise ValueError("dask_executor needs a synchronous client: Client(asynchronous=False)")
    offers: dict[str, Mapping[str, float]] = {}
    on_workers: Callable[..., Any] = client.run  # whose type allows for a coroutine, too
    answers: dict[str, Any] = on_workers(_version_and_resources, on_error="return")
    for address, answer in answers.items():
        if isinstance(answer, BaseException):
            raise PolarsAsyncError(
                f"the dask worker {address} cannot run queries ({describe(answer)}): "
                "install polars-async there"
            ) from answer
        version, offers[address] = answer
        if version.partition(".")[0] != _RELEASE_SERIES:
            raise PolarsAsyncError(
                f"the dask worker {address} has Polars {version}, and cannot read the queries of "
                f"this process, which has Polars {pl.__version__}: install the same release "
                "everywhere"
            )
    if resources and not any(_suffices(offer, resources) for offer in offers.values()):
        raise ValueError(
            f"no worker has resources={dict(resources)!r}, so that queries would wait for ever: "
            f"{_describe(offers)}. Start workers with them, as by dask worker --resources 'GPU=1'"
        )
    make: Callable[..., Executor] = client.get_executor
    return make(
        pure=False,
        resources=resources,
        workers=workers,
        allow_other_workers=allow_other_workers,
        retries=retries,
    )


def _version_and_resources(dask_worker: Any) -> tuple[str, dict[str, float]]:
    """Return the release of Polars and the resources of the dask worker that this runs on."""
    return pl.__version__, dict(dask_worker.state.total_resources)


def _suffices(offer: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(offer.get(name, 0) >= amount for name, amount in wanted.items())


def _describe(offers: Mapping[str, Mapping[str, float]]) -> str:
    if not offers:
        return "there is no worker yet, see client.wait_for_workers"
    return ", ".join(f"{address} has {dict(offer)!r}" for address, offer in offers.items())
