"""
A report of the benchmarks: as objects, and as the JSON that ``ci/bench`` writes.

The file holds one object: ``schema`` (2), and ``environments``, ``results``, ``ratios`` and
``errors``, which are lists of the classes below, field by field. Each environment is that of one
version of Polars, which the other objects refer to as ``polars``. Unknown values are null.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

SCHEMA: Final = 2

Better: TypeAlias = Literal["lower", "higher"]


@dataclass(frozen=True)
class Environment:
    """The machine and the software of a run; memory in bytes, load as the average of a minute."""

    polars: str
    python: str
    system: str
    processor: str
    processors: int
    memory: int | None
    begun: str
    quick: bool
    load_before: float | None
    load_after: float | None = None

    @classmethod
    def here(cls, *, quick: bool) -> Self:
        """Return that of this process; to be called before anything is measured."""
        return cls(
            polars=pl.__version__,
            python=platform.python_version(),
            system=platform.platform(),
            processor=_processor(),
            processors=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            begun=datetime.now(UTC).isoformat(timespec="seconds"),
            quick=quick,
            load_before=os.getloadavg()[0],
        )


@dataclass(frozen=True)
class Result:
    """The figures of one contender in one case, by one metric: one for each run."""

    polars: str
    suite: str
    case: str
    contender: str
    metric: str
    unit: str
    better: Better
    median: float
    min: float
    max: float
    runs: Sequence[float]

    @property
    def is_count(self) -> bool:
        """Whether the figures are counts: their unit is like "of 22" or "in 10 runs"."""
        return self.unit.startswith(("of ", "in "))


@dataclass(frozen=True)
class Ratio:
    """
    The figures of one contender divided by those of another, pair by pair of their runs.

    With a target, `target` is its name, `limit` its value, and `holds` whether the median is within
    it; without one, they are null. Where `against` is null, the figures are not divided at all: the
    target is for the figure itself, in the unit of its metric.
    """

    polars: str
    suite: str
    case: str
    metric: str
    contender: str
    against: str | None
    median: float
    min: float
    max: float
    target: str | None
    limit: str | None
    holds: bool | None


@dataclass(frozen=True)
class RunError:
    """
    What went wrong in one run of a contender: it returned no figures, or its process failed.

    Runs count from 1; 0 is for a contender that cannot run here at all.
    """

    polars: str
    suite: str
    case: str
    contender: str
    run: int
    what: str


@dataclass
class Report:
    """The results for one version of Polars, or for several."""

    environments: list[Environment] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    errors: list[RunError] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Append what another report holds."""
        self.environments += other.environments
        self.results += other.results
        self.ratios += other.ratios
        self.errors += other.errors

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        path.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Read a report that `write` has written.

        Raises
        ------
        ValueError
            If the file is no such report, or has another schema.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("schema") != SCHEMA:
                raise ValueError(f"{path} is not of schema {SCHEMA}: measure again")
            return cls(
                [Environment(**each) for each in found.pop("environments")],
                [Result(**each) for each in found.pop("results")],
                [Ratio(**each) for each in found.pop("ratios")],
                [RunError(**each) for each in found.pop("errors")],
            )
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{path} is not a report of ci/bench: {error!r}") from error


def spread(figures: Iterable[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest of several runs."""
    runs = list(figures)
    return {"median": median(runs), "min": min(runs), "max": max(runs)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
