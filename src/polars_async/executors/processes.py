"""Queries in worker processes: isolated from this one, and stopped when nobody wants them."""

from __future__ import annotations

import enum
import fcntl
import logging
import os
import signal
import sys
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from _socket import socket as Socket  # noqa: N812  # as in the channel
from contextlib import suppress
from multiprocessing.spawn import get_executable
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet

from polars_async._native import RLock, posix_spawn, sleep, start_new_thread, waitpid
from polars_async.deadlines import set_deadline
from polars_async.errors import QueryMemoryError, WorkerDiedError, signal_of
from polars_async.events import log
from polars_async.executors.channel import Channel
from polars_async.executors.mains import definition
from polars_async.executors.parcels import Halt, Parcel, buffer_of, error_of, pack, unpack
from polars_async.gpu.simulation import current

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polars_async.deadlines import Deadline
    from polars_async.gpu import GpuStatus
    from polars_async.query import Query
    from polars_async.streams import Buffer

T = TypeVar("T")

GRACE: Final = 0.05
"""Seconds that a query has to end after SIGINT, before its worker is killed."""
_NUDGES: Final = 5
"""How often it is sent meanwhile: one that comes just before the query begins has no effect."""
_FAREWELL: Final = 2.0
"""Seconds that an idle worker has to end by itself."""
_SAMPLED: Final = 0.01
"""Seconds from one look at the memory of a worker to the next."""
_START: Final = (
    "import signal, sys; signal.signal(signal.SIGINT, lambda *_: None); sys.path[:] = {path}; "
    "from polars_async.executors.worker import main as serve; del signal, sys; "
    "globals().pop('serve')({socket}, {lifeline})"
)
"""It leaves no name in ``__main__``, where those of this program's ``__main__`` are looked up."""
_TRIES: Final = 3
"""How many workers may die one after the other before they begin a query; it has harmed none."""
_OF_STREAMS: Final = ("put", "add")
_PLAN_CHARACTERS: Final = 200
_STANDARD_FILES: Final = 3
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Processes:
    """
    Worker processes, each of which runs one query at a time.

    They are started when they are needed, and stay warm. A worker belongs to the thread that has
    taken it, until that gives it back; `_lock` guards who has which.
    """

    def __init__(
        self, *, threads: int, max_memory: int | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self._env: Final = {"POLARS_MAX_THREADS": str(threads), **(env or {})}
        self._max_memory: Final = max_memory
        self._lock = RLock()
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._closed = False
        self.died = 0
        """How many workers have died by themselves, or of a query."""

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return len(self._workers)

    def prepare(self, gpu: GpuStatus) -> int | None:  # noqa: ARG002  # as GpuProcesses
        """Do nothing: a GPU is no other place here."""
        return None

    def run(self, work: Callable[[], T], query: Query[Any]) -> T:
        """Run `work` in a worker; what it raises has the other traceback as its cause."""
        error: BaseException | None = None
        try:
            kind, found, outgrown = self._outcome(work, query)
            error = error_of(kind, found)
            if error is None:
                return found  # type: ignore[no-any-return]
            if outgrown is not None and isinstance(error, KeyboardInterrupt):
                error = outgrown
            raise error
        finally:
            del self, work, query, error  # an error's traceback holds this frame

    def _outcome(
        self, work: Callable[[], object], query: Query[Any]
    ) -> tuple[str, Any, QueryMemoryError | None]:
        errand: _Errand | None = None
        try:
            for _ in range(_TRIES):
                halt = Halt()
                if not query.on_let_go(halt):
                    halt()
                parcel = pack(work, in_files=True, halt=halt)
                try:
                    worker = self._take()
                except BaseException:
                    parcel.close()
                    raise
                errand = _Errand(worker, query, self._max_memory)
                try:
                    kind, found = errand.run(parcel, buffer_of(work))
                except EOFError:
                    if errand.may_be_repeated:
                        self._lose(worker)
                        continue
                    raise self._bury(worker, errand, query) from None
                except BaseException:  # as when the program ends
                    self._lose(worker)
                    raise
                if worker.is_leaving or self._is_bloated(worker):
                    self._replace(worker)
                else:
                    self._give(worker)
                return kind, found, errand.outgrown
            raise WorkerDiedError(
                f"{_TRIES} worker processes in a row died before they began a query"
            )
        finally:
            query.on_let_go(None)
            del self, work, query, errand  # as above

    def close(self) -> None:
        """Let idle workers end, and the others after their query."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._workers.difference_update(idle)
        if idle:
            _dismiss(idle)

    def abandon(self) -> None:
        """Forget the workers, which are the children of another process."""
        self._lock = RLock()
        self._workers.clear()
        self._idle.clear()

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if worker.simulation is current() and worker.is_alive():
                return worker
            # Lost to the kernel, for want of memory, or of a host that was simulated before.
            self._lose(worker)

    def _start(self) -> _Worker:
        worker = _Worker(self._env)
        with self._lock:
            self._workers.add(worker)
        return worker

    def _give(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        _dismiss([worker])

    def _lose(self, worker: _Worker) -> int | None:
        """Have `worker` gone for good; gives its wait status, if there is one."""
        with self._lock:
            self._workers.discard(worker)
        return worker.end()

    def _is_bloated(self, worker: _Worker) -> bool:
        """Tell whether it keeps memory that might be taken for that of the next query."""
        return self._max_memory is not None and worker.memory() > self._max_memory / 2

    def _replace(self, worker: _Worker) -> None:
        """Let a fresh worker take the place of one that ends by itself."""
        with self._lock:
            self._workers.discard(worker)
        _dismiss([worker])
        self._refill()

    def _refill(self) -> None:
        with suppress(OSError):  # then the next query tries it again
            fresh = None if self._closed else self._start()
            if fresh is not None:
                self._give(fresh)

    def _bury(self, worker: _Worker, errand: _Errand, query: Query[Any]) -> BaseException:
        """Put a fresh worker in the place of one that is gone; gives the error of its query."""
        status = self._lose(worker)
        if worker.is_ready:  # else the next one might not start, either
            self._refill()
        if errand.outgrown is not None:
            return errand.outgrown
        if not errand.stopped:
            with self._lock:
                self.died += 1
        return _death(worker, status, query)


class _Worker:
    """One worker process, and this end of the channel to it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        lifeline, self._lifeline = os.pipe()
        if min(theirs.fileno(), lifeline) < _STANDARD_FILES:
            theirs, lifeline = _above_standard_files(theirs, lifeline)
        self.channel = Channel(ours)
        _alive.add(self)
        self._lock = RLock()
        self._reaped = False
        self.simulation = current()
        self.is_ready = False
        self.is_leaving = False
        """Whether it ends after this query, for a reason of its own."""
        try:
            entries: list[Any] = sys.path  # some are no strings, and imports ignore those
            path = [each for each in entries if isinstance(each, str)]
            code = _START.format(path=path, socket=theirs.fileno(), lifeline=lifeline)
            executable = _executable()
            warnings = [f"-W{option}" for option in sys.warnoptions]
            self.pid = posix_spawn(
                executable,
                [executable, "-P", *warnings, "-c", code],
                {**os.environ, **env},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    # In the child alone, so that no other one gets hold of them.
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno()),
                    (os.POSIX_SPAWN_DUP2, lifeline, lifeline),
                ],
                setpgroup=0,  # Ctrl-C in a terminal is for this process, not for them
                setsigmask=[signal.SIGINT],  # until it has a handler
            )
        except BaseException:
            self.channel.close()
            os.close(self._lifeline)
            _alive.discard(self)
            raise
        finally:
            theirs.close()
            os.close(lifeline)

    def await_start(self) -> None:
        """Wait until it is there; EOFError where it fails to start."""
        if self.is_ready:
            return
        try:
            simulated = None if self.simulation is None else self.simulation.arguments()
            self.channel.send(pack((_levels(), simulated), in_files=False))
        except OSError as error:
            raise EOFError from error
        unpack(self.channel.receive())
        self.is_ready = True

    def is_alive(self) -> bool:
        """Tell whether it lives; it may die at any time."""
        return self.channel.is_open()

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there. Any thread may."""
        with self._lock:
            if not self._reaped:
                with suppress(ProcessLookupError):  # somebody else has taken its status
                    os.kill(self.pid, number)

    def memory(self) -> int:
        """Give the bytes of memory that it has all for itself; 0 if it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:  # noqa: PTH123  # a fifth of the time
                _, resident, shared = file.read().split()[:3]
        except OSError:
            return 0
        return (int(resident) - int(shared)) * _PAGE

    def end(self) -> int | None:
        """Kill it if it lives, and wait for its end; gives its wait status, if there is one."""
        self.signal(signal.SIGKILL)
        return self._wait(0)

    def leave(self) -> None:
        """Have it end by itself."""
        self.channel.close()

    def see_off(self, until: float) -> None:
        """Wait for the end of one that was to leave, and kill it when it is time."""
        while not self._reaped and monotonic() < until:
            self._wait(os.WNOHANG)
            sleep(0.005)
        if not self._reaped:
            self.end()

    def abandon(self) -> None:
        """Close what a forked child has of it, so that the worker sees its parent's end."""
        self.channel.abandon()
        os.close(self._lifeline)

    def _wait(self, options: int) -> int | None:
        status: int | None = None
        try:
            pid, status = waitpid(self.pid, options)
            if pid == 0:
                return None
        except ChildProcessError:
            pass
        with self._lock:
            if not self._reaped:
                self._reaped = True
                _alive.discard(self)
                self.channel.close()
                os.close(self._lifeline)
        return status


