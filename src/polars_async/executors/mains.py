"""
What a query takes from the program that is run, its module ``__main__``.

That is another one in another process. Polars pickles some functions of it by their names, as it
does all others, so that each is looked up there when the query is unpacked.
"""

from __future__ import annotations

import pickle
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from polars_async._native import local

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class _ThisThread(local):
    look_up: Callable[[str], Any] | None = None


_this_thread: Final = _ThisThread()


def definition(name: str) -> bytes | None:
    """Pickle what this program calls `name`, by its value; None if that is not possible."""
    try:
        value = getattr(sys.modules["__main__"], name)
        cloudpickle: Any = import_module("cloudpickle")
        data: bytes = cloudpickle.dumps(value)
    except Exception:  # noqa: BLE001  # what is in the way of a pickle may raise anything
        return None
    return data


def defined(name: str, data: bytes | None) -> Any:
    """Give what `definition` has pickled."""
    if data is None:
        raise AttributeError(
            f"module '__main__' has no attribute {name!r} that could be pickled by its value: "
            "cloudpickle is needed for that (polars-async[processes]), or put it into a module"
        )
    return pickle.loads(data)  # noqa: S301  # of the process that the query comes from


@contextmanager
def looked_up(look_up: Callable[[str], Any]) -> Generator[None]:
    """
    Ask `look_up` for what ``__main__`` has not, on this thread.

    It raises AttributeError for what nobody has.
    """
    main: Any = sys.modules["__main__"]
    if getattr(main, "__getattr__", None) is not _look_up:
        main.__getattr__ = _look_up
    _this_thread.look_up = look_up
    try:
        yield
    finally:
        _this_thread.look_up = None


def _look_up(name: str) -> Any:
    look_up = _this_thread.look_up
    if look_up is None or name.startswith("__"):
        raise AttributeError(f"module '__main__' has no attribute {name!r}")
    return look_up(name)
