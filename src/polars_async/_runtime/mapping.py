"""Files mapped into memory without an open descriptor."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"files in memory need Linux, and this is {sys.platform}")

import ctypes
import mmap
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from polars_async._runtime.unpatched import start_new_thread

if TYPE_CHECKING:
    from collections.abc import Callable

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value


class Mapping:
    """
    A file mapped for reading; before Python 3.13, `mmap.mmap` keeps a descriptor open.

    Once nothing uses the mapping, it is undone on a thread of its own, without the GIL: the kernel
    takes 20 ms to free the pages of 144 MB, which would hold up every loop.

    Attributes
    ----------
    address, size
        Where the mapping begins, and its size in bytes.
    """

    _undo: Callable[[], object] | None = None

    def __init__(self, file: int) -> None:
        self.size: Final[int] = os.fstat(file).st_size
        address = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"a file could not be mapped: {os.strerror(number)}")
        self.address: Final[int] = address
        self._undo = partial(_libc.munmap, address, self.size)

    # `start` is a default, since a frozen program clears this module before it deletes its objects.
    def __del__(self, start: Callable[..., int] = start_new_thread) -> None:
        undo = self._undo
        if undo is None:
            return
        try:
            start(undo, ())
        except RuntimeError:  # no thread can be started, or the program ends
            undo()
