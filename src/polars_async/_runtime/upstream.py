"""Every touch of Polars' private API, each guarded; tests/test_upstream.py tells when one moved."""

from __future__ import annotations

import enum
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

import polars as pl

from polars_async._runtime.files import content_of

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from types import FrameType

    from polars.lazyframe.in_process import InProcessQuery
else:
    try:
        from polars.lazyframe.in_process import InProcessQuery
    except ImportError:

        class InProcessQuery:
            """What Polars would call its background queries."""


P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "AUTO_ENGINE",
    "BUILT_IN_ENGINES",
    "LIBRARY",
    "PACKAGE_FOLDER",
    "PICKLED",
    "POOL_THREAD",
    "SHARED_NAME",
    "InProcessQuery",
    "PlanEnd",
    "PlanText",
    "affinity_override",
    "ask_optimized_plan",
    "blocking_threads",
    "extensions_of",
    "forbids_cpu",
    "gpu_callback",
    "hands_over_here",
    "is_eager",
    "last_pickled",
    "map_ipc",
    "memory_held",
    "namespaces_of",
    "optimization_flags",
    "optimizations_of",
    "plan_text",
    "sets_affinity",
    "without_warning",
]

POOL_THREAD: Final = re.compile(r"polars-\d|async-executor")
"""The names of threads of two of Polars' pools, which start with its first larger query. The thread
polars-ooc-cleaner is there from the import on; no query runs on it."""

SHARED_NAME: Final = "tokio-rt-worker"
"""The name of threads of the third, which starts with about any query, and of all libraries that
use the same runtime."""

LIBRARY: Final[str | None] = getattr(getattr(pl, "_plr", None), "__file__", None)
"""The compiled library that is Polars, which has started the threads of its pools."""

PACKAGE_FOLDER: Final = f"{Path(pl.__file__).parent}{os.sep}"
"""The folder of the installed Polars, to find the first frame outside of it."""


_BLOCKING_THREADS: Final = 512


def blocking_threads() -> int:
    """Return how many threads Polars has at most to read files and to call Python sinks."""
    wanted = os.environ.get("POLARS_MAX_BLOCKING_THREAD_COUNT", "")
    return int(wanted) if wanted.isdecimal() else _BLOCKING_THREADS


def _no_override() -> pl.Engine | None:
    return None


def _find_affinity_override() -> Callable[[], pl.Engine | None]:
    try:
        module = importlib.import_module("polars.lazyframe.engine_config")
        getter: Callable[[], pl.Engine | None] = module.get_engine_affinity_override
    except (ImportError, AttributeError):
        return _no_override
    return getter


affinity_override: Final = _find_affinity_override()
"""The engine *object* set with ``Config.set_engine_affinity``; a name lives in the environment."""


_SET_AFFINITY: Final[object] = getattr(pl.Config.set_engine_affinity, "__code__", None)


def sets_affinity() -> bool:
    """
    Tell, when an engine is asked for its class, whether it is to become the affinity.

    ``Config.set_engine_affinity`` asks ``isinstance(engine, pl.Engine)``, and removes the variable
    after that.
    """
    frame = inspect.currentframe()
    for _ in range(4):  # this one, the attribute's, that of ABCMeta, and who asks
        if frame is None:
            return False
        if frame.f_code is _SET_AFFINITY:
            return True
        frame = frame.f_back
    return False


def _find_auto_engine() -> pl.Engine:
    try:
        module = importlib.import_module("polars.lazyframe.engine")
        engine: pl.Engine = module._AutoEngine()  # noqa: SLF001
    except (ImportError, AttributeError, TypeError):
        return pl.InMemoryEngine()
    return engine


AUTO_ENGINE: Final = _find_auto_engine()
"""What Polars itself runs when nothing was asked for. Unlike the *name* ``"auto"`` it does not ask
the affinity again, which would find AsyncEngine there, for ever."""


BUILT_IN_ENGINES: Final = frozenset(
    {pl.InMemoryEngine, pl.StreamingEngine, pl.GPUEngine, type(AUTO_ENGINE)}
)
"""Those of Polars itself that are settings and no more, and so are the same in any process."""


def without_warning(function: Callable[P, T]) -> Callable[P, T]:
    """
    Return `function` of Polars without the warning, around it, that it is unstable.

    That is for programs that call it, and not for those for whom this library does.
    """
    wrapped: Callable[P, T] = getattr(function, "__wrapped__", function)
    return wrapped


def is_eager(optimizations: pl.QueryOptFlags) -> bool:
    """Tell whether it is an operation on a DataFrame, which the GPU engine runs on the CPU."""
    try:
        eager: bool = optimizations._pyoptflags.eager  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except AttributeError:
        return False
    return eager


def optimization_flags(optimizations: pl.QueryOptFlags) -> dict[str, bool]:
    """Give all flags of `optimizations`, which cannot be pickled, by their names."""
    flags: Any = getattr(optimizations, "_pyoptflags", optimizations)
    found = {name: getattr(flags, name) for name in dir(flags) if not name.startswith("_")}
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def optimizations_of(flags: Mapping[str, bool]) -> pl.QueryOptFlags:
    """Make optimisations of what `optimization_flags` gave, in this release or another."""
    optimizations = pl.QueryOptFlags()
    target: Any = getattr(optimizations, "_pyoptflags", optimizations)
    for name, value in flags.items():
        if getattr(target, name, value) != value:  # one that another release has is left out
            setattr(target, name, value)
    return optimizations


