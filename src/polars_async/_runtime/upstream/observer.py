"""
Polars' query observer, which is told of each monitored query, and may count what it reads.

It is meant for Polars Cloud: before a monitored query, Polars imports ``polars_cloud``, and calls
its ``QueryCloudObserver`` for an object, which it keeps for this query, and for those of other
threads that come in between. So an observer here serves any number of queries at once. It tells
which is which by the thread: that of the call to ``collect`` is told of the start, the plan and the
failure.

Others use the same name: polars-cloud itself, and polars-telemetry. Their factory is wrapped where
it is found, and is called for the queries that are monitored for their sake. Where there is none, a
module of that name is there just while Polars looks for it.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import polars as pl

from polars_async._runtime.unpatched import RLock, local

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CountingEngine", "counting_engine", "observed"]

T = TypeVar("T")

_log: Final = logging.getLogger("polars_async")

_MODULE: Final = "polars_cloud"
_FACTORY: Final = "QueryCloudObserver"
_MOVED: Final = (AttributeError, ImportError, LookupError, TypeError, ValueError, RuntimeError)
"""What a use of the hook raises where it has moved."""

_lock: Final = RLock()
"""Held while the module is put in place and removed."""
_complained: Final[set[str]] = set()


class Observer(Protocol):
    """What wants to know of one query."""

    def planned(self, handle: Any, plan: bytes) -> None:
        """
        Note that the query was planned, and begins to run; called on the query's own thread.

        ``handle.snapshot_query_metrics()`` tells, at any time from now on, what the operators of
        the physical `plan` have done. Both are MessagePack.
        """


class _Here(local):
    observer: Observer | None = None
    """Wants to know of the next query of this thread that is on a `CountingEngine`."""
    armed: Observer | None = None
    """The same when that query is about to begin."""
    is_shared: bool = False
    """Whether that query is monitored for others, too."""


_here: Final = _Here()


def observed(observer: Observer, run: Callable[[], T]) -> T:
    """Call `run`, which runs a query on a `CountingEngine`, and have `observer` told of it."""
    outer, _here.observer = _here.observer, observer
    try:
        return run()
    finally:
        _here.observer, _here.armed = outer, None
        del run  # the traceback of an error holds this frame


class CountingEngine(pl.StreamingEngine):
    """The streaming engine for a query that is observed."""

    def _with_monitoring(self, optimizations: pl.QueryOptFlags) -> pl.QueryOptFlags:
        """Return the optimizations, which say whether a query is monitored; called before it."""
        if _here.observer is not None:
            _wrap_factory()  # so that what Polars does next for the sake of others finds ours
        inherited: Callable[..., pl.QueryOptFlags] = super()._with_monitoring
        changed = inherited(optimizations)
        if _here.observer is not None:
            try:
                _arm(changed)
            except _MOVED as error:
                _complain_once(error)
        return changed


def counting_engine(engine: pl.Engine) -> pl.Engine:
    """Return a copy of a streaming `engine` by which `observed` sees its queries."""
    copy = CountingEngine.__new__(CountingEngine)
    for name, value in vars(engine).items():
        setattr(copy, name, value)
    return copy


def _arm(optimizations: Any) -> None:
    flags = optimizations._pyoptflags  # noqa: SLF001
    _here.is_shared = flags.query_monitoring
    if not _here.is_shared:
        _register()
        flags.query_monitoring = True
    _here.armed = _here.observer


def _register() -> None:
    """Have Polars tell an observer of ours of monitored queries."""
    register = import_module("polars._plr").set_query_monitoring
    with _lock:
        before = sys.modules.get(_MODULE)
        sys.modules[_MODULE] = _module
        try:
            register(True)  # noqa: FBT003
        finally:
            if before is None:
                del sys.modules[_MODULE]
            else:
                sys.modules[_MODULE] = before


def _wrap_factory() -> None:
    """Put a factory of ours before that of others, if there is one."""
    with _lock:
        module = sys.modules.get(_MODULE)
        factory = getattr(module, _FACTORY, None)
        if factory is not None and not isinstance(factory, _Factory):
            setattr(module, _FACTORY, _Factory(factory))


class _Factory:
    """Stands in for the factory of others, if there is one."""

    def __init__(self, theirs: Callable[..., Any] | None = None) -> None:
        self.theirs = theirs

    def __call__(self, *arguments: Any, **options: Any) -> _Observer:
        return _Observer(self.theirs, arguments, options)


class _Observer:
    """Is told of queries, and tells the `Observer` of each, and the observer of others."""

    def __init__(
        self,
        theirs: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._theirs = theirs
        self._arguments = arguments
        self._options = options
        self._queries: dict[object, tuple[Observer | None, Any]] = {}

    def on_query_started(self, query: object, *rest: object) -> None:
        ours, _here.armed = _here.armed, None
        theirs = None
        if ours is None or _here.is_shared:
            theirs = self._make_theirs()
        self._queries[query] = ours, theirs
        if theirs is not None:
            theirs.on_query_started(query, *rest)

    def on_query_planned(self, query: object, handle: Any, *rest: Any) -> object:
        ours, theirs = self._queries.get(query, (None, None))
        if ours is not None:
            try:
                ours.planned(handle, rest[1])
            except Exception as error:  # noqa: BLE001  # Polars would print it
                _complain_once(error)
        if theirs is None:
            self._queries.pop(query, None)
            return None
        guard = theirs.on_query_planned(query, handle, *rest)
        return _Guard(guard, self._queries, query)

    def on_query_failed(self, query: object, *rest: object) -> None:
        _, theirs = self._queries.pop(query, (None, None))
        if theirs is not None:
            theirs.on_query_failed(query, *rest)

    def _make_theirs(self) -> Any:
        """Return an observer of others for one query, since theirs may be made for one alone."""
        theirs = self._theirs
        if theirs is None:  # ours was registered while theirs was to be told
            factory = getattr(sys.modules.get(_MODULE), _FACTORY, None)
            theirs = factory.theirs if isinstance(factory, _Factory) else factory
        return None if theirs is None else theirs(*self._arguments, **self._options)


class _Guard:
    """What Polars closes when a query has ended, for others."""

    def __init__(self, theirs: Any, queries: dict[object, Any], query: object) -> None:
        self._theirs = theirs
        self._queries = queries
        self._query = query

    def close(self) -> None:
        self._queries.pop(self._query, None)
        if self._theirs is not None:
            self._theirs.close()


def _complain_once(error: Exception) -> None:
    text = f"{type(error).__name__}: {error}"
    if text not in _complained:
        _complained.add(text)
        _log.debug("the progress of queries cannot be seen: %s", text)


_module: Final = ModuleType(_MODULE)
setattr(_module, _FACTORY, _Factory())
