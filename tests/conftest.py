from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import warnings

import inside
import pytest
from places import PLACES, TINY, Blocked, until
from spares import Spares

from polars_async import Collector
from polars_async.scheduling import equality

__all__ = ["TINY", "Blocked"]

pytest_plugins = ["polars_async.pytest_plugin", "pytester"]

WITHOUT_PLUGINS = "-p no:dash -p no:faker"


def pytest_configure(config):
    # Queries that name no engine run on the same one, whatever the default of Polars is. Tests of
    # that default take this away.
    os.environ["POLARS_ASYNC_ENGINE"] = "in-memory"
    # Tests that start pytest leave out the plug-ins that pyproject.toml leaves out here.
    os.environ["PYTEST_ADDOPTS"] = WITHOUT_PLUGINS
    config.addinivalue_line(
        "markers",
        "everywhere(**elsewhere): what has an `executor` runs in each place where queries may run; "
        "but on threads alone with other values of its parameters than those that are named",
    )
    config.addinivalue_line(
        "markers",
        "cannot(*places, because, runs=True): what a place cannot do, which has to fail there; "
        "with runs=False it is not tried, since it would wait for ever",
    )
    config.addinivalue_line("markers", "slow: it takes seconds; ci/test --quick leaves it out")
    config.addinivalue_line("markers", "smoke: ci/test --quick runs it on both series of Polars")
    config.addinivalue_line(
        "markers",
        "one_series: it tests nothing that differs between the series of Polars; ci/test runs it "
        "on the newest Polars alone",
    )


