"""
Run one contender once, in this process: ``benchmarks.runner`` starts it.

``python -m benchmarks.measure.run_one SUITE CASE WHO SIZE`` prints its figures as JSON.
"""

from __future__ import annotations

import gc
import json
import sys

from benchmarks.suites import suite

if __name__ == "__main__":
    name, case, who, size = sys.argv[1:]
    run = suite(name).run
    # Else a collection of what the imports left takes up to 30 ms, in one measurement by chance.
    gc.collect()
    gc.freeze()
    # Flushed, since the interpreter may still abort when it exits.
    print(json.dumps(run(case, who, **json.loads(size))), flush=True)
