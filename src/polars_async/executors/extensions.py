"""Keeps extension types that are not registered, which Polars 1 reads as their storage types."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async._runtime.fork import new_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

LOSES_EXTENSIONS: Final = pl.__version__.startswith("1.")

_registry: Final = new_lock()


def extension_names(dtypes: Iterable[Any]) -> set[str]:
    """Return the names of all extension types in `dtypes`, if Polars loses them."""
    names: set[str] = set()
    pending = list(dtypes) if LOSES_EXTENSIONS else []
    while pending:
        dtype = pending.pop()
        if isinstance(dtype, pl.BaseExtension):
            names.add(dtype.ext_name())
            pending.append(dtype.ext_storage())
        elif isinstance(dtype, pl.Struct):
            pending += (field.dtype for field in dtype.fields)
        elif isinstance(dtype, (pl.List, pl.Array)):
            pending.append(dtype.inner)
    return names


def read_extended(read: Callable[[], pl.DataFrame], names: set[str]) -> pl.DataFrame:
    """Return the frame that `read` returns, whose extension types have these `names`."""
    with extensions_known(names):
        frame = read()
    for number, column in enumerate(frame.get_columns() if names else ()):
        dtype = column.dtype
        if isinstance(dtype, pl.BaseExtension) and pl.get_extension_type(dtype.ext_name()) is None:
            # To Polars, a type that was registered when it was read is not one that was never. The
            # frame that was written had one that was never registered: so has this one.
            frame.replace_column(number, column.ext.storage().ext.to(dtype))
    return frame


@contextmanager
def extensions_known(names: set[str]) -> Generator[None]:
    """Register the extension types of these `names` meanwhile, so that Polars keeps them."""
    if not names:
        yield
        return
    with _registry:  # else one thread would unregister a type while another one reads it
        unknown = [name for name in names if pl.get_extension_type(name) is None]
        try:
            for name in unknown:
                pl.register_extension_type(name, pl.Extension)
            yield
        finally:
            for name in unknown:
                pl.unregister_extension_type(name)
