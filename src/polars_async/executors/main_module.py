"""
What a query finds, in another process, of the program that it comes from.

That is its module ``__main__``, and those modules that cannot be imported elsewhere. Functions and
classes of a module are pickled by their names, so that each is looked up when it is unpickled:
when the query is unpacked or, in expressions, when Polars runs it, on whichever thread.
"""

from __future__ import annotations

import pickle
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import polars as pl

from polars_async._runtime.unpatched import RLock, local

if TYPE_CHECKING:
    from collections.abc import Callable

Key: TypeAlias = tuple[str, str]
"""A module, and a name in it; without a name, the module itself."""
Definition: TypeAlias = bytes | str | None
"""A pickle, why there is none, or None for what the program does not have."""

POLARS: Final = "polars"
"""The module where what a program has added to a class of Polars is looked up: ``Expr.name``."""
ADDED_TO: Final = (pl.DataFrame, pl.Expr, pl.LazyFrame, pl.Series)

_OF_EACH_MODULE: Final = frozenset(
    {*dir(ModuleType("")), "__all__", "__builtins__", "__cached__", "__file__", "__path__"}
)
"""What is asked about modules, and a process has for itself."""


class _Absent: ...


class _Run:
    """What one run of a query has looked up; each thing is the same wherever it is found again."""

    def __init__(self, look_up: Callable[[str, str], Definition]) -> None:
        self._look_up = look_up
        self._found: dict[Key, Any] = {}

    def find(self, module: str, name: str) -> Any:
        key = module, name
        if key not in self._found:
            data = self._look_up(module, name)
            if isinstance(data, str):
                raise AttributeError(data)
            value = _Absent if data is None else pickle.loads(data)  # noqa: S301  # of the program
            self._found.setdefault(key, value)
        return self._found[key]

    def keep(self, module: str, name: str, value: Any) -> Any:
        return self._found.setdefault((module, name), value)


class _ThisThread(local):
    run: _Run | None = None


_this_thread: Final = _ThisThread()
_runs: Final[list[_Run]] = []
"""All that there are now: in a cluster's worker, there may be several at once."""
_stand_ins: Final[list[str]] = []
_lock: Final = RLock()


class LookingUp:
    """
    Ask `look_up` for what is not to be had here, until the query has run.

    A class, since a generator in its place would set the traceback of an error that comes through,
    which may be frozen.
    """

    def __init__(self, look_up: Callable[[str, str], Definition]) -> None:
        self._run = _Run(look_up)

    def __enter__(self) -> None:
        _answer_for_modules()
        self._before, _this_thread.run = _this_thread.run, self._run
        _runs.append(self._run)

    def __exit__(self, *_: object) -> None:
        _this_thread.run = self._before
        with _lock:
            _runs.remove(self._run)
            while _stand_ins and not _runs:
                sys.modules.pop(_stand_ins.pop(), None)


def kept(module: str, name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Make what is known by its name, once for each run."""
    run = _this_thread.run or next(iter(_runs), None)
    value = make(*args)
    return value if run is None else run.keep(module, name, value)


def _find(module: str, name: str) -> Any:
    """Return what the program calls `name`; `_Absent` if it has none."""
    own = _this_thread.run
    # A thread of Polars does not know for which query it works.
    for run in list(_runs) if own is None else [own]:
        if (found := run.find(module, name)) is not _Absent:
            return found
    return _Absent


def _answer_for_modules() -> None:
    main: Any = sys.modules["__main__"]
    with _lock:
        if not hasattr(main, "__getattr__"):
            main.__getattr__ = partial(_attribute, "__main__")
        if _StandIns not in sys.meta_path:
            sys.meta_path.append(_StandIns)  # pyright: ignore[reportArgumentType]


def _attribute(module: str, name: str) -> Any:
    value = _Absent if name in _OF_EACH_MODULE else _find(module, name)
    if value is _Absent:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return value


class _StandIns:
    """Finds, and is the last that is asked to, modules that the program alone can import."""

    @classmethod
    def find_spec(cls, name: str, _path: object = None, _target: object = None) -> Any:
        if _find(name, "") is _Absent:
            return None
        return ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @staticmethod
    def create_module(_spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        name = module.__name__
        module.__getattr__ = partial(_attribute, name)  # type: ignore[method-assign]
        _stand_ins.append(name)


def answer_for_polars() -> None:
    """Have namespaces of Polars' classes looked up that were registered in the program alone."""
    kinds: tuple[Any, ...] = ADDED_TO
    for kind in kinds:
        before: Any = getattr(kind, "__getattr__", None)  # Polars 2 has one, for better errors
        if not isinstance(before, _Added):
            kind.__getattr__ = _Added(kind, before)


class _Added:
    """The ``__getattr__`` of a class of Polars."""

    def __init__(self, kind: type, before: Callable[[object, str], Any] | None) -> None:
        self._kind = kind
        self._before = before

    def __get__(self, instance: object, _owner: object = None) -> Any:
        return self if instance is None else partial(self, instance)

    def __call__(self, instance: object, name: str) -> Any:
        is_dunder = name.startswith("__") and name.endswith("__")
        value = _Absent if is_dunder else _find(POLARS, f"{self._kind.__name__}.{name}")
        if name in vars(self._kind):  # the module that does so has been imported for it
            return getattr(instance, name)
        if value is not _Absent:
            bind = getattr(type(value), "__get__", None)
            return value if bind is None else bind(value, instance, type(instance))
        if self._before is not None:
            return self._before(instance, name)
        text = f"{type(instance).__name__!r} object has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=instance)
