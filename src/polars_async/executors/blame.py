"""Finds the object within a query that cannot be pickled, for the error that names it."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

from polars_async.executors.operations import Run
from polars_async.executors.staying import UnsendableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Part = tuple[str, Any]
_MAX_STEPS: Final = 50
"""How deep the search goes: one step may take some ms."""


def unsendable_error(
    item: object, error: object, can_be_pickled: Callable[[object], bool]
) -> UnsendableError:
    """Return the error for `item`, whose pickling raised `error`; it names the part to blame."""
    return UnsendableError(
        f"the query cannot be sent to another process: {culprit_of(item, can_be_pickled)} cannot "
        f"be pickled ({error}). Have the function make it, or put both into a module that can be "
        "imported, so that each process has its own"
    )


def culprit_of(item: object, can_be_pickled: Callable[[object], bool]) -> str:
    """Return in words which part of `item` cannot be pickled."""
    steps: list[str] = []
    culprit = item
    seen: set[int] = set()
    while len(seen) < _MAX_STEPS:
        seen.add(id(culprit))
        part_to_blame = next(
            (
                (step, part)
                for step, part in _parts(culprit)
                if id(part) not in seen and not can_be_pickled(part)
            ),
            None,
        )
        if part_to_blame is None:
            break
        if isinstance(culprit, FunctionType):
            steps.clear()  # only the innermost function is worth naming
        step, culprit = part_to_blame
        steps += [step] if step else []
    kind = type(culprit)
    name = kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind)
    return f"{', in it '.join(steps)}, which is a {name}," if steps else f"a {name}"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _parts(item: Any) -> Iterator[_Part]:
    if isinstance(item, FunctionType):
        yield from _parts_of_function(item)
    elif isinstance(item, Run):
        yield "", item.function
        yield from ((f"argument {n} of the function", arg) for n, arg in enumerate(item.args, 1))
    elif isinstance(item, MethodType):
        yield "", item.__self__
        yield "", item.__func__
    elif isinstance(item, partial):
        yield "", item.func
        yield from (("an argument of a functools.partial", value) for value in item.args)
        yield from _named_parts("argument", item.keywords, " of a functools.partial")
    elif isinstance(item, type):
        yield from _named_parts("attribute", vars(item), f" of the class {item.__qualname__!r}")
        yield from (("", base) for base in item.__bases__)
    elif isinstance(item, dict):
        yield from (("", each) for pair in list(item.items()) for each in pair)
    elif isinstance(item, list | tuple | set | frozenset):
        yield from (("", each) for each in list(item))
    elif isinstance(item, staticmethod | classmethod):
        yield "", item.__func__
    elif type(item).__module__.partition(".")[0] not in sys.stdlib_module_names:
        yield from _named_parts("attribute", getattr(item, "__dict__", {}), "")
        yield "", type(item)


def _parts_of_function(function: FunctionType) -> Iterator[_Part]:
    of = f" of the function {function.__qualname__!r}"
    closed_over = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the variable has no value yet
            closed_over[name] = cell.cell_contents
    if function.__globals__.get("__name__", "").startswith("polars."):  # it wraps the user's
        yield from (("", value) for value in closed_over.values())
        return
    yield from _named_parts("variable", closed_over, of)
    used = {name: function.__globals__[name] for name in _names(function.__code__, function)}
    yield from _named_parts("global", used, of)
    yield from ((f"a default{of}", value) for value in function.__defaults__ or ())
    yield from _named_parts("default", function.__kwdefaults__ or {}, of)
    yield from _named_parts("attribute", vars(function), of)


def _named_parts(kind: str, values: Any, of: str) -> Iterator[_Part]:
    yield from ((f"the {kind} {name!r}{of}", value) for name, value in list(values.items()))


def _names(code: CodeType, function: FunctionType) -> Iterator[str]:
    """Yield the names of all globals that `code` uses, and the functions defined in it."""
    yield from (name for name in code.co_names if name in function.__globals__)
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each, function)
