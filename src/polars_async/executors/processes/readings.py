"""Sends the parent of a worker process what the operators of a query have done so far."""

from __future__ import annotations

import sys

assert sys.platform == "linux"

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polars_async._runtime.unpatched import RLock, SimpleQueue, start_new_thread, when_put
from polars_async.executors.meters import LocalMeter, count
from polars_async.executors.serialization import pack

if TYPE_CHECKING:
    from polars_async.executors.operations import Operation
    from polars_async.executors.processes.transport import Transport

T = TypeVar("T")

_INTERVAL: Final = 0.1
"""Seconds between two readings, each of which takes some 0.2 ms."""


def sending_counts(operation: Operation[T], transport: Transport) -> T:
    """Run a counted `operation`, and send what it does ten times a second, and at its end."""
    meter = LocalMeter(operation.frames)
    sender = _Sender(meter, transport)
    with suppress(RuntimeError):  # no thread can start
        start_new_thread(sender.run, ())
    try:
        return count(operation, meter)
    finally:
        sender.end()
        del operation, meter, sender  # see QueryExecutor.run


class _Sender:
    def __init__(self, meter: LocalMeter, transport: Transport) -> None:
        self._meter = meter
        self._transport = transport
        self._lock = RLock()
        self._is_over = False
        self._wakeup: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        """Send readings until the query ends; run on a thread of its own."""
        with suppress(EOFError):  # the parent is gone, and so will this process be
            while not self._is_over:
                when_put(self._wakeup, _INTERVAL)
                self._send()

    def end(self) -> None:
        """Send the last reading, and nothing after it: the outcome of the query comes next."""
        with suppress(EOFError):
            self._send(is_last=True)
        self._wakeup.put(None)

    def _send(self, *, is_last: bool = False) -> None:
        # The flag is read and set with the lock held, in which the message is sent: so none follows
        # the outcome, where the parent would take it for one of the next query.
        with self._lock:
            if self._is_over:
                return
            self._is_over = is_last
            reading: tuple[Any, ...] = tuple(self._meter.read())
            self._transport.send(pack(("reading", reading), in_files=False))
