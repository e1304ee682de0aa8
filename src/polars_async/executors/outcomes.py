"""What comes of a query in another process: its result, or its error, as it was raised there."""

from __future__ import annotations

import builtins
from contextlib import suppress
from importlib import import_module
from traceback import TracebackException, format_tb
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from polars_async.errors import PolarsAsyncError, text_of
from polars_async.executors.serialization import Message, pack, unpack
from polars_async.gpu.failure import GpuFailure

if TYPE_CHECKING:
    from collections.abc import Callable


class RemoteTraceback(Exception):  # noqa: N818  # no error of its own
    """The traceback of an error in another process, as a text: the ``__cause__`` of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def outcome_of(
    work: Callable[[], object], *, noted: Callable[[BaseException], object] | None = None
) -> tuple[str, object]:
    """
    Run `work`; gives the kind of the outcome, and what `error_of` makes of that.

    `noted` may add to the error what is known here alone.
    """
    try:
        return "value", work()
    except GpuFailure as failure:
        errors = packed_error(failure.cause), packed_error(failure.raised)
        return "gpu failure", (failure.reason, errors, failure.partial_results, failure.remaining)
    except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
        if noted is not None:
            with suppress(BaseException):  # an error may be frozen
                noted(error)
        return "error", packed_error(error)


def error_of(kind: str, found: Any) -> BaseException | None:
    """Give the error that an outcome holds; None where `found` is the result."""
    if kind == "value":
        return None
    if kind == "error":
        return unpacked_error(found)
    reason, errors, results, share = found
    cause, raised = map(unpacked_error, errors)
    failure = GpuFailure(reason, cause, raised)  # type: ignore[arg-type]  # which both were
    failure.partial_results, failure.remaining = results, share
    return failure


def packed_error(error: BaseException) -> tuple[bytes, str]:
    """Pack an error of a query, whatever it is, and its traceback as a text."""
    text = _told(error)
    for made in (_as_it_is, _taken_apart, _plain):  # the best first
        for dump in (_dump, _dump_by_value):
            with suppress(BaseException):  # whatever the error's own methods raise
                candidate = made(error)
                data = dump(candidate)
                if _is_copy(_load(data), candidate):  # some go in, and do not come out
                    return data, text
    return _dump(PolarsAsyncError(f"{_name_of(error)} in a worker")), text


def unpacked_error(packed: tuple[bytes, str]) -> BaseException:
    """Give the error, with its traceback as its cause."""
    data, text = packed
    try:
        error = _load(data)
    except BaseException as refused:  # noqa: BLE001  # as where its class is to be had there alone
        error = PolarsAsyncError(
            "the query failed in its worker process, as told by the traceback above, with an error "
            f"that cannot be unpickled here ({type(refused).__name__}: {text_of(refused)})"
        )
    with suppress(BaseException):  # an error may be frozen
        error.__cause__ = RemoteTraceback(text)
    return error


def _told(error: BaseException) -> str:
    """Give the traceback of `error` as a text, without the frame that called the work."""
    traceback = None
    try:
        traceback = error.__traceback__ and error.__traceback__.tb_next
        return "".join(TracebackException(type(error), error, traceback).format())
    except BaseException:  # noqa: BLE001  # as from a method of its own
        return "".join((*format_tb(traceback), f"{_name_of(error)}, which cannot be formatted"))


def _name_of(error: BaseException) -> str:
    name: str = type.__dict__["__name__"].__get__(type(error))  # whatever its metaclass says
    return name


class _Parts(NamedTuple):
    """An error taken apart, to be put together without a call of its class."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]


def _as_it_is(error: BaseException) -> BaseException:
    return error


def _is_copy(found: BaseException, candidate: BaseException | _Parts) -> bool:
    """Tell whether `candidate` has arrived as `found`."""
    if isinstance(candidate, _Parts):
        return type(found) is candidate.kind
    return type(found) is type(candidate) and _facts(found) == _facts(candidate)


def _facts(error: BaseException) -> str:
    # Its class may have made other ones of the same arguments.
    return repr((error.args, object.__getstate__(error)))


def _taken_apart(error: BaseException, outer: frozenset[int] = frozenset()) -> _Parts:
    """Take `error` apart, which those in `outer` hold, and leave out what cannot be sent."""
    outer |= {id(error)}
    args, state = _content(error)
    left: list[str] = []
    for name, value in list(state.items()):
        try:
            state[name] = _sendable(value, outer)
        except Exception:  # noqa: BLE001  # of its own, as it is taken apart, or ValueError
            del state[name]
            left.append(name)
    if left:
        note = f"left behind in the other process, since it cannot be sent: {', '.join(left)}"
        state["__notes__"] = [*state.get("__notes__", ()), note]
    return _Parts(type(error), tuple(_sendable_or_text(each, outer) for each in args), state)


def _content(error: BaseException) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments and the attributes of `error`, whatever its class says of them."""
    reduced: Any = _built_in(type(error)).__reduce__(error)
    _, args, *more = reduced
    found: Any = object.__getstate__(error)
    state: dict[str, Any] = {}
    for each in (*more, *(found if isinstance(found, tuple) else (found,))):  # slots apart
        state |= each or {}
    return args, state


def _built_in(kind: Any) -> Any:
    """Give the class of Python's own that lays out errors of `kind`."""
    while getattr(builtins, kind.__name__, None) is not kind:
        kind = kind.__base__
    return kind


def _sendable(value: Any, outer: frozenset[int]) -> Any:
    """Give what to send for `value`; ValueError where it cannot be sent."""
    if isinstance(value, BaseException):
        if id(value) in outer:
            raise ValueError("it holds itself")
        return _taken_apart(value, outer)
    if type(value) in (list, tuple) and any(isinstance(each, BaseException) for each in value):
        return type(value)(_sendable(each, outer) for each in value)
    for dump in (_dump, _dump_by_value):
        with suppress(BaseException):
            unpack(Message(dump(value), []))
            return value
    raise ValueError("it cannot be pickled")


def _sendable_or_text(value: Any, outer: frozenset[int]) -> Any:
    try:
        return _sendable(value, outer)
    except Exception:  # noqa: BLE001  # as above
        return repr(value)


def _whole(value: Any) -> Any:
    """Put together what `_sendable` has made of a value."""
    if isinstance(value, _Parts):
        return _put_together(value)
    if type(value) in (list, tuple):
        return type(value)(map(_whole, value))
    return value


def _put_together(parts: _Parts) -> BaseException:
    built_in = _built_in(parts.kind)
    args = _whole(parts.args)
    error: BaseException = built_in.__new__(parts.kind, *args)
    built_in.__init__(error, *args)
    for name, value in parts.state.items():
        object.__setattr__(error, name, _whole(value))
    return error


def _dump(item: object) -> bytes:
    return pack(item, in_files=False).data


def _dump_by_value(item: object) -> bytes:
    # Optional: without it this is one way less.
    cloudpickle: Any = import_module("cloudpickle")
    data: bytes = cloudpickle.dumps(item)
    return data


def _load(data: bytes) -> BaseException:
    error: BaseException = _whole(unpack(Message(data, [])))
    return error


def _plain(error: BaseException) -> BaseException:
    """Give an error of the nearest class that everybody knows, with the name of the other."""
    text = _name_of(error)
    with suppress(BaseException):
        text = f"{text}: {error}"
    for kind in type(error).__mro__:
        if (
            getattr(builtins, kind.__name__, None) is kind
            or kind.__module__ == pl.exceptions.__name__
        ):
            with suppress(BaseException):
                return kind(text)  # type: ignore[no-any-return]
    return PolarsAsyncError(text)
