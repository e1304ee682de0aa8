"""What was found when queries were compared on several engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from polars_async.compare import charts, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from polars_async.compare.results import EngineRun
    from polars_async.gpu.support import GpuSupport


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """
    Queries on several engines, as `compare_engines` has measured them.

    As text, it is a table.

    Attributes
    ----------
    results
        The result of each query on each engine, by query.
    gpu_support
        What `gpu_support` says of each query, with or without a GPU.
    runs
        How often each query ran on each engine, without the first time, which does not count.
    versions
        Of ``polars``, ``polars_async`` (None if it is not installed) and ``python``.
    processors
        How many processors Polars may keep busy; a limit may be a fraction of one.
    """

    results: tuple[EngineRun, ...]
    gpu_support: Mapping[str, GpuSupport]
    runs: int
    versions: Mapping[str, str | None]
    processors: float

    @property
    def agrees(self) -> bool:
        """Whether no answer differs from the one that it was compared with."""
        return not any(each.agrees is False for each in self.results)

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = 100) -> str:
        """Return the table and what it leaves to be said, at most `width` columns wide, from 80."""
        versions, plural = self.versions, "" if self.runs == 1 else "s"
        where = f"Polars {versions['polars']}, Python {versions['python']}"
        how = f"{self.runs} run{plural} of each after one to warm up"
        return (
            f"{where}, {self.processors:g} processors: {how}.\n"
            "ratio: median by that of the reference; memory: peak of the whole process.\n\n"
            f"{table.render(self.results, self.gpu_support, width)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as data that JSON can hold: seconds, bytes, and None for the unknown."""
        return {
            "versions": dict(self.versions),
            "processors": self.processors,
            "runs": self.runs,
            "agrees": self.agrees,
            "gpu_support": {name: asdict(each) for name, each in self.gpu_support.items()},
            "results": [
                asdict(each) | {"median": each.median, "min": each.min, "max": each.max}
                for each in self.results
            ],
        }

    def chart(self) -> Any:
        """
        Return a chart of the times and the memory, of altair.

        Raises
        ------
        ImportError
            altair is not installed: ``polars-async[charts]`` does that.
        """
        return charts.draw(
            self.results, f"Polars {self.versions['polars']}, {self.runs} runs of each"
        )

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the chart as a page that needs no other file; raise ImportError as `chart` does."""
        charts.save(self.chart(), path, "html")

    def save_png(self, path: str | PathLike[str]) -> None:
        """Write the chart as a picture; raise ImportError as `chart` does."""
        charts.save(self.chart(), path, "png")
