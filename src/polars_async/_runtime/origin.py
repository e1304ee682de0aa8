"""
Which threads Polars has started.

The name of a thread is no proof: a thread inherits the name of the one that starts it, and other
libraries written in Rust use the same names as Polars. But the C library keeps, in its descriptor
of a thread, the function with which the thread began. That function lies in the library that
started the thread, since each library has Rust's own code compiled in. The offset of this pointer
in the descriptor is found by means of a thread of our own, whose first function is known.

With glibc that is certain. With another C library, or on macOS, the name has to do, on Windows that
Python did not start the thread. A wrong yes lets one query too many run, a wrong no may have a
query wait for ever for its own slot.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from threading import _DummyThread, current_thread  # pyright: ignore[reportPrivateUsage]
from typing import Final

from polars_async._runtime.unpatched import allocate_lock, start_new_thread
from polars_async._runtime.upstream import LIBRARY, POOL_THREAD, SHARED_NAME

_DESCRIPTOR_WORDS: Final = 256
"""How many words are searched: no more than a descriptor has on any processor."""

_NAME_BYTES: Final = 64
_MEMORY: Final = Path("/proc/self/mem")

_python: Final = ctypes.pythonapi  # which has the C library's functions, too, and keeps the GIL


class _Library(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


if sys.platform != "win32":
    _python.pthread_self.restype = ctypes.c_void_p


def is_this_of_polars() -> bool:
    """Return whether Polars has started the calling thread."""
    if sys.platform == "win32":
        return isinstance(current_thread(), _DummyThread)
    thread, offset = _this_thread(), _offset()
    if offset is None:
        return _has_name_of_polars(thread)
    return _is_in_polars(ctypes.c_void_p.from_address(thread + offset).value)


def is_of_polars(thread: int) -> bool:
    """
    Return whether Polars has started `thread`, an identifier; False if the thread has ended.

    The thread may end at any time, and its descriptor is freed then. So it is read by way of the
    kernel, which returns an error for freed memory, where a direct read would end the process.
    Not to be asked on Windows.
    """
    offset = _offset()
    word = _read_word(thread + (offset or 0))
    if word is None and sys.platform == "linux":
        return False
    return _has_name_of_polars(thread) if offset is None else _is_in_polars(word)


def _read_word(address: int) -> int | None:
    """Read a pointer from the memory of this process; return None where `address` has none."""
    if sys.platform != "linux":
        return None
    size = ctypes.sizeof(ctypes.c_void_p)
    try:
        with _MEMORY.open("rb", buffering=0) as memory:
            word = os.pread(memory.fileno(), size, address)
    except OSError:
        return None
    return int.from_bytes(word, sys.byteorder) if len(word) == size else None


def _this_thread() -> int:
    # Not by get_ident, which gevent replaces.
    thread: int = _python.pthread_self()
    return thread


@cache
def _offset() -> int | None:
    """Return the offset of the first function in a thread's descriptor; None if it is not found."""
    if not hasattr(_python, "gnu_get_libc_version"):
        return None
    offsets: list[int] = []
    done = allocate_lock()
    done.acquire()

    def search() -> None:
        try:
            offsets.extend(_offsets_of_starter(_this_thread()))
        finally:
            done.release()

    start_new_thread(search, ())
    done.acquire()
    return offsets[0] if offsets else None


def _offsets_of_starter(thread: int) -> list[int]:
    """Return where the descriptor of a thread that Python started points into Python's library."""
    starter = ctypes.cast(_python.PyThread_start_new_thread, ctypes.c_void_p).value
    words = (ctypes.c_void_p * _DESCRIPTOR_WORDS).from_address(thread)
    return [
        number * ctypes.sizeof(ctypes.c_void_p)
        for number, word in enumerate(words)
        if word and _library(word) == _library(starter)
    ]


def _has_name_of_polars(thread: int) -> bool:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    if _python.pthread_getname_np(ctypes.c_void_p(thread), name, ctypes.c_size_t(len(name))):
        return False
    text = name.value.decode(errors="replace")
    return text == SHARED_NAME or POOL_THREAD.match(text) is not None


@cache
def _is_in_polars(function: int | None) -> bool:
    return LIBRARY is not None and _library(function) == os.fsencode(LIBRARY)


def _library(address: int | None) -> bytes | None:
    """Return the path of the library in which `address` lies, if it is in one."""
    library = _Library()
    if not _python.dladdr(ctypes.c_void_p(address), ctypes.byref(library)):
        return None
    path: bytes = library.path
    return path
