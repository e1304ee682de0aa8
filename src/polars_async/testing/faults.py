"""The simulated GPU as a test sees it: its queries, and the faults that the test sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

from polars_async._runtime.unpatched import allocate_lock

SimulatedFault: TypeAlias = Literal[
    "unsupported", "translation", "oom", "oom-once", "cuda", "slow", "import", "incompatible"
]

Failing: TypeAlias = SimulatedFault | Mapping[int, SimulatedFault] | None

_FAULTS: Final[tuple[SimulatedFault, ...]] = get_args(SimulatedFault)
_OF_QUERIES: Final = _FAULTS[:-2]
"""The faults that a single query can have."""


class SimulatedGpu:
    """
    The simulated GPU that `simulate_gpu` yields.

    Attributes
    ----------
    queries
        How many queries have reached it, those that it failed included; a second try of one is the
        same query.
    configs
        With which configuration each try of a query has reached it, in that order: what
        ``pl.GPUEngine`` was made with.
    fail_on
        The faults of single GPUs, as `simulate_gpu` takes them; they may be set anew.
    """

    def __init__(self, fail: Failing, fail_on: Mapping[int, SimulatedFault] | None = None) -> None:
        self._lock = allocate_lock()
        self.queries = 0
        self.configs: list[Mapping[str, Any]] = []
        self.fail = fail
        self.fail_on = fail_on or {}

    @property
    def fail(self) -> Failing:
        """
        Its faults, as `simulate_gpu` takes them; they may be set anew.

        But for ``"incompatible"``, and for ``"import"`` after the first query.
        """
        return self._fail

    @fail.setter
    def fail(self, fail: Failing) -> None:
        if isinstance(fail, Mapping):
            known = all(fault in _OF_QUERIES for fault in fail.values())
        else:
            known = fail is None or fail in _FAULTS
        if not known:
            raise ValueError(
                f"fail must be one of {', '.join(map(repr, _FAULTS))}, or None, or a mapping of "
                f"query numbers to one of the first six, got {fail!r}"
            )
        if fail == "incompatible" and hasattr(self, "_fail"):
            raise ValueError("fail='incompatible' is how a host begins: give it to simulate_gpu")
        if fail == "import" and self.queries:
            raise ValueError("fail='import' comes too late: cudf_polars was imported before")
        self._fail: Failing = fail

    @property
    def fail_on(self) -> Mapping[int, SimulatedFault]:
        """The faults of single GPUs, by their indices; they override `fail`."""
        return self._fail_on

    @fail_on.setter
    def fail_on(self, fail_on: Mapping[int, SimulatedFault]) -> None:
        given: Any = fail_on
        known = isinstance(given, Mapping) and all(
            isinstance(index, int) and fault in _OF_QUERIES for index, fault in given.items()
        )
        if not known:
            raise ValueError(
                f"fail_on must map indices of GPUs to any of {', '.join(map(repr, _OF_QUERIES))}, "
                f"got {fail_on!r}"
            )
        self._fail_on = fail_on

    def next_fault(self, config: Mapping[str, Any], *, again: bool) -> SimulatedFault | None:
        """Count one more query, unless one is tried `again`, and return its fault."""
        with self._lock:
            self.configs.append(config)
            self.queries += not again
            return self.fault

    @property
    def fault(self) -> SimulatedFault | None:
        """The fault of the last query; where all have the same, of the next one too."""
        if isinstance(self._fail, Mapping):
            return self._fail.get(self.queries)
        return self._fail

    def check_import(self) -> None:
        """Raise the error of an import of cudf-polars, if that is to fail."""
        if self._fail == "import":
            raise ImportError("libcudf.so: cannot open shared object file (simulated)")
        if self._fail == "incompatible":
            raise AttributeError("module 'polars' has no attribute that it needs (simulated)")
