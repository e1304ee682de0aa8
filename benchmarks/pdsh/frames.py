"""
The 22 PDS-H queries as LazyFrames, for ``polars-async compare benchmarks/pdsh/frames.py:q1,q6``.

``PDSH`` in the environment is the folder of the tables, such as ``.cache/data/pdsh-1``.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.pdsh import data
from benchmarks.pdsh.queries import QUERIES

_tables = data.tables(Path(os.environ.get("PDSH", ".cache/data/pdsh-1")).absolute())
globals().update({f"q{number}": query(_tables) for number, query in QUERIES.items()})
