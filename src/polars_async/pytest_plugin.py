"""
The plug-in for pytest: tests what a program does with a GPU, and without one, on any machine.

pytest 8 or newer finds it where polars-async is installed; where pytest loads no plug-ins by
itself, ``-p polars_async.pytest_plugin`` loads it. An older pytest does without. It imports Polars
when that is first needed.

Fixtures
--------
gpu_host
    For this test the host has a GPU, simulated on the CPU: `polars_async.testing.SimulatedGpu`.
no_gpu_host
    For this test the host has no GPU, no driver and no cudf-polars, whatever it really has. It
    overrides the marker below on a class or a module.
engine_log
    An `EngineLog`: which engine ran each query of this test, and why.

Markers
-------
``@pytest.mark.gpu_host(count=2, fail="oom")``
    As the fixture, also for a test that does not name it. It takes the arguments of
    `polars_async.testing.simulate_gpu`, and takes effect before the test's fixtures are set up.
``@pytest.mark.allow_downgrade``
    Exempts a test from ``--polars-no-downgrade``.

Options, each with a setting for the configuration file
-------------------------------------------------------
``--polars-gpu-host=none``, ``--polars-gpu-host=COUNT``, ``polars_gpu_host = "none"``
    The whole run, from the collection of the tests on, is as if on a host without a GPU, or with so
    many. Fixtures and markers of a test override it; ``-o polars_gpu_host=`` undoes the setting.
``--polars-no-downgrade``, ``polars_no_downgrade = true``
    A test fails if one of its queries does not run on the engine that was asked for, even if it
    passes otherwise. Queries for which it has made an assertion with its `engine_log` are exempt.
    In a test with a `gpu_host` or `no_gpu_host` of its own, so are downgrades by that host: it
    fails only for those by the program, such as GPU execution switched off on the async path.

An `EngineDowngradeWarning` is issued as always: in a suite that turns warnings into errors, it is
raised before the query runs.

Queries that go through polars_async count, an `AsyncEngine` included; those of other engines of
Polars are not seen. A query counts for the test during which it ends: wait for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, overload

import pytest

from polars_async.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Generator

    from polars_async.resolution import Resolution
    from polars_async.testing import SimulatedGpu

__all__ = ["EngineLog", "engine_log", "gpu_host", "no_gpu_host"]

_NO_GPU: Final = {"count": 0, "driver": None, "cudf_polars": None}
_ENGINES: Final = ("in-memory", "streaming", "gpu")
_OF_THE_PROGRAM: Final = (
    Reason.ASYNC_PATH,
    Reason.BACKGROUND_PATH,
    Reason.BATCHES_PATH,
    Reason.UNKNOWN_AFFINITY,
)


class EngineLog(Sequence["Resolution"]):
    """
    The resolutions of a test's queries, in the order in which the queries ended.

    A query is in it once a task or a thread has waited for its end.
    """

    def __init__(self) -> None:
        self._resolutions: list[Resolution] = []
        self._expected = 0

    @overload
    def __getitem__(self, index: int) -> Resolution: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Resolution]: ...
    def __getitem__(self, index: int | slice) -> Resolution | Sequence[Resolution]:
        return self._resolutions[index]

    def __len__(self) -> int:
        return len(self._resolutions)

    def __repr__(self) -> str:
        return f"<EngineLog: {', '.join(each.name for each in self) or 'no query'}>"

    def assert_ran_on(self, engine: str, because: Reason | str | None = None) -> None:
        """
        Assert that each query so far ran on `engine`, and that there was one.

        Parameters
        ----------
        engine
            The name of the engine: ``"in-memory"``, ``"streaming"``, ``"gpu"``, or the one that an
            engine of your own has.
        because
            The `Reason`, or its text, for which another engine ran than was asked for; None for any
            reason, or none.

        Raises
        ------
        AssertionError
            A query did not; the text lists each such query with its engine and the reason.
        ValueError
            `because` is no `Reason`.
        """
        __tracebackhide__ = True
        if because is not None and because not in tuple(Reason):
            raise ValueError(
                f"because must be one of {', '.join(f'{each.value!r}' for each in Reason)}, or "
                f"None, got {because!r}"
            )
        ran = tuple(self)
        wrong = [
            f"\n  query {number} {_describe(each)}"
            for number, each in enumerate(ran, 1)
            if each.name != engine or because not in (None, each.reason)
        ]
        expected = f"expected every query of this test to run on {engine!r}"
        if engine not in _ENGINES:
            expected += f" (the engines of Polars are {', '.join(map(repr, _ENGINES))})"
        if because is not None:
            expected += f" because of {str(because)!r}"
        if not ran:
            raise AssertionError(
                f"{expected}, but none has run: queries count that go through polars_async, once "
                "they were waited for"
            )
        if wrong:
            number = f"{len(wrong)} of {len(ran)}"
            raise AssertionError(f"{expected}, but {number} did not:{''.join(wrong)}")
        self._expected = len(ran)

    def note(self, resolution: Resolution) -> None:
        """Add the resolution of a query that ends; any thread may call it."""
        self._resolutions.append(resolution)

    def unexpected(self) -> list[Resolution]:
        """Return the queries that ran on another engine than requested, and were not asserted."""
        return [each for each in self[self._expected :] if each.reason is not None]


def _describe(resolution: Resolution) -> str:
    reason = "" if resolution.reason is None else f" ({resolution.reason})"
    return f"ran on {resolution.name!r}{reason}: {resolution.message}"


class _Test:
    """The state of this plug-in for one test, until the end of its teardown."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.log: EngineLog | None = None
        self.gpu: SimulatedGpu | None = None
        self.has_host = False
        self.forbidden_by: str | None = None
        self.passed = False

    def watch(self) -> EngineLog:
        if self.log is None:
            from polars_async.events import observers  # noqa: PLC0415  # imports Polars

            self.log = EngineLog()
            observers.append(self.log.note)
            self.stack.callback(observers.remove, self.log.note)
        return self.log

    def simulate(self, *arguments: Any, **options: Any) -> SimulatedGpu:
        gpu = _simulate(self.stack, *arguments, **options)
        self.has_host = True
        return gpu

    def check(self) -> None:
        """Fail the test for queries that were downgraded, and are not exempt."""
        if self.log is None or self.forbidden_by is None:
            return
        downgrades = [
            each
            for each in self.log.unexpected()
            if not self.has_host or each.reason in _OF_THE_PROGRAM
        ]
        if not downgrades:
            return
        first, number = downgrades[0], len(downgrades)
        lines = "".join(f"\n  one {_describe(each)}" for each in downgrades)
        pytest.fail(
            f"{number} {'query' if number == 1 else 'queries'} of this test did not run on the "
            f"engine that was asked for, which {self.forbidden_by} forbids:{lines}\n"
            f"If that is intended, assert it with engine_log.assert_ran_on({first.name!r}, "
            f"because={str(first.reason)!r}), or mark the test with @pytest.mark.allow_downgrade",
            pytrace=False,
        )


