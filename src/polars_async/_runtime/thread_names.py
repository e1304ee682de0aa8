"""The names of threads for tools that list them, such as ``top -H`` and ``py-spy``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

_SYSTEM_NAME: Final = Path("/proc/thread-self/comm")


def set_system_name(name: str) -> None:
    """
    Call this thread `name`, as far as that has room there.

    A thread begins with the name of the one that has started it, which may be that of a query.
    """
    # Linux alone lets a thread be named in this way, with 15 bytes; where it fails, it runs all the
    # same.
    with suppress(OSError):
        whole = name.encode(errors="replace")[:15].decode(errors="ignore")
        _SYSTEM_NAME.write_bytes(whole.encode())
