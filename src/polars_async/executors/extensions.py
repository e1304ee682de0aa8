"""Extension types that nobody has registered, which Polars 1 reads as what they are stored as."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async._runtime.fork import new_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

LOSES_THEM: Final = pl.__version__.startswith("1.")


_registry: Final = new_lock()


def extension_names(dtypes: Iterable[Any]) -> set[str]:
    """Give the names of all extension types in `dtypes`, if Polars loses them."""
    found: set[str] = set()
    left = list(dtypes) if LOSES_THEM else []
    while left:
        dtype = left.pop()
        if isinstance(dtype, pl.BaseExtension):
            found.add(dtype.ext_name())
            left.append(dtype.ext_storage())
        elif isinstance(dtype, pl.Struct):
            left += (field.dtype for field in dtype.fields)
        elif isinstance(dtype, (pl.List, pl.Array)):
            left.append(dtype.inner)
    return found


def read_extended(read: Callable[[], pl.DataFrame], names: set[str]) -> pl.DataFrame:
    """Give the frame that `read` gives, with its extension types, which have these `names`."""
    with extensions_known(names):
        frame = read()
    for number, column in enumerate(frame.get_columns() if names else ()):
        dtype = column.dtype
        if isinstance(dtype, pl.BaseExtension) and pl.get_extension_type(dtype.ext_name()) is None:
            # As it was made: Polars tells one that was registered from one that was not.
            frame.replace_column(number, column.ext.storage().ext.to(dtype))
    return frame


@contextmanager
def extensions_known(names: set[str]) -> Generator[None]:
    """Have the extension types of these `names` read as such, and then forget them again."""
    if not names:
        yield
        return
    with _registry:  # or one thread would forget what another one still reads
        unknown = [name for name in names if pl.get_extension_type(name) is None]
        try:
            for name in unknown:
                pl.register_extension_type(name, pl.Extension)
            yield
        finally:
            for name in unknown:
                pl.unregister_extension_type(name)
