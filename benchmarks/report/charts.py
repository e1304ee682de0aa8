"""The charts of a report: as PNGs, and all of them in one HTML file that needs no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import altair as alt
import polars as pl

from benchmarks.contenders import (
    DASK,
    POLARS,
    POLARS_ASYNC,
    POLARS_ASYNC_NOT_INLINE,
    POLARS_ASYNC_THREADS,
    POLARS_SEMAPHORE,
    THREADS,
    THREADS_SEMAPHORE,
)
from benchmarks.report.table import number, worst

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from benchmarks.report.results import Ratio, Report

_COLOURS: Final = {
    POLARS_ASYNC: "#1b7f5c",
    POLARS_ASYNC_NOT_INLINE: "#7fb8a4",
    POLARS: "#c0504d",
    POLARS_SEMAPHORE: "#e39c94",
    THREADS: "#7f7f7f",
    THREADS_SEMAPHORE: "#b5b5b5",
    POLARS_ASYNC_THREADS: "#7fb8a4",
    DASK: "#e0913a",
    "in-memory": "#4472a8",
    "streaming": "#e0913a",
    "gpu": "#1b7f5c",
}
"""The colours of the contenders, on whichever engine, in the order in which these are drawn."""
_OTHER: Final = "#000000"
_WIDE: Final = 20
"""Figures whose largest is more than so many times the smallest get a logarithmic scale."""


def draw(report: Report, folder: Path) -> list[Path]:
    """Write PNGs of the targets and of each metric, and ``report.html``; return the files."""
    targets = dict(_targets(report))
    charts = {**targets, **dict(_charts(report))}
    written = []
    for name, chart in targets.items():
        path = folder / f"{name}.svg"  # for the README
        chart.save(path)
        written.append(path)
    for name, chart in charts.items():
        path = folder / f"{name}.png"
        chart.save(path, scale_factor=2)
        written.append(path)
    if charts:
        page = folder / "report.html"
        alt.vconcat(*charts.values()).save(page, inline=True)
        written.append(page)
    return written


def _targets(report: Report) -> Iterator[tuple[str, Any]]:
    """Draw the ratio and the limit of each target that is for a ratio, where it is worst."""
    ratios: dict[tuple[str | None, str], list[Ratio]] = {}
    for each in report.ratios:
        if each.limit is not None and each.against is not None and each.max > 0:
            ratios.setdefault((each.target, each.polars), []).append(each)
    better = {(each.suite, each.case, each.metric): each.better for each in report.results}
    frame = pl.DataFrame(
        [
            {
                "what": each.target,
                "Polars": f"Polars {each.polars}",
                "better": f"{better[each.suite, each.case, each.metric]} is better",
                "median": each.median,
                "min": each.min,
                "max": each.max,
                "target": float(each.limit.split()[1]),
                "label": number(each.median),
                "holds": "holds" if each.holds else "missed",
            }
            for each in map(worst, ratios.values())
            if each.limit is not None
        ]
    )
    if frame.is_empty():
        return
    scale = alt.Scale(type="log")
    base = alt.Chart(frame).encode(
        y=alt.Y("what:N", title=None, sort=None, axis=alt.Axis(labelLimit=400)),
        color=alt.Color(
            "holds:N",
            title="target",
            scale=alt.Scale(domain=["holds", "missed"], range=["#1b7f5c", "#c0504d"]),
        ),
    )
    x = alt.X("median:Q", title=f"ratio to {POLARS}: median and range", scale=scale)
    spread = base.mark_rule(strokeWidth=2).encode(x=alt.X("min:Q", scale=scale), x2="max:Q")
    point = base.mark_point(filled=True, size=70).encode(x=x)
    label = base.mark_text(align="left", fontSize=10).encode(x=alt.value(366), text="label:N")
    target = base.mark_tick(thickness=2, size=14, color="black").encode(
        x="target:Q", color=alt.value("black")
    )
    equal = alt.Chart().mark_rule(strokeDash=[4, 3], color="#888").encode(x=alt.datum(1.0))
    yield (
        "targets",
        (equal + spread + target + point + label)
        .properties(width=360, height=alt.Step(18), data=frame)
        .facet(
            row=alt.Row("better:N", title=None, sort=["lower is better", "higher is better"]),
            column=alt.Column("Polars:N", title=None),
        )
        .properties(title=f"polars-async beside {POLARS} (dashed); the targets are black")
        .resolve_scale(y="independent"),
    )


def _charts(report: Report) -> Iterator[tuple[str, Any]]:
    fields = ("suite", "case", "contender", "metric", "unit", "median", "min", "max")
    frame = pl.DataFrame(
        [
            {"Polars": f"Polars {each.polars}", **{name: getattr(each, name) for name in fields}}
            for each in report.results
            # Counts and single queries are in the tables alone.
            if not each.is_count and not each.metric.startswith("query ")
        ]
    )
    if frame.is_empty():
        return
    for (suite, metric), figures in frame.group_by("suite", "metric", maintain_order=True):
        name = f"{suite}-{metric}".replace(",", "").replace(" ", "-")
        yield name, _chart(str(suite), str(metric), figures)


def _coloured(contenders: Iterable[str]) -> dict[str, str]:
    """Return the colour of each contender, in the order in which they are drawn."""
    order = list(_COLOURS)

    def place(name: str) -> int:
        known = [each for each in order if name.startswith(each)]
        return order.index(max(known, key=len)) if known else len(order)

    colours = [*_COLOURS.values(), _OTHER]
    names = sorted(set(contenders), key=lambda name: (place(name), name))
    return {name: colours[place(name)] for name in names}


def _chart(suite: str, metric: str, figures: pl.DataFrame) -> Any:
    figures = figures.with_columns(label=pl.col("median").map_elements(number, pl.String))
    medians: list[float] = figures["median"].to_list()
    wide = 0 < _WIDE * min(medians) < max(medians)
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=True)
    colours = _coloured(figures["contender"])
    names = list(colours)
    palette = alt.Scale(domain=names, range=[*colours.values()])
    base = alt.Chart(figures).encode(
        y=alt.Y("contender:N", title=None, sort=names, axis=alt.Axis(labelLimit=200)),
        color=alt.Color("contender:N", scale=palette, legend=None),
    )
    unit = figures["unit"][0]
    point = base.mark_point(filled=True, size=70).encode(
        x=alt.X("median:Q", title=f"{metric} ({unit})", scale=scale),
        tooltip=["Polars", "case", "contender", "median", "min", "max"],
    )
    spread = base.mark_rule(strokeWidth=2).encode(x=alt.X("min:Q", scale=scale), x2="max:Q")
    label = base.mark_text(align="left", dx=8, fontSize=10).encode(
        x=alt.X("max:Q", scale=scale), text="label:N"
    )
    rows = alt.Row(
        "case:N",
        title=None,
        header=alt.Header(labelAngle=0, labelAlign="left"),
        sort=figures["case"].unique(maintain_order=True).to_list(),
    )
    return (
        (spread + point + label)
        .properties(width=320, height=alt.Step(18))
        .facet(row=rows, column=alt.Column("Polars:N", title=None))
        .properties(title=f"{suite}: {metric}, median and range")
        .resolve_scale(y="independent")
    )