def map_ipc(file: int, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """
    Map the uncompressed IPC `file` of a frame with `schema`, which has to stay as it is.

    The descriptor may be closed then. Polars 2 has no way of its own. pyarrow has one, but for a
    few types; else the file is read.
    """
    for way in _ways_to_map:
        with suppress(Exception):  # at what pyarrow does not know, whatever that raises
            frame = way(file)
            if dict(frame.schema) == dict(schema):
                return frame
    return pl.read_ipc(io.BytesIO(content_of(file)))


def _map_with_polars(file: int) -> pl.DataFrame:
    read: Any = pl.read_ipc  # which has the parameter in Polars 1 alone
    frame: pl.DataFrame = read(f"/proc/self/fd/{file}", memory_map=True)  # and maps no object
    return frame


def _map_with_pyarrow(file: int) -> pl.DataFrame:
    from polars_async._runtime.mapping import Mapping  # noqa: PLC0415  # not to be had on every system

    arrow: Any = importlib.import_module("pyarrow")
    mapping = Mapping(file)
    content = arrow.foreign_buffer(mapping.address, mapping.size, base=mapping)
    table = arrow.ipc.open_file(content).read_all()
    frame = pl.from_arrow(table, rechunk=False)  # which would copy it
    assert isinstance(frame, pl.DataFrame)  # as of any table
    return frame


_ways_to_map: Final[tuple[Callable[[int], pl.DataFrame], ...]] = (
    *((_map_with_polars,) if "memory_map" in inspect.signature(pl.read_ipc).parameters else ()),
    _map_with_pyarrow,
)
"""The best first. That of Polars is refused where there is no /proc, and once this process has
become that of another user."""


def forbids_cpu(engine: pl.Engine) -> bool:
    """Return whether ``raise_on_fail`` keeps queries of a GPU engine off the CPU."""
    # GPUEngine declares an attribute raise_on_fail and sets it in its config alone.
    config = getattr(engine, "config", None)
    return isinstance(config, Mapping) and bool(config.get("raise_on_fail"))


def gpu_callback(engine: pl.GPUEngine) -> Callable[..., object] | None:
    """Give what `engine` has Polars call to translate the optimised plan; None if it has moved."""
    try:
        ask: Callable[..., Callable[..., object] | None] = engine._post_opt_callback  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return ask(background=False, eager=False)
    except (AttributeError, TypeError):
        return None


_SINK: Final = b"\x81\xa4Sink\x82\xa5input"
_HANDS_OVER: Final = re.compile(
    rb"\xa7payload\x81(\xa8Callback|\xa4File\x83\xa6target\Z)"  # Polars gives up at one in memory
    rb"|\xb2file_path_provider\x81\xa8Function|\xb5sinked_paths_callback\x81\xa8Callback"
)
_PIECE: Final = 1 << 20


def hands_over_here(plan: IO[bytes]) -> bool:
    """
    Tell whether a plan, as Polars has packed it, is one of a sink that needs this very process.

    Such a sink calls a function for what it writes, or where it does; or it writes to an object. A
    plan that Polars could not pack ends where it gave up. No text and no data in it look the same,
    for what begins with these bytes is neither UTF-8 nor a sequence of small numbers.
    """
    before = b""
    while piece := plan.read(_PIECE):  # bit by bit, so that other threads get the GIL
        piece = before + piece
        if (at := piece.find(_SINK)) >= 0:  # which is the last node
            return _HANDS_OVER.search(piece[at:] + plan.read()) is not None
        before = piece[-len(_SINK) :]
    return False


def last_pickled(lf: pl.LazyFrame) -> object:
    """Return the last object that Polars has cloudpickle pickle for the plan of `lf`; None if none.

    Where the plan cannot be packed, that is the one that cannot be pickled, which Polars' error
    does not have.
    """
    cloudpickle: Any = importlib.import_module("cloudpickle")
    code = cloudpickle.dumps.__code__
    found: list[object] = [None]

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code:
            found[:] = [frame.f_locals[code.co_varnames[0]]]

    before = sys.getprofile()
    sys.setprofile(note)  # of this thread
    try:
        with suppress(Exception):
            lf.serialize(os.devnull)
    finally:
        sys.setprofile(before)
    return found[0]


def namespaces_of(kind: type) -> list[str]:
    """Return the names of the namespaces that were registered for a class of Polars."""
    registered: Any = getattr(pl.api, "NameSpace", ())
    return [name for name, value in list(vars(kind).items()) if isinstance(value, registered)]


_EXTENSION: Final = b"\x81\xa9Extension\x83\xa4name"
_SHORT_TEXT: Final = 0xA0
_LONGER_TEXT: Final = 0xD9


def extensions_of(plan: bytes | mmap.mmap) -> set[str]:
    """Give the names of the extension types of frames and columns in a plan, as it is packed."""
    names = set()
    at = plan.find(_EXTENSION)
    while at >= 0:
        at += len(_EXTENSION)
        size, text = plan[at] - _SHORT_TEXT, at + 1
        if plan[at] == _LONGER_TEXT:
            size, text = plan[text], text + 1
        names.add(plan[text : text + size].decode())
        at = plan.find(_EXTENSION, text)
    return names


def _find_memory_held() -> Callable[[], int]:
    try:
        module = importlib.import_module("polars._plr")
        held: Callable[[], int] = module._estimate_memory_usage  # noqa: SLF001
        held()
    except (ImportError, AttributeError, TypeError):
        return int
    return held


memory_held: Final = _find_memory_held()
"""Return the bytes that Polars' allocator has handed out in this process; 0 if it does not tell."""


class PlanEnd(enum.Enum):
    """Why the text of a plan ends where it does."""

    WHOLE = enum.auto()
    LIMIT = enum.auto()
    """It is longer than was asked for."""
    PYTHON = enum.auto()
    """A Python object comes next: a function, mostly."""
    UNSENDABLE = enum.auto()
    """Something comes next that no other process could be sent, such as an open file."""


_PICKLERS: Final = frozenset({"pickle", "cloudpickle"})
_OF_NUMBERS: Final = b"0123456789,"
_NUMBERS: Final = re.compile(rb"\[[\d,]{48,}")
PICKLED: Final = b'"function":[80,76,80,89,70,78,'
"""How the text of a function in an expression begins that Polars has pickled already: that of a
plan or an expression that was itself pickled."""


class PlanText(NamedTuple):
    """The plan of a query as JSON, as far as it goes."""

    text: bytes
    """Without the most of the numbers that frames in memory are in it."""
    frame_bytes: int
    """How many those were: the bytes of these frames."""
    end: PlanEnd


class _Text(io.RawIOBase):
    """The file that takes the text of one plan, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.text = bytearray()
        self.frame_bytes = 0
        self.end = PlanEnd.UNSENDABLE

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        # Polars writes some kB at a time, and others may have the GIL in between.
        data = bytes(piece)
        if data.translate(None, _OF_NUMBERS):
            self.text += data
        else:
            self.frame_bytes += data.count(b",")
        self._left -= len(data)
        if self._left < 0:
            self.end = PlanEnd.LIMIT
            raise OSError("that is enough of the plan")
        return len(data)

    def import_module(self, name: str, *rest: Any) -> Any:
        if name in _PICKLERS:
            self.end = PlanEnd.PYTHON
            raise ImportError("no Python object is to be pickled")
        return __import__(name, *rest)

    def found(self) -> PlanText:
        commas = sum(each.count(b",") for each in _NUMBERS.findall(self.text))
        return PlanText(bytes(self.text), self.frame_bytes + commas, self.end)


def plan_text(lf: pl.LazyFrame, limit: int) -> PlanText | None:
    """
    Return the plan of `lf` as JSON, and why it ends; None if Polars has no such text.

    It is the plan as it was written, which nothing is opened or called for, and Polars writes it
    without the GIL. Before the first byte of a frame in memory Polars copies all of it.
    """
    target = _Text(limit)
    try:
        serialize: Callable[[_Text], object] = lf._ldf.serialize_json  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except AttributeError:
        return None
    # Polars imports the pickler when it comes to a Python object, by way of the built-ins of the
    # function that calls it. To pickle one may call the user's methods, and copy whatever a closure
    # holds with the GIL held.
    builtins = {"__builtins__": {"__import__": target.import_module}}
    with suppress(Exception, pl.exceptions.PanicException):  # `target` knows why it ends
        FunctionType(_write.__code__, builtins)(serialize, target)
        target.end = PlanEnd.WHOLE
    return target.found()


def _write(serialize: Callable[[_Text], object], target: _Text) -> None:
    serialize(target)


def ask_optimized_plan(
    lf: pl.LazyFrame, optimizations: pl.QueryOptFlags, ask: Callable[[object], T]
) -> T | None:
    """
    Return what `ask` makes of the plan that Polars hands to cudf-polars; None if it hands out none.

    What is wrong with the query is raised, and what `ask` raises. The query does not run. Polars
    has `visit` for that, too, but it holds the GIL: where the plan has a Python dataset, such as
    that of ``scan_delta``, another thread of Polars would wait for it for ever.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def show(plan: object, *_: object) -> None:
        try:
            answers.append(ask(plan))
        except BaseException as error:  # noqa: BLE001  # Polars would make another one of it
            errors.append(error)
        raise _ShownError

    try:
        flags = optimizations._pyoptflags  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        collect: Callable[..., object] = lf._ldf.with_optimizations(flags).collect  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        collect("in-memory", show)
    except (AttributeError, TypeError):
        return None
    except Exception:
        if not answers and not errors:
            raise
    if errors:
        raise errors[0]
    return answers[0] if answers else None


class _ShownError(Exception):
    """Ends a query once its plan was shown."""
