"""
What a program defines itself, pickled by its value for processes that cannot import it.

cloudpickle does so for functions and classes of ``__main__``. Here it does for those of all
modules that other processes cannot import, and for what is pickled by its name for other reasons.
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
from polars_async.executors.blame import unsendable
from polars_async.executors.main_module import ADDED_TO, POLARS, kept
from polars_async.executors.staying import UnsendableError

if TYPE_CHECKING:
    from polars_async.executors.main_module import Definition, Key

_Reduced: TypeAlias = tuple[Any, ...]
_IT_IS: Final = pickle.dumps(object)
"""In place of a module."""
_EVERYWHERE: Final = sys.stdlib_module_names | {"cloudpickle", "polars", "polars_async"}
_Cached: Final[type[Any]] = type(functools.lru_cache(len))


def definition(module: str, name: str) -> bytes | None:
    """
    Pickle what this program calls `name` in `module`; None if it has none.

    Without a name it is the module itself, of which there is no more to tell than that other
    processes cannot import it.

    Raises
    ------
    UnsendableError
        It cannot be pickled.
    """
    if not name:
        return _IT_IS if is_own(module) else None
    owner, _, attribute = name.rpartition(".")
    try:
        found = sys.modules[module]
        value = vars(getattr(found, owner))[attribute] if owner else getattr(found, attribute)
    except (AttributeError, KeyError):
        return None
    return pickled_by_value(value, f"{module}.{name}")


def added_to_polars() -> dict[Key, Definition]:
    """Pickle all namespaces that this program has, or say why one cannot be."""
    found: dict[Key, Definition] = {}
    for kind in ADDED_TO:
        for name in namespaces_of(kind):
            key = POLARS, f"{kind.__name__}.{name}"
            try:
                found[key] = definition(*key)
            except UnsendableError as error:
                found[key] = str(error)
    return found


def pickled_by_value(value: object, name: str) -> bytes:
    """Pickle `value`, and what it uses of this program; `name` is what an error calls it."""
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
        raise unsendable(value, describe(error), can_be_pickled) from error


def can_be_pickled(value: object) -> bool:
    """Return whether `value` can be sent, with all that it uses."""
    try:
        _dumps(value)
    except Exception:  # noqa: BLE001  # of its own methods
        return False
    return True


def is_own(module: str | None) -> bool:
    """
    Return whether this program has a module that other processes cannot import by its name.

    Of a frozen program it cannot be told, since its modules lie on no path: they have to be
    installed for the Python that it has set for its workers.
    """
    if module is None or module == "__main__":
        return module is not None
    package, _, _ = module.rpartition(".")
    if module not in sys.modules or module.partition(".")[0] in _EVERYWHERE:
        return False
    if getattr(sys, "frozen", False):
        return False
    if not package:
        return not _is_importable(module, tuple(map(str, sys.path)))
    if is_own(package):
        return True
    path = getattr(sys.modules.get(package), "__path__", None)
    # Without one, an extension module has made the other along with itself.
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
            found = item.__reduce_ex__(pickle.HIGHEST_PROTOCOL) if reduce is None else reduce(item)
            module = getattr(item, "__module__", None)
            if isinstance(found, str) and module is not None and is_own(module):
                make, args, *rest = _without_name(item)
                return kept, (module, found, make, *args), *rest
            return found

    return ByValue


def _without_name(item: Any) -> _Reduced:
    """Reduce what is otherwise known by its name alone."""
    kind: Any = type(item)
    if kind is _Cached:
        return _reduce_cached(item)
    if kind.__module__ == typing.__name__ and kind is not typing.NewType:  # as a TypeVar
        return kind, (item.__name__,)
    args: Any = getattr(item, "__getnewargs__", tuple)()
    return _new, (kind, *args), item.__getstate__()


def _new(kind: Any, *args: Any) -> Any:
    return kind.__new__(kind, *args)


def _cached(maxsize: int | None, typed: bool, function: Any) -> Any:  # noqa: FBT001
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_cached(item: Any) -> _Reduced:
    parameters = item.cache_parameters()
    state = {name: value for name, value in vars(item).items() if name != "cache_parameters"}
    return _cached, (parameters["maxsize"], parameters["typed"], item.__wrapped__), state


def _reduce_cached_by_name(item: Any) -> str | _Reduced:
    found: Any = sys.modules.get(item.__module__)
    for name in item.__qualname__.split("."):
        found = getattr(found, name, None)
    return str(item.__qualname__) if found is item else _reduce_cached(item)


def _reduce_weak(item: WeakKeyDictionary[Any, Any]) -> _Reduced:
    return WeakKeyDictionary, (), None, None, iter(list(item.items()))


def _reduce_property(item: functools.cached_property[Any]) -> _Reduced:
    return functools.cached_property, (item.func,), {"attrname": item.attrname}


# Polars has cloudpickle pickle functions, without asking. These are in singledispatch functions,
# in methods that keep results, and could be pickled in no other way.
copyreg.pickle(_Cached, _reduce_cached_by_name)
copyreg.pickle(WeakKeyDictionary, _reduce_weak)
copyreg.pickle(functools.cached_property, _reduce_property)
