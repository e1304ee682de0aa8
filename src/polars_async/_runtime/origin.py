"""
Which threads Polars has started.

Their names tell nothing: a thread inherits the name of the one that starts it, and other libraries
written in Rust call theirs as Polars does. But the C library notes, in its descriptor of a thread,
with which function that began, and the function lies in the library that started the thread, since
each has Rust's own compiled in. Where in the descriptor that is, a thread of ours shows.

With glibc that is certain. With another C library, or on another system, the name has to do: a
query too many that runs beyond the slots does less harm than one that is waited for in vain.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Final

from polars_async._runtime.unpatched import allocate_lock, start_new_thread
from polars_async._runtime.upstream import LIBRARY, POOL_THREAD, SHARED_NAME

_DESCRIPTOR_WORDS: Final = 256
"""How much is searched: no more than a descriptor has on any processor."""

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


_python.pthread_self.restype = ctypes.c_void_p


def is_this_of_polars() -> bool:
    """Return whether Polars has started the calling thread."""
    thread, place = _this_thread(), _place()
    if place is None:
        return _is_named_so(thread)
    return _is_in_polars(ctypes.c_void_p.from_address(thread + place).value)


def is_of_polars(thread: int) -> bool:
    """
    Return whether Polars has started `thread`, an identifier; False if the thread has ended.

    It may end at any time, and its descriptor with it, which the kernel then does not read.
    """
    place = _place()
    word = _read_word(thread + (place or 0))
    if word is None and sys.platform == "linux":
        return False
    return _is_named_so(thread) if place is None else _is_in_polars(word)


def _read_word(address: int) -> int | None:
    """Read a pointer of this process; return None where no memory is."""
    size = ctypes.sizeof(ctypes.c_void_p)
    try:
        with _MEMORY.open("rb", buffering=0) as memory:
            word = os.pread(memory.fileno(), size, address)
    except OSError:
        return None
    return int.from_bytes(word, sys.byteorder) if len(word) == size else None


def _this_thread() -> int:
    # Not by get_ident, in place of which gevent puts one of its own.
    thread: int = _python.pthread_self()
    return thread


@cache
def _place() -> int | None:
    """Find out how far into its descriptor a thread's first function is noted, if it is there."""
    if not hasattr(_python, "gnu_get_libc_version"):
        return None
    found: list[int] = []
    done = allocate_lock()
    done.acquire()

    def search() -> None:
        try:
            found.extend(_places_of_python(_this_thread()))
        finally:
            done.release()

    start_new_thread(search, ())
    done.acquire()
    return found[0] if found else None


def _places_of_python(thread: int) -> list[int]:
    starter = ctypes.cast(_python.PyThread_start_new_thread, ctypes.c_void_p).value
    words = (ctypes.c_void_p * _DESCRIPTOR_WORDS).from_address(thread)
    return [
        number * ctypes.sizeof(ctypes.c_void_p)
        for number, word in enumerate(words)
        if word and _library(word) == _library(starter)
    ]


def _is_named_so(thread: int) -> bool:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    if _python.pthread_getname_np(ctypes.c_void_p(thread), name, ctypes.c_size_t(len(name))):
        return False
    text = name.value.decode(errors="replace")
    return text == SHARED_NAME or POOL_THREAD.match(text) is not None


@cache
def _is_in_polars(function: int | None) -> bool:
    return LIBRARY is not None and _library(function) == os.fsencode(LIBRARY)


def _library(address: int | None) -> bytes | None:
    """Give the path of the library in which `address` lies, if it is in one."""
    found = _Library()
    if not _python.dladdr(ctypes.c_void_p(address), ctypes.byref(found)):
        return None
    path: bytes = found.path
    return path
