"""The interpreter's own lock, thread and queue, also where gevent has patched them.

Under ``gevent.monkey.patch_all()`` the names in `threading` and `queue` are green: a worker
thread that waited on one would wait for the hub, and a query would stall it. What is taken here is
the original, whether the patch comes before or after this module's import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _thread import RLock, allocate_lock, start_new_thread
    from queue import SimpleQueue
    from threading import local
else:

    def _original(module: str, name: str) -> Any:
        monkey = sys.modules.get("gevent.monkey")
        if monkey is None:
            return getattr(import_module(module), name)
        return monkey.get_original(module, name)

    RLock = _original("_thread", "RLock")
    local = _original("_thread", "_local")
    allocate_lock = _original("_thread", "allocate_lock")
    start_new_thread = _original("_thread", "start_new_thread")
    SimpleQueue = _original("queue", "SimpleQueue")

__all__ = ["RLock", "SimpleQueue", "allocate_lock", "local", "start_new_thread"]