class _Phase(enum.Enum):
    RUNS = enum.auto()
    """The worker has the query, and SIGINT is meant for that."""
    RESTS = enum.auto()
    """The query has ended, and the worker gets over the signals that came."""
    OVER = enum.auto()


class _Errand:
    """
    One query in one worker.

    The slot's thread runs it; `stop` may come from any thread and from a signal handler, and
    `expire` comes from the clock's thread. `_lock` sees to it that no signal meets the worker's
    next query.
    """

    def __init__(self, worker: _Worker, query: Query[Any], max_memory: int | None) -> None:
        self._worker = worker
        self._query = query
        self._max_memory = max_memory
        self._lock = RLock()
        self._phase = _Phase.RUNS
        self._nudges = 0
        self._deadline: Deadline | None = None
        self._begun = False
        self._looks_at = monotonic() + _SAMPLED
        """When to look at the memory of the worker, though it may send one thing after another."""
        self.stopped = False
        self.outgrown: QueryMemoryError | None = None

    def run(self, parcel: Parcel, buffer: Buffer | None) -> tuple[str, Any]:
        """Give what came of it; EOFError when the worker is gone."""
        query = self._query
        try:
            waits = perf_counter()
            self._worker.await_start()
            query.paused_seconds += perf_counter() - waits  # or it would seem to be a slow query
            if not query.on_let_go(self.stop):
                return "value", None
            kind, found = self._follow(parcel, buffer)
            query.on_let_go(None)
            if self._is_to_rest():
                self._follow(Parcel(b"", []), None)
        finally:
            parcel.close()
            query.on_let_go(None)
            with self._lock:
                self._phase = _Phase.OVER
                self._lift()
            del self, query
        return kind, found

    @property
    def may_be_repeated(self) -> bool:
        """Whether the worker died before it began; one that cannot even start would do it again."""
        return self._worker.is_ready and not self._begun and not self.stopped

    def stop(self) -> None:
        """Stop the query, if it runs: nobody wants it."""
        with self._lock:
            if self._phase is _Phase.RUNS and not self.stopped:
                self.stopped = True
                self._nudge()

    def expire(self) -> None:
        """Ask once more, or kill the worker when it was asked often enough."""
        with self._lock:
            if self._phase is not _Phase.OVER:
                self._nudge()

    def _nudge(self) -> None:
        self._nudges += 1
        if self._nudges > _NUDGES or self._phase is _Phase.RESTS:
            self._worker.signal(signal.SIGKILL)
            return
        self._worker.signal(signal.SIGINT)
        self._expire_in(GRACE / _NUDGES)

    def _is_to_rest(self) -> bool:
        with self._lock:
            if self.stopped:
                self._phase = _Phase.RESTS
                self._expire_in(GRACE)
            return self.stopped

    def _expire_in(self, seconds: float) -> None:
        self._lift()
        try:
            self._deadline = set_deadline(seconds, self)
        except RuntimeError:  # no thread to be had for the clock
            self._worker.signal(signal.SIGKILL)

    def _lift(self) -> None:
        if self._deadline is not None:
            self._deadline.lift()

    def _follow(self, parcel: Parcel, buffer: Buffer | None) -> tuple[str, Any]:
        """Send `parcel`, and take what the worker sends, up to the outcome."""
        channel = self._worker.channel
        channel.send(parcel)
        while True:
            self._check_memory()
            try:
                parcel = channel.receive(None if self._max_memory is None else _SAMPLED)
            except TimeoutError:
                continue
            kind, content = unpack(parcel)
            if kind == "begun":
                self._begun = True
            elif kind == "log":
                _log(content)
            elif kind == "main":
                channel.send(pack(definition(content), in_files=False))
            elif kind == "leaving":
                self._worker.is_leaving = True
            elif kind == "fault":
                simulation = self._worker.simulation
                fault = None if simulation is None else simulation.next_fault()
                channel.send(pack(fault, in_files=False))
            elif kind in _OF_STREAMS and buffer is not None:
                enough = getattr(buffer, kind)(content)
                channel.send(pack(bool(enough), in_files=False))
            else:
                return kind, content

    def _check_memory(self) -> None:
        limit = self._max_memory
        if limit is None or self.outgrown is not None or monotonic() < self._looks_at:
            return
        self._looks_at = monotonic() + _SAMPLED
        if (memory := self._worker.memory()) > limit:
            self.outgrown = QueryMemoryError(
                f"{self._query.named} outgrew the memory of its worker process, and was stopped: "
                f"it took {memory:,} bytes, of at most max_memory={limit:,}. Ask for less at once, "
                "try the streaming engine, or allow for more",
                limit,
            )
            self.stop()


