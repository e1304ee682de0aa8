"""What a check is given, and how it tells what it finds."""

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
    """What a check is given."""

    simulate: bool
    """Whether `polars_async.testing.simulate_gpu` stands in for the GPU."""
    scale: float
    """Of the PDS-H data."""
    data: str
    """The folder where data of every scale is kept."""
    queries: Sequence[int]
    """The numbers of the PDS-H queries."""
    exits: int
    """How many interpreters exit with all awaited; a quarter of them with a query running."""
    seconds: float
    """After so long the check says where it is, and ends."""


def tell(what: str, found: str, *, ok: bool | None = None, **more: Any) -> None:
    """Write a finding: `ok` is None where nothing could be wrong."""
    print(json.dumps({"what": what, "found": found, "ok": ok, **more}), flush=True)


def tell_row(cells: Mapping[str, object], *, ok: bool | None = None) -> None:
    """Write a row of the check's table, by its columns."""
    print(json.dumps({"row": cells, "ok": ok}), flush=True)


def tell_right(what: str, resolution: pa.Resolution, right: bool, more: str = "") -> None:  # noqa: FBT001
    """Write whether a query ran on the GPU, and rightly."""
    found = [resolution.message, "the right answer" if right else "a WRONG ANSWER", more]
    tell(what, "; ".join(filter(None, found)), ok=right and resolution.name == "gpu")


@contextmanager
def telling(what: str) -> Generator[None]:
    """Have an error be a finding, and the check go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what was looked for
        tell(what, f"raised {told(error)}", ok=False)


def told(error: BaseException) -> str:
    """Write an error in one line."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: {' '.join(str(error).split())}"


def counted(counts: Counter[str]) -> str:
    """Write how often each was found."""
    return "; ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"
