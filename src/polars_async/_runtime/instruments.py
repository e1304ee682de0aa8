"""
What instruments, such as that of OpenTelemetry, attach to all queries of this process.

It does not import Polars: a process is instrumented at its start, and may never use Polars. And a
worker process has to set its handler of SIGINT before that import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from polars_async._runtime.fork import new_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping
    from contextvars import Context


class Listener(Protocol):
    """What is told of queries."""

    @property
    def kinds(self) -> Container[str]:
        """The kinds of events that it takes, of queries on the CPU; it is told of all on a GPU."""
        ...

    def __call__(self, event: Any, context: Context, /) -> object:
        """Take a `QueryEvent` of a query, in whose functions `context` is the current one."""
        ...


Carrier: TypeAlias = "Callable[[], Mapping[str, str]]"
"""Called in the context of a query that goes to another process; returns what goes along."""

_lock: Final = new_lock()


class Attached:
    """What is attached now; each value is replaced as a whole, so that it can be read unlocked."""

    listeners: tuple[Listener, ...] = ()
    carriers: tuple[tuple[str, Carrier], ...] = ()
    """With the name, as ``module:function``, of what the other process calls with the mapping, and
    which returns what is to be called after the query."""


def attach(listener: Listener, carrier: tuple[str, Carrier]) -> None:
    """Attach a listener and a carrier to the queries that are submitted from now on."""
    with _lock:
        Attached.listeners = (*Attached.listeners, listener)
        Attached.carriers = (*Attached.carriers, carrier)


def detach(listener: Listener, carrier: tuple[str, Carrier]) -> None:
    """Detach both; queries that were submitted before still tell the listener how they end."""
    with _lock:
        Attached.listeners = tuple(each for each in Attached.listeners if each is not listener)
        Attached.carriers = tuple(each for each in Attached.carriers if each is not carrier)


def in_utf8(text: str) -> str:
    """
    Return `text` as UTF-8 can have it, with ``?`` for what it cannot.

    Such as of a label that was made of the name of a file: an exporter that cannot encode one text
    sends none of what it has gathered with it.
    """
    return text if text.isascii() else text.encode(errors="replace").decode()