def pytest_generate_tests(metafunc):
    if "executor" in metafunc.fixturenames and metafunc.definition.get_closest_marker("everywhere"):
        metafunc.parametrize("executor", PLACES, indirect=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  # tests may run without

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group_of(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "load" else None


def _group_of(test):
    """
    Return what is the same for tests that have to run in one process, one after the other.

    They share what takes seconds to start, or measure what others would disturb. xdist's own marks
    do nothing with pytest 9.2.
    """
    file = test.partition("::")[0]
    if re.search(r"\bdask\b", test) or file.endswith("test_futures.py"):
        return "dask"
    shares = ("test_benchmarks.py", "test_compare.py", "test_processes.py", "test_services.py")
    is_whole = file.endswith(shares)
    return file if is_whole else test


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if _is_shown_on_threads(item)]
    items[:] = [item for item in items if not _is_shown_on_threads(item)]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        assert " at 0x" not in item.nodeid, f"another id in each run: {item.nodeid}"
        place = _parameters(item).get("executor")
        if place == "dask" or {"run_script", "pytester"} & set(item.fixturenames):
            item.add_marker("slow")
        for mark in item.iter_markers("cannot"):
            unknown = set(mark.args).difference(PLACES)
            assert mark.args, "cannot() needs a place"
            assert not unknown, f"cannot() of no place: {unknown}"
            if place in mark.args:
                item.add_marker(_as_xfail(place, **mark.kwargs))


def pytest_collection_finish():
    # So that tests which collect garbage look at what they have made themselves: to look at all
    # modules takes a fifth of a second each time.
    gc.collect()
    gc.freeze()


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_shown_on_threads(item):
    """
    Whether another place would show nothing new, and take minutes for all of them.

    A loop is told of an end by this process in any case; so one loop is enough elsewhere. What else
    depends on no place is told by the mark of the test.
    """
    parameters = _parameters(item)
    if parameters.get("executor", "threads") == "threads":
        return False
    everywhere = item.get_closest_marker("everywhere")
    elsewhere = everywhere.kwargs if everywhere is not None else {}
    return getattr(parameters.get("loop"), "is_enough_on_threads", False) or any(
        parameters[name] not in (values if isinstance(values, list) else [values])
        for name, values in elsewhere.items()
    )


def _as_xfail(place, *, because, runs=True):
    return pytest.mark.xfail(reason=f"not in {place}: {because}", run=runs, strict=True)


@pytest.fixture(scope="session")
def _dask():
    """An executor of a cluster of its own, in which four queries may run at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from distributed import Client, LocalCluster  # noqa: PLC0415  # few tests need it
    logging.getLogger("distributed").setLevel(
        logging.ERROR
    )  # its daily business is no part of a test
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor(pure=False)


@pytest.fixture(scope="session")
def _spares():
    spares = Spares()
    yield spares
    spares.end()


@pytest.fixture
def no_spares(_spares):
    """Leave no worker processes but those that the test starts."""
    _spares.end()


@pytest.fixture
def warm_workers(_spares, monkeypatch):
    """Have pools take and give back idle workers, instead of starting and ending them."""
    _spares.lend_to_pools(monkeypatch)


@pytest.fixture
def executor(request):
    """Where a collector of the test runs its queries."""
    place = getattr(request, "param", "threads")
    if place == "dask":
        return request.getfixturevalue("_dask")
    # What is caught of a worker's output and logs is settled when it starts.
    if place == "processes" and not {"capfd", "caplog"} & set(request.fixturenames):
        request.getfixturevalue("warm_workers")
    return place


@pytest.fixture
def is_given_up(executor):
    """Show what becomes of the one query that was let go while it ran, before it may go on."""

    def show(collector):
        if executor == "threads":  # where nothing stops it
            stats = collector.stats()
            assert (stats["running"], stats["abandoned"]) == (1, 1)
        else:
            until(lambda: not collector.stats()["abandoned"])

    return show


@pytest.fixture
def is_that(executor):
    """Tell whether an error is the one that was raised: that itself, or a copy from elsewhere."""

    def is_that(error, raised):
        if executor == "threads":
            return error is raised
        return (type(error), error.args) == (type(raised), raised.args)

    return is_that


@pytest.fixture
def blocked():
    query = Blocked()
    yield query
    query.gate.set()


@pytest.fixture
def collector(blocked, executor):
    """One slot; all its queries are let go on before it is closed."""
    collector = Collector(max_running=1, executor=executor)
    yield collector
    blocked.gate.set()
    collector.close()
    assert not collector._cpu.admission.running
    assert not collector._cpu.admission.waiting


@pytest.fixture
def main():
    """Run code as if it were that of the program, and give the names that it has."""
    names = vars(sys.modules["__main__"])
    before = dict(names)

    def run(code):
        exec(code, names)
        return names

    yield run
    names.clear()
    names.update(before)


@pytest.fixture
def pytester(pytester, monkeypatch):
    """Run pytest as usual, which forgets all options of this run, without those plug-ins."""
    monkeypatch.setenv("PYTEST_ADDOPTS", WITHOUT_PLUGINS)
    return pytester


@pytest.fixture
def run_script():
    """Run a program of its own, and give what it printed; it must print no error."""

    def run(script, *arguments):
        command = [sys.executable, "-c", script, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        assert (run.returncode, run.stderr) == (0, ""), run.stderr  # all of it
        return run.stdout.split()

    return run


class Blocks(list):
    """Makes queries that run until they are freed."""

    def __call__(self):
        self.append(Blocked())
        return self[-1]

    def free(self):
        for each in self:
            each.gate.set()


@pytest.fixture
def block():
    blocks = Blocks()
    yield blocks
    blocks.free()


@pytest.fixture
def small_frames(monkeypatch):
    """Have frames in memory taken for small ones, whatever other tests have left there."""
    monkeypatch.setattr(equality, "MUCH_HELD", 1 << 60)


@pytest.fixture
def make(block, executor):
    """Make collectors that are closed in the end."""
    made = []

    def make(**options):
        made.append(Collector(executor=executor, **options))
        return made[-1]

    yield make
    block.free()
    for each in made:
        each.close()
        assert inside.running(each) == inside.waiting(each) == 0
