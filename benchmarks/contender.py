"""
What one contender does in a process of its own: ``benchmarks.runner`` starts it.

``python -m benchmarks.contender SUITE CASE WHO SIZE`` prints its figures as JSON.
"""

from __future__ import annotations

import json
import sys

from benchmarks.suites import SUITES

if __name__ == "__main__":
    suite, case, contender, size = sys.argv[1:]
    # At once: an interpreter may still abort when it exits.
    print(json.dumps(SUITES[suite].run(case, contender, **json.loads(size))), flush=True)
