"""The line that tells on a terminal what is measured now."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, TextIO

_CLEAR: Final = "\r\x1b[K"


class ProgressLine:
    """One line that is rewritten; where no terminal is, a line for each tenth of the whole."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._tenth = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_terminal:
            self._write(_CLEAR)

    def show(self, what: str, done: int, total: int) -> None:
        """Tell what is done next, after `done` of `total` runs."""
        text = f"{done}/{total}  {what}"
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            self._write(f"{_CLEAR}{text[:columns]}")
        elif (tenth := 10 * done // total) > self._tenth:
            self._tenth = tenth
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()
