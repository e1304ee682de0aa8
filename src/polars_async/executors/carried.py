"""What goes along with an operation to another process, such as the span to which it belongs."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final

from polars_async._runtime.instruments import Attached
from polars_async._runtime.logs import complain, log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextvars import Context

    from polars_async.executors.operations import Operation


@dataclass(slots=True, eq=False)
class Carried:
    """An operation on its way to another process, with what its instruments need there."""

    operation: Final[Operation[Any]]
    parcels: Final[Sequence[tuple[str, Mapping[str, str]]]]
    """Names of functions, which are called first, and their arguments."""

    def __call__(self) -> object:
        """Run the operation between what the functions do and undo; return its result."""
        # No context managers: one that is a generator sets the traceback of an error that leaves
        # the block, and errors may be frozen.
        undo = [_open(*parcel) for parcel in self.parcels]
        try:
            return self.operation()
        finally:
            for close in reversed(undo):
                close()


def bare(item: object) -> object:
    """Return the operation in what `carried` has returned; anything else as it is."""
    return item.operation if isinstance(item, Carried) else item


def carried(operation: Operation[Any], context: Context) -> Operation[Any] | Carried:
    """Return what to send for `operation`, whose query was submitted in `context`."""
    parcels = []
    for name, carrier in Attached.carriers:
        try:
            # In a copy: a context cannot be entered twice, and a hook may have entered this one.
            parcel = context.copy().run(carrier)
        except Exception:  # noqa: BLE001  # an instrument must not cost a query its result
            complain("what is to go along with a query to another process raised: %s", name)
        else:
            if parcel:
                parcels.append((name, parcel))
    return Carried(operation, parcels) if parcels else operation


def _open(name: str, parcel: Mapping[str, str]) -> Callable[[], object]:
    """Call the function of this `name`; return what undoes it."""
    try:
        undo: Callable[[], object] = resolve_name(name)(parcel)
    except Exception:  # noqa: BLE001  # such as where its packages are not installed here
        log.debug("what came along with a query was of no use here: %s", name, exc_info=True)
        return _do_nothing
    return undo


def _do_nothing() -> None: ...