def _above_standard_files(theirs: Socket, lifeline: int) -> tuple[Socket, int]:
    """Move what a worker gets where it is not taken for stdin, stdout and stderr, if those are."""
    moved = [
        fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _STANDARD_FILES)
        for file in (theirs.fileno(), lifeline)
    ]
    theirs.close()
    os.close(lifeline)
    return Socket(fileno=moved[0]), moved[1]


def _executable() -> str:
    # Which `multiprocessing.set_executable` sets where sys.executable is no Python.
    return os.fsdecode(get_executable() or sys.executable)


def _dismiss(workers: list[_Worker]) -> None:
    """Have `workers` end by themselves, which nobody waits for."""
    for worker in workers:
        worker.leave()
    try:
        start_new_thread(_see_off, (workers,))
    except RuntimeError:  # no thread to be had
        _see_off(workers, 0.0)


def _see_off(workers: list[_Worker], farewell: float = _FAREWELL) -> None:
    until = monotonic() + farewell
    for worker in workers:
        worker.see_off(until)


def _levels() -> dict[str, int]:
    """Give the levels of all loggers that have one, so that a worker sends what is wanted."""
    loggers = logging.Logger.manager.loggerDict
    levels = {
        name: each.level
        for name, each in list(loggers.items())
        if isinstance(each, logging.Logger) and each.level
    }
    return levels | {"": logging.getLogger().level}


