"""
Queries in worker processes: a pool, its workers, and what goes to and fro.

All of it is for Linux alone, and is imported where it is used. A module with names that only Linux
has begins with an ``assert``, after which type checkers skip the rest of it for other systems.
"""

import sys

if sys.platform != "linux":
    raise ImportError(
        f"worker processes need Linux, and this is {sys.platform}: use executor='threads'"
    )
