"""
What the benchmarks found: as objects, and as the JSON that ``ci/bench`` writes.

The file holds one object: ``schema`` (1), ``environments``, ``results``, ``ratios`` and ``faults``,
which are lists of the classes below, each with its fields by their names. An environment stands for
one Polars, whose version is the ``polars`` of all others. What is unknown is null.
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

SCHEMA: Final = 1

Better: TypeAlias = Literal["lower", "higher"]


@dataclass(frozen=True)
class Environment:
    """Where one Polars was measured, and how; memory is in bytes, the load that of one minute."""

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
        """Look at this machine, before anything is measured."""
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
    """What one contender reached in one case, by one metric: one figure for each run."""

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
        """Whether it counts, as its unit tells: "of 22", or "in 10 runs"."""
        return self.unit.startswith(("of ", "in "))


@dataclass(frozen=True)
class Ratio:
    """
    A contender's figure divided by that of another, pair by pair of the runs that took turns.

    `row` and `target` are those of the project's targets, and `holds` tells whether the median is
    within it; null where there is none. A target without a pair is a ratio to 1, in the unit of
    its metric.
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
    row: str | None
    target: str | None
    holds: bool | None


@dataclass(frozen=True)
class Fault:
    """A run, counted from 1, that gave no figures or ended badly; 0 for who could not take part."""

    polars: str
    suite: str
    case: str
    contender: str
    run: int
    what: str


@dataclass
class Report:
    """All that was found, by one Polars or by several."""

    environments: list[Environment] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take over what another one has."""
        self.environments += other.environments
        self.results += other.results
        self.ratios += other.ratios
        self.faults += other.faults

    def write(self, path: Path) -> None:
        """Write the JSON."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        path.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Read what `write` has written.

        Raises
        ------
        ValueError
            The file is no such report, or one of another schema.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("schema") != SCHEMA:
                raise ValueError(f"{path} is not of schema {SCHEMA}")
            return cls(
                [Environment(**each) for each in found.pop("environments")],
                [Result(**each) for each in found.pop("results")],
                [Ratio(**each) for each in found.pop("ratios")],
                [Fault(**each) for each in found.pop("faults")],
            )
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{path} is no report of ci/bench: {error!r}") from error


def spread(figures: Iterable[float]) -> dict[str, float]:
    """Give the middle, the smallest and the largest of several runs."""
    runs = list(figures)
    return {"median": median(runs), "min": min(runs), "max": max(runs)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