def _log(content: dict[str, Any]) -> None:
    record = logging.makeLogRecord(content)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        try:
            logger.handle(record)
        except Exception:  # noqa: BLE001  # a handler that breaks the rules costs nobody a result
            log.exception("a handler raised at what a worker process has logged")


def _death(worker: _Worker, status: int | None, query: Query[Any]) -> WorkerDiedError:
    exitcode = None if status is None else os.waitstatus_to_exitcode(status)
    if not worker.is_ready:
        return WorkerDiedError(
            f"the worker process {worker.pid} ended before it was ready, {_told(exitcode)}: what "
            f"it wrote to stderr may tell why, or whether {_executable()!r} runs by itself",
            exitcode,
            None,
        )
    plan = _plan_of(query)
    what = f"{query.named} ({plan})" if plan else query.named
    message = (
        f"the worker process {worker.pid} died while it ran {what}, {_told(exitcode)}. The query "
        "is not run again, and a fresh worker has taken the place: "
    )
    if exitcode == -signal.SIGKILL:
        message += (
            "if it was the kernel, for want of memory, its log says so; max_memory= stops a query "
            "before that"
        )
    elif exitcode is not None and exitcode < 0:
        message += (
            "Polars, or a library that a Python function in the query uses, has crashed; "
            "PYTHONFAULTHANDLER=1 in the environment has it tell where"
        )
    else:
        message += "look for what ends the process, such as os._exit, in Python functions of it"
    return WorkerDiedError(message, exitcode, plan)


def _told(exitcode: int | None) -> str:
    if exitcode is None:
        return "and its exit status was taken by other code that waits for all children"
    if exitcode < 0:
        known = signal_of(exitcode)
        return f"by {known.name}" if known is not None else f"by signal {-exitcode}"
    return f"with exit status {exitcode}"


def _plan_of(query: Query[Any]) -> str | None:
    """Give the plan of `query` in one short line, if it can be had."""
    with suppress(Exception):
        text = " ".join(query.frames[0].explain(optimized=False).split())
        return text if len(text) <= _PLAN_CHARACTERS else f"{text[:_PLAN_CHARACTERS]}…"
    return None


def _abandon_all() -> None:
    for worker in list(_alive):
        worker.abandon()
    _alive.clear()


_alive: Final[WeakSet[_Worker]] = WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
