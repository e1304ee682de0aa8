"""
Resolves names of the parent's ``__main__`` in another process, whose own is a different module.

It does the same for the parent's modules that cannot be imported in other processes, and for
namespaces that the parent has registered for classes of Polars. Functions and classes of a module
are pickled by their names, so that each is resolved when it is unpickled: when the query is
unpacked or, for those in expressions, when Polars runs the query, on whichever thread.
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
Export: TypeAlias = bytes | str | None
"""A pickle, the reason why there is none, or None for a name that the parent does not have."""

POLARS: Final = "polars"
"""The module of the keys of registered namespaces, whose names are such as ``Expr.name``."""
NAMESPACE_CLASSES: Final = (pl.DataFrame, pl.Expr, pl.LazyFrame, pl.Series)

_OF_EACH_MODULE: Final = frozenset(
    {*dir(ModuleType("")), "__all__", "__builtins__", "__cached__", "__file__", "__path__"}
)
"""Attributes that imports look up on any module: the parent is not asked for these."""


class _Absent: ...


class _Run:
    """The names that one run of a query has resolved: each is the same object whenever used."""

    def __init__(self, load: Callable[[str, str], Export]) -> None:
        self._load = load
        self._values: dict[Key, Any] = {}

    def resolve(self, module: str, name: str) -> Any:
        key = module, name
        if key not in self._values:
            data = self._load(module, name)
            if isinstance(data, str):
                raise AttributeError(data)
            value = _Absent if data is None else pickle.loads(data)  # noqa: S301  # of the parent
            # Another thread, or the unpickling itself, may have resolved it in the meantime. The
            # first value stays: a class must not exist twice in one query.
            self._values.setdefault(key, value)
        return self._values[key]

    def set_once(self, module: str, name: str, value: Any) -> Any:
        return self._values.setdefault((module, name), value)


class _ThisThread(local):
    run: _Run | None = None


_this_thread: Final = _ThisThread()
_runs: Final[list[_Run]] = []
"""All runs in this process: a worker of a cluster may have several at once."""
_proxy_modules: Final[list[str]] = []
_lock: Final = RLock()


class ResolvingMain:
    """
    Context in which names that this process lacks are resolved by `load`, until the query has run.

    A class, since a generator in its place would set the traceback of an error that passes, and an
    error may be frozen.
    """

    def __init__(self, load: Callable[[str, str], Export]) -> None:
        self._run = _Run(load)

    def __enter__(self) -> None:
        _install_hooks()
        self._before, _this_thread.run = _this_thread.run, self._run
        _runs.append(self._run)

    def __exit__(self, *_: object) -> None:
        _this_thread.run = self._before
        with _lock:
            _runs.remove(self._run)
            # A later query may be of another program, which need not have these modules.
            while _proxy_modules and not _runs:
                sys.modules.pop(_proxy_modules.pop(), None)


def make_once(module: str, name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return what `make` returns, and in each run the same object for the same `name`."""
    run = _this_thread.run or next(iter(_runs), None)
    value = make(*args)
    return value if run is None else run.set_once(module, name, value)


def _resolve(module: str, name: str) -> Any:
    """Return what the parent calls `name`; `_Absent` if it has no such name."""
    own = _this_thread.run
    # A thread of Polars does not know for which query it works.
    for run in list(_runs) if own is None else [own]:
        if (value := run.resolve(module, name)) is not _Absent:
            return value
    return _Absent


def _install_hooks() -> None:
    main: Any = sys.modules["__main__"]
    with _lock:
        if not hasattr(main, "__getattr__"):
            main.__getattr__ = partial(_attribute, "__main__")
        if _ProxyFinder not in sys.meta_path:
            sys.meta_path.append(_ProxyFinder)  # pyright: ignore[reportArgumentType]


def _attribute(module: str, name: str) -> Any:
    value = _Absent if name in _OF_EACH_MODULE else _resolve(module, name)
    if value is _Absent:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return value


class _ProxyFinder:
    """The last finder of imports: makes proxies of modules that only the parent can import."""

    @classmethod
    def find_spec(cls, name: str, _path: object = None, _target: object = None) -> Any:
        if _resolve(name, "") is _Absent:
            return None
        return ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @staticmethod
    def create_module(_spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        name = module.__name__
        module.__getattr__ = partial(_attribute, name)  # type: ignore[method-assign]
        _proxy_modules.append(name)


def resolve_namespaces() -> None:
    """Have classes of Polars resolve namespaces that were registered in the parent alone."""
    kinds: tuple[Any, ...] = NAMESPACE_CLASSES
    for kind in kinds:
        before: Any = getattr(kind, "__getattr__", None)  # Polars 2 has one, for better errors
        if not isinstance(before, _NamespaceGetter):
            kind.__getattr__ = _NamespaceGetter(kind, before)


class _NamespaceGetter:
    """The ``__getattr__`` of a class of Polars."""

    def __init__(self, kind: type, before: Callable[[object, str], Any] | None) -> None:
        self._kind = kind
        self._before = before

    def __get__(self, instance: object, _owner: object = None) -> Any:
        return self if instance is None else partial(self, instance)

    def __call__(self, instance: object, name: str) -> Any:
        is_dunder = name.startswith("__") and name.endswith("__")
        value = _Absent if is_dunder else _resolve(POLARS, f"{self._kind.__name__}.{name}")
        if name in vars(self._kind):  # the import of its module has registered it meanwhile
            return getattr(instance, name)
        if value is not _Absent:
            bind = getattr(type(value), "__get__", None)
            return value if bind is None else bind(value, instance, type(instance))
        if self._before is not None:
            return self._before(instance, name)
        text = f"{type(instance).__name__!r} object has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=instance)
