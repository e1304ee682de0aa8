"""The outcome of a query in another process: its result, or its error as it was raised there."""

from __future__ import annotations

import builtins
from contextlib import suppress
from importlib import import_module
from traceback import TracebackException, format_tb
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from polars_async.errors import PolarsAsyncError, describe
from polars_async.executors.message import Message
from polars_async.executors.serialization import pack, unpack
from polars_async.gpu.failure import GpuFailure

if TYPE_CHECKING:
    from collections.abc import Callable


class RemoteTraceback(Exception):  # noqa: N818  # no error of its own
    """The traceback of an error in another process, as text: the ``__cause__`` of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def outcome_of(
    run: Callable[[], object], *, annotate: Callable[[BaseException], object] | None = None
) -> tuple[str, object]:
    """
    Call `run`; return the kind of its outcome, and the result or the packed error.

    `annotate` may add to the error what is known in this process alone.
    """
    try:
        return "value", run()
    except GpuFailure as failure:
        errors = packed_error(failure.cause), packed_error(failure.raised)
        more = failure.partial_results, failure.remaining, failure.both_tries
        return "gpu failure", (failure.reason, errors, more)
    except BaseException as error:  # noqa: BLE001  # a panic and SystemExit are outcomes too
        if annotate is not None:
            with suppress(BaseException):  # an error may be frozen
                annotate(error)
        return "error", packed_error(error)


def error_of(kind: str, found: Any) -> BaseException | None:
    """Return the error of an outcome; None if `found` is the result."""
    if kind == "value":
        return None
    if kind == "error":
        return unpacked_error(found)
    reason, errors, more = found
    cause, raised = map(unpacked_error, errors)
    failure = GpuFailure(reason, cause, raised)  # type: ignore[arg-type]  # which both were
    failure.partial_results, failure.remaining, failure.both_tries = more
    return failure


def packed_error(error: BaseException) -> tuple[bytes, str]:
    """Return an error of any class as bytes, and its traceback as text."""
    text = _traceback_of(error)
    for convert in (_as_it_is, _taken_apart, _plain):  # the best first
        for dump in (_dump, _dump_by_value):
            with suppress(BaseException):  # whatever the error's own methods raise
                candidate = convert(error)
                data = dump(candidate)
                if _is_copy(_load(data), candidate):  # some can be pickled, but not unpickled
                    return data, text
    return _dump(PolarsAsyncError(f"{_name_of(error)} in a worker")), text


def unpacked_error(packed: tuple[bytes, str]) -> BaseException:
    """Return the error, with its remote traceback as its cause."""
    data, text = packed
    try:
        error = _load(data)
    except BaseException as refused:  # noqa: BLE001  # such as where its class exists there alone
        error = PolarsAsyncError(
            "the query failed in its worker process, as the traceback above shows, with an error "
            f"that cannot be unpickled here ({describe(refused)})"
        )
    with suppress(BaseException):  # an error may be frozen
        error.__cause__ = RemoteTraceback(text)
    return error


def _traceback_of(error: BaseException) -> str:
    """Return the traceback of `error` as text, without the frame of `outcome_of`."""
    traceback = None
    try:
        traceback = error.__traceback__ and error.__traceback__.tb_next
        return "".join(TracebackException(type(error), error, traceback).format())
    except BaseException:  # noqa: BLE001  # such as of a method of its own
        return "".join((*format_tb(traceback), f"{_name_of(error)}, which cannot be formatted"))


def _name_of(error: BaseException) -> str:
    name: str = type.__dict__["__name__"].__get__(type(error))  # past its metaclass
    return name


class _Parts(NamedTuple):
    """The parts of an error, which is rebuilt from them without a call of its class."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]


def _as_it_is(error: BaseException) -> BaseException:
    return error


def _is_copy(unpacked: BaseException, candidate: BaseException | _Parts) -> bool:
    """Return whether `candidate` has survived pickling, as `unpacked`."""
    if isinstance(candidate, _Parts):
        return type(unpacked) is candidate.kind
    return type(unpacked) is type(candidate) and _facts(unpacked) == _facts(candidate)


def _facts(error: BaseException) -> str:
    # Unpickling calls the class, which may turn the same arguments into others.
    return repr((error.args, object.__getstate__(error)))


def _taken_apart(error: BaseException, outer: frozenset[int] = frozenset()) -> _Parts:
    """
    Return the parts of `error`, without those that cannot be sent.

    `outer` are the ids of the errors that hold this one.
    """
    outer |= {id(error)}
    args, state = _content(error)
    left: list[str] = []
    for name, value in list(state.items()):
        try:
            state[name] = _sendable(value, outer)
        except Exception:  # noqa: BLE001  # ValueError, or one of an error's own methods
            del state[name]
            left.append(name)
    if left:
        note = f"left behind in the other process, since it cannot be sent: {', '.join(left)}"
        state["__notes__"] = [*state.get("__notes__", ()), note]
    return _Parts(type(error), tuple(_sendable_or_text(each, outer) for each in args), state)


def _content(error: BaseException) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and the attributes of `error`, past any methods of its own class."""
    reduced: Any = _built_in(type(error)).__reduce__(error)
    _, args, *more = reduced
    attributes: Any = object.__getstate__(error)  # with slots, a tuple of two dictionaries
    state: dict[str, Any] = {}
    for each in (*more, *(attributes if isinstance(attributes, tuple) else (attributes,))):
        state |= each or {}
    return args, state


def _built_in(kind: Any) -> Any:
    """Return the nearest built-in class of `kind`, which determines the layout of its errors."""
    while getattr(builtins, kind.__name__, None) is not kind:
        kind = kind.__base__
    return kind


def _sendable(value: Any, outer: frozenset[int]) -> Any:
    """Return what to send in place of `value`; raise ValueError if it cannot be sent."""
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
    except Exception:  # noqa: BLE001  # ValueError, or one of an error's own methods
        return repr(value)


def _whole(value: Any) -> Any:
    """Return the value that `_sendable` was given."""
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
    # Optional: without it, one way less is tried.
    cloudpickle: Any = import_module("cloudpickle")
    data: bytes = cloudpickle.dumps(item)
    return data


def _load(data: bytes) -> BaseException:
    error: BaseException = _whole(unpack(Message(data, [])))
    return error


def _plain(error: BaseException) -> BaseException:
    """Return an error of the nearest class of Python or Polars; its text names the real class."""
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