_TEST: Final = pytest.StashKey[_Test]()


def _test_of(item: pytest.Item) -> _Test:
    return item.stash.setdefault(_TEST, _Test())


def _simulate(stack: ExitStack, *arguments: Any, **options: Any) -> SimulatedGpu:
    from polars_async.testing import simulate_gpu  # noqa: PLC0415  # imports Polars

    return stack.enter_context(simulate_gpu(*arguments, **options))


@pytest.fixture
def gpu_host(request: pytest.FixtureRequest) -> SimulatedGpu:
    """Have a GPU for this test, with the arguments of ``@pytest.mark.gpu_host``."""
    test = _test_of(request.node)
    if test.gpu is None:
        test.gpu = test.simulate()
    return test.gpu


@pytest.fixture
def no_gpu_host(request: pytest.FixtureRequest) -> None:
    """Have no GPU for this test, no driver and no cudf-polars."""
    if "gpu_host" in request.fixturenames:
        pytest.fail("a test has the fixture gpu_host or no_gpu_host, not both", pytrace=False)
    _test_of(request.node).simulate(**_NO_GPU)


@pytest.fixture
def engine_log(request: pytest.FixtureRequest) -> EngineLog:
    """Return the log of the engines that ran the queries of this test."""
    return _test_of(request.node).watch()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polars-async")
    group.addoption(
        "--polars-gpu-host",
        metavar="none|COUNT",
        help="run all tests as if on a host without a GPU, or with so many",
    )
    group.addoption(
        "--polars-no-downgrade",
        action="store_true",
        help="fail tests whose queries do not run on the engine that was asked for",
    )
    parser.addini("polars_gpu_host", "as --polars-gpu-host", default="")
    parser.addini("polars_no_downgrade", "as --polars-no-downgrade", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "gpu_host(count=1, ...): have a GPU for this test, as polars_async.testing.simulate_gpu "
        "makes it of these arguments",
    )
    config.addinivalue_line(
        "markers", "allow_downgrade: exempt this test from --polars-no-downgrade"
    )
    option, host = "--polars-gpu-host", config.getoption("polars_gpu_host")
    if host is None:
        option, host = "polars_gpu_host", config.getini("polars_gpu_host")
    if host == "":
        return
    if host != "none" and not (host.isdecimal() and int(host)):
        raise pytest.UsageError(f"{option} must be none, or a number of GPUs, got {host!r}")
    stack = ExitStack()
    config.add_cleanup(stack.close)
    _simulate(stack, **(_NO_GPU if host == "none" else {"count": int(host)}))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before any fixture of the test is set up, so that fixtures have that host and that log, too.
    mark = item.get_closest_marker("gpu_host")
    if mark is not None:
        test = _test_of(item)
        try:
            test.gpu = test.simulate(*mark.args, **mark.kwargs)
        except (TypeError, ValueError) as error:
            text = f"@pytest.mark.gpu_host takes the arguments of simulate_gpu, but {error}"
            raise pytest.fail.Exception(text, pytrace=False) from None
    forbidden_by = _forbidding_downgrades(item)
    if forbidden_by is not None or "engine_log" in getattr(item, "fixturenames", ()):
        test = _test_of(item)
        test.forbidden_by = forbidden_by
        test.watch()


def _forbidding_downgrades(item: pytest.Item) -> str | None:
    """Return the name of the option or setting that forbids downgrades in a test, or None."""
    if item.get_closest_marker("allow_downgrade") is not None:
        return None
    if item.config.getoption("polars_no_downgrade"):
        return "--polars-no-downgrade"
    return "polars_no_downgrade" if item.config.getini("polars_no_downgrade") else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    test = item.stash.get(_TEST, None)
    if test is not None:
        test.check()
        test.passed = True
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: fixtures are torn down within the yield
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    test = item.stash.get(_TEST, None)
    if test is None:
        return (yield)
    try:
        result = yield
        if test.passed:
            test.check()
        return result
    finally:
        del item.stash[_TEST]
        test.stack.close()
