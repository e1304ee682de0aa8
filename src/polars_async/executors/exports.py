"""
Pickles what only this program defines by value, for processes that cannot import it by name.

cloudpickle does so for functions and classes of ``__main__``. Here it does so for those of all
modules that other processes cannot import, and for objects that reduce to their name, as TypeVars.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import sys
import typing
from importlib import import_module
from importlib.machinery import PathFinder
from io import BytesIO
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakKeyDictionary

from polars_async._runtime.upstream import namespaces_of
from polars_async.errors import describe
from polars_async.executors.blame import unsendable_error
from polars_async.executors.main_module import NAMESPACE_CLASSES, POLARS, make_once
from polars_async.executors.staying import UnsendableError

if TYPE_CHECKING:
    from polars_async.executors.main_module import Export, Key

_Reduced: TypeAlias = tuple[Any, ...]
_MODULE_EXISTS: Final = pickle.dumps(object)
"""The export of a module itself, of which another process needs no more than that it exists."""
_INSTALLED_EVERYWHERE: Final = sys.stdlib_module_names | {"cloudpickle", "polars", "polars_async"}
_LruCache: Final[type[Any]] = type(functools.lru_cache(len))


def export(module: str, name: str) -> bytes | None:
    """
    Return a pickle of what this program calls `name` in `module`; None if there is no such name.

    An empty name stands for the module itself: None then if other processes can import it.

    Raises
    ------
    UnsendableError
        It cannot be pickled.
    """
    if not name:
        return _MODULE_EXISTS if is_own(module) else None
    owner, _, attribute = name.rpartition(".")
    try:
        defined_in = sys.modules[module]
        value = (
            vars(getattr(defined_in, owner))[attribute] if owner else getattr(defined_in, attribute)
        )
    except (AttributeError, KeyError):
        return None
    return _pickle_by_value(value, f"{module}.{name}")


def export_namespaces() -> dict[Key, Export]:
    """Return pickles of all namespaces that this program has registered for classes of Polars."""
    exports: dict[Key, Export] = {}
    for kind in NAMESPACE_CLASSES:
        for name in namespaces_of(kind):
            key = POLARS, f"{kind.__name__}.{name}"
            try:
                exports[key] = export(*key)
            except UnsendableError as error:
                exports[key] = str(error)
    return exports


def _pickle_by_value(value: object, name: str) -> bytes:
    """Pickle `value`, and what it uses of this program; errors call it `name`."""
    try:
        _pickler()
    except ImportError as error:
        raise UnsendableError(
            f"{name} is defined in this program alone, and cannot be sent to another process by "
            "its name: install cloudpickle, or polars-async[processes], or put it into a module "
            "that can be imported"
        ) from error
    try:
        return _dumps(value)
    except Exception as error:
        raise unsendable_error(value, describe(error), can_be_pickled) from error


def can_be_pickled(value: object) -> bool:
    """Return whether `value` can be sent, together with all that it uses."""
    try:
        _dumps(value)
    except Exception:  # noqa: BLE001  # its own methods may raise anything
        return False
    return True


def is_own(module: str | None) -> bool:
    """
    Return whether `module` is imported here, and cannot be imported by name in other processes.

    False for all but ``__main__`` in a frozen program, whose modules lie on no path: they have to
    be installed for the Python that the program has set for its workers.
    """
    if module is None or module == "__main__":
        return module is not None
    package, _, _ = module.rpartition(".")
    if module not in sys.modules or module.partition(".")[0] in _INSTALLED_EVERYWHERE:
        return False
    if getattr(sys, "frozen", False):
        return False
    if not package:
        return not _is_importable(module, tuple(map(str, sys.path)))
    if is_own(package):
        return True
    path = getattr(sys.modules.get(package), "__path__", None)
    # Without a path, the parent is no package but an extension module, whose import makes both.
    return path is not None and not _is_importable(module, tuple(path))


@functools.lru_cache(1024)
def _is_importable(module: str, path: tuple[str, ...]) -> bool:
    return PathFinder.find_spec(module, path) is not None


def _dumps(value: object) -> bytes:
    file = BytesIO()
    _pickler()(file).dump(value)
    return file.getvalue()


@functools.cache
def _pickler() -> Any:
    cloudpickle: Any = import_module("cloudpickle.cloudpickle")

    class ByValue(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, FunctionType) and is_own(item.__module__):
                return self._dynamic_function_reduce(item)
            if isinstance(item, type) and is_own(item.__module__):
                return cloudpickle._dynamic_class_reduce(item)  # noqa: SLF001
            if isinstance(item, FunctionType | type):
                return super().reducer_override(item)
            reduce = self.dispatch_table.get(type(item))
            reduced = (
                item.__reduce_ex__(pickle.HIGHEST_PROTOCOL) if reduce is None else reduce(item)
            )
            module = getattr(item, "__module__", None)
            if isinstance(reduced, str) and module is not None and is_own(module):
                make, args, *rest = _reduce_by_value(item)
                return make_once, (module, reduced, make, *args), *rest
            return reduced

    return ByValue


def _reduce_by_value(item: Any) -> _Reduced:
    """Reduce an object that by itself reduces to its name."""
    kind: Any = type(item)
    if kind is _LruCache:
        return _reduce_lru_cache(item)
    if kind.__module__ == typing.__name__ and kind is not typing.NewType:  # as a TypeVar
        return kind, (item.__name__,)
    args: Any = getattr(item, "__getnewargs__", tuple)()
    return _new, (kind, *args), item.__getstate__()


def _new(kind: Any, *args: Any) -> Any:
    return kind.__new__(kind, *args)


def _make_lru_cache(maxsize: int | None, typed: bool, function: Any) -> Any:  # noqa: FBT001
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_lru_cache(item: Any) -> _Reduced:
    parameters = item.cache_parameters()
    state = {name: value for name, value in vars(item).items() if name != "cache_parameters"}
    return _make_lru_cache, (parameters["maxsize"], parameters["typed"], item.__wrapped__), state


def _reduce_lru_cache_by_name(item: Any) -> str | _Reduced:
    named: Any = sys.modules.get(item.__module__)
    for name in item.__qualname__.split("."):
        named = getattr(named, name, None)
    return str(item.__qualname__) if named is item else _reduce_lru_cache(item)


def _reduce_weak_dict(item: WeakKeyDictionary[Any, Any]) -> _Reduced:
    return WeakKeyDictionary, (), None, None, iter(list(item.items()))


def _reduce_property(item: functools.cached_property[Any]) -> _Reduced:
    return functools.cached_property, (item.func,), {"attrname": item.attrname}


# Polars pickles the functions of a plan with cloudpickle itself, so that only copyreg, which all
# picklers consult, can change how. singledispatch functions hold a WeakKeyDictionary, and classes
# may have methods with lru_cache, and cached properties: cloudpickle by itself refuses all three.
copyreg.pickle(_LruCache, _reduce_lru_cache_by_name)
copyreg.pickle(WeakKeyDictionary, _reduce_weak_dict)
copyreg.pickle(functools.cached_property, _reduce_property)
