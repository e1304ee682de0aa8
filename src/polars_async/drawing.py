"""Draws bars: in a terminal by rich or tqdm, and in a notebook by its own display."""

from __future__ import annotations

import sys
from html import escape
from math import floor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


_AS_THEY_ARE: Final = str.maketrans({"{": "{{", "}": "}}"})
"""In the format of a bar of tqdm."""


class Bar(NamedTuple):
    """One bar at one moment."""

    name: str
    fraction: float | None
    """From 0 to 1; None if it is not known."""
    told: str
    """What stands behind the bar."""


class Drawing(Protocol):
    """Where bars are drawn."""

    def draw(self, bars: Sequence[Bar]) -> None:
        """Draw `bars`, as many each time, in place of those before."""
        ...

    def end(self) -> None:
        """Leave the bars as they are, and let go of the terminal."""
        ...


def drawing() -> Drawing | None:
    """
    Return where bars are to be drawn; None where nobody would see them.

    Raises
    ------
    ImportError
        stderr is a terminal, and neither rich nor tqdm is installed.
    """
    if (display := _notebook_display()) is not None:
        return _InNotebook(display)
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    for make in (_ByRich, _ByTqdm):
        try:
            return make()
        except ModuleNotFoundError:
            continue
    raise ImportError(
        "show_progress() needs rich or tqdm: install one of them, or polars-async[progress]"
    )


def _notebook_display() -> Any:
    """Return the function that displays an object in the cell that runs; None outside of one."""
    interactive = sys.modules.get("IPython")
    shell = None if interactive is None else interactive.get_ipython()
    if getattr(shell, "kernel", None) is None:  # a terminal of IPython has none
        return None
    from IPython.display import display  # noqa: PLC0415  # optional

    return display


class _ByRich:
    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415  # optional
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415  # as above

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[share]}", markup=False),
            TextColumn("{task.fields[told]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._progress.start()

    def draw(self, bars: Sequence[Bar]) -> None:
        progress = self._progress
        while len(progress.tasks) < len(bars):
            progress.add_task("", share="", told="")
        for task, bar in zip(progress.tasks, bars, strict=True):
            known = bar.fraction is not None
            # By the attribute: `update` takes a total of None for no change.
            task.total = 1.0 if known else None
            progress.update(
                task.id,
                description=bar.name,
                completed=bar.fraction or 0.0,
                share=_percent(bar.fraction),
                told=bar.told,
            )
        progress.refresh()

    def end(self) -> None:
        self._progress.stop()


class _ByTqdm:
    def __init__(self) -> None:
        from tqdm import tqdm  # noqa: PLC0415  # optional

        self._tqdm: Any = tqdm
        self._bars: list[Any] = []

    def draw(self, bars: Sequence[Bar]) -> None:
        while len(self._bars) < len(bars):
            drawn = self._tqdm(total=1.0, position=len(self._bars), bar_format="", leave=True)
            self._bars.append(drawn)
        for drawn, bar in zip(self._bars, bars, strict=True):
            drawn.n = bar.fraction or 0.0
            name, told = (text.translate(_AS_THEY_ARE) for text in (bar.name, bar.told))
            drawn.bar_format = f"{name} |{{bar:30}}| {_percent(bar.fraction)} {told}"
            drawn.refresh()

    def end(self) -> None:
        for drawn in self._bars:
            drawn.close()


class _InNotebook:
    def __init__(self, display: Any) -> None:
        # In the cell that runs now; later ones are found by the number of the display.
        self._shown = display(_Bars([]), display_id=True)

    def draw(self, bars: Sequence[Bar]) -> None:
        self._shown.update(_Bars(bars))

    def end(self) -> None: ...


class _Bars:
    """Bars as a notebook shows them."""

    def __init__(self, bars: Sequence[Bar]) -> None:
        self._bars = bars

    def __repr__(self) -> str:
        lines = (f"{bar.name}: {_percent(bar.fraction)} {bar.told}" for bar in self._bars)
        return "\n".join(" ".join(line.split()) for line in lines)

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{escape(bar.name)}</td><td><progress{_value(bar.fraction)}></progress></td>"
            f"<td>{_percent(bar.fraction)}</td><td>{escape(bar.told)}</td></tr>"
            for bar in self._bars
        ]
        return f"<table>{''.join(rows)}</table>"


def _value(fraction: float | None) -> str:
    return "" if fraction is None else f' value="{fraction:.3f}" max="1"'


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{floor(100 * fraction):3} %"
