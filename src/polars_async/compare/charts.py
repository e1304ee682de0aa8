"""Charts of a comparison, by altair, which is optional."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal

import polars as pl

from polars_async.compare.table import SIZES, TIMES, amount, duration, unit_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from polars_async.compare.results import EngineRun

_COLOURS: Final = {
    "in-memory": "#4472a8",
    "streaming": "#e0913a",
    "gpu": "#1b7f5c",
    "adaptive": "#c0504d",
}
_OTHERS: Final = ("#7f7f7f", "#8064a2", "#b5b5b5", "#000000")
_WIDE: Final = 20
"""Figures whose largest is more than so many times the smallest get a logarithmic scale."""


def check_installed() -> None:
    """
    Raise ImportError if charts cannot be drawn.

    Raises
    ------
    ImportError
        altair or vl-convert is not installed; the message names the extra that has both.
    """
    for name in ("altair", "vl_convert"):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"charts need altair and vl-convert-python, and {name} cannot be imported "
                f"({error}): pip install polars-async[charts]"
            ) from error


def draw(results: Sequence[EngineRun], title: str) -> Any:
    """Return a chart of the times and one of the memory, with a row for each query."""
    check_installed()
    alt: Any = import_module("altair")
    ran = [each for each in results if each.seconds]
    if not ran:
        raise ValueError("there is nothing to draw: no query has run on any engine")
    colours = _coloured(dict.fromkeys(each.engine for each in ran))
    times = [(each, each.median, each.min, each.max) for each in ran]
    memory = [(each, each.peak_memory, each.peak_memory, each.peak_memory) for each in ran]
    unit = unit_of(max(each.max or 0 for each in ran), TIMES)
    panels = [_panel(alt, "time, median and range", unit, times, duration, colours)]
    if all(each.peak_memory is not None for each in ran):
        unit = unit_of(max(each.peak_memory or 0 for each in ran), SIZES)
        panels.append(_panel(alt, "peak memory of the process", unit, memory, amount, colours))
    return alt.hconcat(*panels).properties(title=title)


def save(chart: Any, path: str | PathLike[str], kind: Literal["html", "png"]) -> None:
    """Write a chart to a file."""
    options: dict[str, Any] = {"inline": True} if kind == "html" else {"scale_factor": 2}
    chart.save(str(path), format=kind, **options)


def _coloured(engines: dict[str, None]) -> dict[str, str]:
    known = {name: _COLOURS[name] for name in engines if name in _COLOURS}
    others = [name for name in engines if name not in known]
    return known | {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}


def _panel(
    alt: Any,
    title: str,
    unit: tuple[str, float],
    figures: Sequence[tuple[EngineRun, Any, Any, Any]],
    describe: Any,
    colours: dict[str, str],
) -> Any:
    frame = pl.DataFrame(
        [
            {
                "query": each.query,
                "engine": each.engine,
                "figure": figure / unit[1],
                "least": least / unit[1],
                "most": most / unit[1],
                "label": describe(figure) + (" DIFFERS" if each.agrees is False else ""),
            }
            for each, figure, least, most in figures
        ]
    )
    sizes = frame["figure"].to_list()
    wide = 0 < _WIDE * min(sizes) < max(sizes)
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=True)
    names = list(colours)
    palette = alt.Scale(domain=names, range=[*colours.values()])
    base = alt.Chart(frame).encode(
        y=alt.Y("engine:N", title=None, sort=names, axis=alt.Axis(labelLimit=200)),
        color=alt.Color("engine:N", scale=palette, legend=None),
    )
    x = alt.X("figure:Q", title=f"{title} ({unit[0]})", scale=scale)
    point = base.mark_point(filled=True, size=70).encode(x=x, tooltip=["query", "engine", "label"])
    spread = base.mark_rule(strokeWidth=2).encode(x=alt.X("least:Q", scale=scale), x2="most:Q")
    label = base.mark_text(align="left", dx=8, fontSize=10).encode(
        x=alt.X("most:Q", scale=scale), text="label:N"
    )
    header = alt.Header(labelAngle=0, labelAlign="left", labelLimit=200)
    order = frame["query"].unique(maintain_order=True).to_list()
    return (
        (spread + point + label)
        .properties(width=280, height=alt.Step(18))
        .facet(row=alt.Row("query:N", title=None, header=header, sort=order), spacing=8)
    )
