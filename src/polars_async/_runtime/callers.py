"""The line of the program that called: the innermost neither in this library nor in Polars."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polars_async._runtime.upstream import PACKAGE_FOLDER

if TYPE_CHECKING:
    from types import FrameType

_LIBRARIES: Final = (f"{Path(__file__).parent.parent}{os.sep}", PACKAGE_FOLDER)
_texts: Final[dict[tuple[str, int, type[Warning]], str]] = {}


class CallSite(NamedTuple):
    """A line of the program at which to warn later on, and from any thread."""

    file: str
    line: int
    module: dict[str, Any]
    """Its global names."""

    def warn(self, text: str, category: type[Warning]) -> None:
        """
        Warn as `warnings.warn` does on that line.

        Python shows a warning once for each line and text. A text may have numbers in it that
        change, so the text of the first warning on the line is used again.
        """
        text = _texts.setdefault((self.file, self.line, category), text)
        warnings.warn_explicit(
            text,
            category,
            self.file,
            self.line,
            module=self.module.get("__name__"),
            registry=self.module.setdefault("__warningregistry__", {}),
        )


def call_site() -> CallSite:
    """Return the line of the program that called; it takes about a microsecond."""
    frame, _ = _caller()
    if frame is None:  # as `warnings.warn` does
        return CallSite("sys", 1, sys.__dict__)
    return CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def level_of_caller() -> int:
    """Return the ``stacklevel`` with which the calling function warns at that line."""
    return _caller()[1] - 1


def _caller() -> tuple[FrameType | None, int]:
    frame: FrameType | None = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        level += 1
    return frame, level
