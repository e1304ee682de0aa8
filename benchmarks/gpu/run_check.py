"""
Run one check, in this process: ``python -m benchmarks.gpu.run_check CHECK SETTINGS``.

`benchmarks.gpu` starts it. Each finding is written to stdout at once, as a line of JSON: CUDA may
end the process at any time, and earlier findings must not be lost.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import sys
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import polars_async as pa
from benchmarks.gpu.compared import compared
from benchmarks.gpu.exits import awaited, exits, running
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.host import facts, make_data
from benchmarks.gpu.memory import memory
from benchmarks.gpu.offload import collectors, offload
from benchmarks.gpu.pdsh import answers, speed, stall
from benchmarks.gpu.throughput import throughput
from polars_async.testing import simulate_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from polars_async.testing import SimulatedGpu

    Check = Callable[[Settings, SimulatedGpu | None], Coroutine[Any, Any, None]]

_CHECKS: Final[Mapping[str, Check]] = {
    "facts": facts,
    "data": make_data,
    "offload": offload,
    "answers": answers,
    "memory": memory,
    "collectors": collectors,
    "stall": stall,
    "exits": exits,
    "awaited": awaited,
    "running": running,
    "speed": speed,
    "throughput": throughput,
    "compare": compared,
}
_LONGEST_EXIT: Final = 20.0


def main(arguments: Sequence[str]) -> None:
    """Run one check."""
    name, settings = arguments[0], Settings(**json.loads(arguments[1]))
    faulthandler.dump_traceback_later(settings.seconds, exit=True)
    # The checks report themselves which queries fell back.
    warnings.simplefilter("ignore", pa.EngineDowngradeWarning)
    with ExitStack() as stack:
        gpu = stack.enter_context(simulate_gpu()) if settings.simulate else None
        asyncio.run(_CHECKS[name](settings, gpu))
    # Now the interpreter exits; if it hangs, it must not do so in silence.
    faulthandler.dump_traceback_later(_LONGEST_EXIT, exit=True)


if __name__ == "__main__":
    main(sys.argv[1:])
