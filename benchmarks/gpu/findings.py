"""The settings of a check, and how it reports its findings."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Generator, Mapping, Sequence

    import polars_async as pa


@dataclass(frozen=True)
class Settings:
    """The settings of a check."""

    simulate: bool
    """Whether `polars_async.testing.simulate_gpu` stands in for the GPU."""
    scale: float
    """The scale of the PDS-H data."""
    data: str
    """The folder where data of every scale is kept."""
    queries: Sequence[int]
    """The numbers of the PDS-H queries."""
    exits: int
    """How many interpreters exit with all queries awaited; a quarter as many with one running."""
    seconds: float
    """After so many seconds, the process prints its stacks and exits."""


def tell(what: str, found: str, *, ok: bool | None = None, **more: Any) -> None:
    """Report a finding; `ok` is None if there is no right and wrong."""
    print(json.dumps({"what": what, "found": found, "ok": ok, **more}), flush=True)


def tell_row(cells: Mapping[str, object], *, ok: bool | None = None) -> None:
    """Report a row of the check's table, by its columns."""
    print(json.dumps({"row": cells, "ok": ok}), flush=True)


def tell_right(what: str, resolution: pa.Resolution, right: bool, more: str = "") -> None:  # noqa: FBT001
    """Report whether a query ran on the GPU, and whether its answer is right."""
    found = [resolution.message, "the right answer" if right else "a WRONG ANSWER", more]
    tell(what, "; ".join(filter(None, found)), ok=right and resolution.name == "gpu")


@contextmanager
def telling(what: str) -> Generator[None]:
    """Report an error of the body as a finding, and go on after it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # any error is a finding
        tell(what, f"raised {told(error)}", ok=False)


def told(error: BaseException) -> str:
    """Return an error as one line of text."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: {' '.join(str(error).split())}"


def counted(counts: Counter[str]) -> str:
    """Return the counts as text."""
    return "; ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"
