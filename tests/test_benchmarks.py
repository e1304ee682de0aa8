"""The benchmarks run, in a size that says nothing, and no contender goes without figures."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pytest
import uvloop
from places import until
from snippets import ROOT, SNIPPETS

from benchmarks import runner
from benchmarks.__main__ import main
from benchmarks.contenders import (
    ADAPTIVE,
    CPU_ENGINES,
    POLARS,
    POLARS_ASYNC,
    POLARS_ASYNC_THREADS,
    THREADS,
    on,
)
from benchmarks.gpu import __main__ as gpu
from benchmarks.measure import mix, open_loop
from benchmarks.report import charts, table
from benchmarks.report.results import Environment, Ratio, Report, Result, spread
from benchmarks.runner import Case, Metric, Options, measure
from benchmarks.suites import SUITES, engines, latency, load, suite
from benchmarks.targets import TARGETS

# Before there are threads: two that import at once may fail in pytest's rewriting on Python 3.11.
from polars_async.bridges import gevent as _gevent  # noqa: F401
from polars_async.bridges import trio as _trio  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # some of Polars' own never end, and are waited for
]

CACHE = ROOT / ".cache" / "data"


SIZES = ["--quick", "--runs=1", "--scale=0.03", f"--data={CACHE}"]


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that say nothing, and hardly any time."""
    monkeypatch.setattr(engines, "QUERIES", {n: engines.QUERIES[n] for n in (1, 6)})
    monkeypatch.setattr(load, "_LOAD_FACTORS", (0.5,))
    monkeypatch.setattr(load, "_MIX_FACTORS", (0.5,))

    def cases(module):
        found = module.cases

        def smaller(options):
            return [
                replace(case, runs=1, size={**case.size, **shrunk(case.size)})
                for case in found(options)
            ]

        monkeypatch.setattr(module, "cases", smaller)

    for name in SUITES:
        cases(suite(name))


# Forks for each line, which is a list in JSON: a file for stdout, one for stderr, the seconds that
# the run may take, and the arguments of run_one; and tells the exit status, or that it was killed.
FORKS = """
import json, os, runpy, select, signal, sys
import polars, gevent, trio, uvloop
import polars_async.api, polars_async.bridges.asyncio, polars_async.bridges.trio
from benchmarks.suites import engines, faults, latency, load, processes, remote
engines.QUERIES = {number: engines.QUERIES[number] for number in (1, 6)}
for line in sys.stdin:
    out, err, seconds, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate((os.devnull, out, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.argv[1:] = arguments
        runpy.run_module("benchmarks.measure.run_one", run_name="__main__")
        break  # and so comes to the end that a program has
    file = os.pidfd_open(child)
    ended = select.select([file], [], [], seconds)[0]
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(file)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status if ended else None), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """Start a process that has imported what contenders need, which takes each a third second."""
    command = [sys.executable, "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield process


@pytest.fixture
def forked(forks, monkeypatch, tmp_path):
    """Run contenders in forks; those of test_reports_become_one_with_charts are real programs."""

    def run(command, *, timeout, **_):
        out, err = tmp_path / "out", tmp_path / "err"
        for path in (out, err):
            path.write_text("")
        python, option, module, *arguments = command
        assert (python, option, module) == (sys.executable, "-m", "benchmarks.measure.run_one")
        forks.stdin.write(json.dumps([str(out), str(err), timeout, *arguments]) + "\n")
        forks.stdin.flush()
        status = json.loads(forks.stdout.readline())
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())

    patched = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(runner, "subprocess", patched)


def shrunk(size):
    least = {"trips": 10, "fan": 10, "rows": 10_000, "seconds": 0.2, "number": 1, "queries": [0, 6]}
    least |= {"scale": 0.01, "requests": mix.HUNDRED}
    return {name: least[name] for name in size if name in least}


def native(contenders):
    """Those that run Polars with nothing of ours, which may abort at the exit of their process."""
    return {who for who in contenders if who.startswith((POLARS, THREADS))}


@pytest.mark.one_series
@pytest.mark.parametrize("name", SUITES)
@pytest.mark.usefixtures("tiny", "forked")
def test_suite_measures_every_contender(name, capsys, tmp_path):
    path = tmp_path / "found.json"
    assert main(["run", name, *SIZES, f"--json={path}"]) == 0
    assert f"Polars {pl.__version__}" in capsys.readouterr().out
    report = Report.read(path)
    assert [each.polars for each in report.environments] == [pl.__version__]
    for case in suite(name).cases(Options(CACHE, quick=True, scale=0.03)):
        for metric in case.metrics:
            found = [
                each.contender
                for each in report.results
                if (each.case, each.metric) == (case.name, metric.name)
            ]
            # Those of Polars alone may abort before their figures.
            assert set(case.contenders) - set(found) <= native(case.contenders)
            ratios = {
                (each.target, each.contender, each.against)
                for each in report.ratios
                if (each.case, each.metric) == (case.name, metric.name)
            }
            for what, target in metric.targets.items():
                aborted = target.of in native(case.contenders) - set(found)
                assert (what, target.who, target.of) in ratios or aborted
    # Those may have their figures all the same.
    errors = [each for each in report.errors if each.run]
    assert [each for each in errors if not native([each.contender])] == []


def test_suite_is_a_file_as_in_the_documentation(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    page = [each for each in SNIPPETS if each.page == "benchmarks.md"]
    (code,) = [each.code for each in page if each.language == "py"]
    assert len(code.splitlines()) < 30
    (tmp_path / "benchmarks" / "suites" / "sums.py").write_text(code)
    path = tmp_path / "found.json"
    command = ["benchmarks", "run", "sums", "--quick", f"--json={path}"]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert not done.returncode, done.stderr
    report = Report.read(path)
    runs = {each.contender: len(each.runs) for each in report.results}
    aborts = [each for each in report.errors if each.contender == POLARS]  # at its exit, at times
    assert report.errors == aborts
    assert runs[POLARS_ASYNC] == 2
    assert runs.get(POLARS, 0) <= 2 <= runs.get(POLARS, 0) + len(aborts)  # some have figures, too


@pytest.mark.timeout(180)  # each run of a contender is a process
@pytest.mark.usefixtures("tiny")
def test_reports_become_one_with_charts(tmp_path, capsys, monkeypatch):
    cases = latency.cases
    monkeypatch.setattr(latency, "cases", lambda options: cases(options)[:2])
    one = str(tmp_path / "one.json")
    assert main(["run", "latency", *SIZES, f"--json={one}"]) == 0
    capsys.readouterr()
    assert main(["show", one, one, f"--output={tmp_path}"]) == 0
    targets = (tmp_path / "targets.md").read_text()
    assert capsys.readouterr().out.endswith(f"\n\n{targets}")
    report = Report.read(tmp_path / "results.json")
    assert len(report.results) == 2 * len(Report.read(tmp_path / "one.json").results)
    assert "lower is better" in (tmp_path / "targets.svg").read_text()
    for name in ("latency-round-trip", "targets"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "latency: round trip" in page
    assert 'src="http' not in page
    assert main(["compare", one, one]) == 0
    assert "within noise" in capsys.readouterr().out


def test_targets_stand_in_one_table_for_both_polars():
    report = Report(environments=[environment(polars="1.44.2"), environment(polars="2.1.0")])
    found = [
        ("1.44.2", "tiny", "trip", "us", 0.5, POLARS, "round trip", "<= 0.5", True),
        ("2.1.0", "tiny", "trip", "us", 0.9, POLARS, "round trip", "<= 0.4", False),
        ("2.1.0", "import", "time", "ms", 9.0, None, "import", "<= 20", True),
        ("1.44.2", "one", "lines", "in 10 runs", 0.0, None, "stderr", "<= 0", True),
        ("1.44.2", "another", "lines", "in 10 runs", 3.0, None, "stderr", "<= 0", False),
        ("1.44.2", "free", "time", "s", 0.3, POLARS, None, None, None),
        ("2.1.0", "trivial", "trip", "ms", 0.4, None, "in a process", "<= 1", True),
        ("2.1.0", "trivial", "trip", "ms", 0.1, "dask", "beside dask", "<= 0.25", True),
    ]
    for polars, case, metric, unit, figure, against, target, limit, holds in found:
        middle = {"median": figure, "min": figure, "max": figure}
        place = {"polars": polars, "suite": "latency", "case": case, "metric": metric}
        report.results.append(
            Result(
                **place, contender=POLARS_ASYNC, unit=unit, better="lower", runs=[figure], **middle
            )
        )
        report.ratios.append(
            Ratio(
                **place,
                **middle,
                contender=POLARS_ASYNC,
                against=against,
                target=target,
                limit=limit,
                holds=holds,
            )
        )
    assert table.targets(report).splitlines() == [
        "| ratio to Polars' own, or figure with a unit | target | 1.44.2 | 2.1.0 |",
        "| --- | --- | --- | --- |",
        "| round trip | <= 0.5, <= 0.4 | 0.5 ✓ | 0.9 ✗ |",
        "| import | <= 20 ms | not run | 9 ✓ |",
        "| stderr | <= 0 in 10 runs | 3 ✗ | not run |",
        "| in a process | <= 1 ms | not run | 0.4 ✓ |",
        "| beside dask | <= 0.25 (to dask) | not run | 0.1 ✓ |",
    ]


@pytest.fixture(scope="module")
def every_case():
    options = Options(CACHE, quick=True, scale=0.03)
    return [case for name in SUITES for case in suite(name).cases(options)]


def test_ratios_between_other_contenders_have_a_table_of_their_own(capsys):
    report = Report(environments=[environment(polars="2.1.0")])
    pairs = [
        ("mix", on(POLARS_ASYNC, "streaming"), on(POLARS, "streaming"), "of the mix, streaming"),
        ("tiny", POLARS_ASYNC, POLARS, "of tiny, in-memory"),
    ]
    for case, *pair, target in pairs:
        for who in pair:
            report.results.append(replace(result(1, 2), case=case, contender=who))
        report.ratios.append(ratio(1, case=case, pair=pair, target=target))
    table.show(report)
    mixed, tiny, others = capsys.readouterr().out.split("┏")[1:]
    assert "ratio" not in mixed
    assert "ratio to Polars' own" in tiny
    assert "polars-async, streaming" not in tiny
    assert "of the mix, streaming" in others
    assert "of tiny" not in others
    (row,) = [line for line in table.targets(report).splitlines() if "of the mix" in line]
    assert row == "| of the mix, streaming | <= 2 | 1 ✓ |"


@pytest.mark.parametrize(
    ("limit", "figures", "worst"),
    [
        ("<= 2", [(1, True), (3, False), (2.5, False)], 3),
        ("<= 2", [(1, True), (2, True)], 2),
        (">= 2", [(3, True), (1, False), (1.5, False)], 1),
        (">= 2", [(3, True), (2, True)], 2),
    ],
)
def test_target_of_several_cases_is_shown_where_it_is_worst(limit, figures, worst):
    found = [ratio(figure, limit=limit, holds=holds) for figure, holds in figures]
    assert table.worst(found).median == worst


def test_every_contender_has_a_colour_in_charts():
    names = ["mine", on(POLARS, "in-memory"), on(POLARS_ASYNC, "streaming"), POLARS_ASYNC_THREADS]
    found = charts._coloured(names)
    assert list(found) == [names[2], names[1], POLARS_ASYNC_THREADS, "mine"]
    assert found[names[2]] == charts._COLOURS[POLARS_ASYNC]
    assert found[POLARS_ASYNC_THREADS] == charts._COLOURS[POLARS_ASYNC_THREADS]
    assert len({*found.values()}) == 4


def test_each_target_is_that_of_one_suite(every_case):
    found = {name for case in every_case for metric in case.metrics for name in metric.targets}
    assert found == set(TARGETS)


def test_engine_of_polars_own_is_said(every_case):
    said = (*CPU_ENGINES, ADAPTIVE, "each engine", "(default)")
    for case in every_case:
        for who in native(case.contenders):
            assert case.name.endswith(said) or who.endswith(said), case
    for name, target in TARGETS.items():
        assert target.of is None or not target.of.startswith(POLARS) or name.endswith(said)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_default_engine_of_polars_own_is_the_one_marked(engine, monkeypatch):
    asked, alone = [], []
    monkeypatch.setattr(
        pl.LazyFrame, "collect_async", lambda lf, **options: asked.append(options) or answer(lf)
    )
    monkeypatch.setattr(mix._Shape, "alone", lambda _, engine: alone.append(engine) or 1.0)
    contender = on(POLARS, engine)
    load.run("mix of five sizes", contender, rate=1e6, requests=mix.HUNDRED, scale=0.001)
    is_default = engine == ("in-memory" if pl.__version__.startswith("1.") else "streaming")
    assert contender.endswith("(default)") is is_default
    assert {*map(str, asked)} == {str({} if is_default else {"engine": engine})}
    assert {*alone} == {engine}


async def answer(lf):
    return lf


def test_uvloop_is_a_loop_of_its_own(monkeypatch):
    loops = []

    async def submit(_):
        loops.append(type(asyncio.get_running_loop()))

    for loop in ("asyncio", "asyncio (uvloop)"):
        monkeypatch.setitem(latency._SUBMITS, (loop, POLARS), lambda _: submit)
        latency.run(f"tiny, {loop}, in-memory", POLARS, trips=10, fan=1)
    assert [*dict.fromkeys(loops)] == [asyncio.SelectorEventLoop, uvloop.Loop]


@pytest.mark.parametrize("what", ["heavy", "eager"])
@pytest.mark.parametrize("loop", ["asyncio", "gevent"])
def test_tiny_queries_are_submitted_beside_heavy_work(what, loop, monkeypatch):
    submits, collect_each = latency._submits, latency._collect_each
    order = []

    def recording(contender, **options):
        submit, _ = submits(contender, **options)
        return lambda lf: order.append("a" in lf.collect_schema()) or submit(lf), None

    def heavy(queries):
        order.extend([False] * len(queries))
        assert threading.current_thread() is not threading.main_thread()
        until(lambda: order[-1])  # else it may end before the next tiny one
        collect_each(queries)

    monkeypatch.setattr(latency, "_submits", recording)
    monkeypatch.setattr(latency, "_collect_each", heavy)
    case = f"tiny beside {'6 heavy' if what == 'heavy' else 'eager work'}, {loop}, in-memory"
    latency.run(case, POLARS_ASYNC, rows=100_000)
    assert order.count(False) == 2 * 6
    assert order[: latency._KNOWN] == [True] * latency._KNOWN  # so that it is known
    assert order[-1]


def test_inline_takes_part_once_there_is_such_an_option():
    code = (
        "import polars_async as pa\n"
        "from benchmarks import contenders\n"
        "contenders.HAS_INLINE = True\n"
        "from benchmarks.suites import latency\n"
        "from benchmarks.runner import Options\n"
        "from benchmarks.targets import TARGETS\n"
        "who = contenders.POLARS_ASYNC_NOT_INLINE\n"
        "cases = latency.cases(Options(None, quick=True))\n"
        "named = {name for case in cases for each in case.metrics for name in each.targets}\n"
        "mine = {name for name, each in TARGETS.items() if who in (each.who, each.of)}\n"
        "assert len(mine) == 6 and mine <= named, mine - named\n"
        "tiny = [case for case in cases if case.name.startswith('tiny')]\n"
        "assert all(who in case.contenders or 'each engine' in case.name for case in tiny)\n"
        "pa.configure = lambda **options: print(options)\n"
        "latency.run('tiny, asyncio, in-memory', who, trips=10, fan=1)\n"
        "latency.run('tiny, asyncio, in-memory', contenders.POLARS_ASYNC, trips=10, fan=1)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not done.returncode, done.stderr
    assert done.stdout == "{'inline': 0}\n"


def test_every_hundred_requests_of_the_mix_have_the_shares():
    shapes = mix._shapes(0.001)
    order = list(mix._order(shapes, 2 * mix.HUNDRED))
    shares = {"tiny": 60, "small": 20, "medium": 12, "large": 6, "huge": 2}
    for hundred in order[:100], order[100:]:
        assert Counter(shape.size for shape in hundred) == shares
        assert set(hundred) == set(shapes)
    assert order[:100] != order[100:]


def test_slowdown_of_the_mix_is_by_the_time_alone_of_each_shape():
    shapes = mix._shapes(0.001)
    found = mix._figures(shapes, range(1, 11), dict.fromkeys(shapes, 0.5))
    assert found["mean slowdown"] == 11.0
    assert [found[f"p50 of {name}"] for name in mix.SIZES] == [1000, 3000, 5000, 7000, 9000]
    assert [found[f"p95 of {name}"] for name in mix.SIZES] == [2000, 4000, 6000, 8000, 10_000]
    found = mix._figures(shapes, [1] * 10, {shape: 0.5 * n for n, shape in enumerate(shapes, 1)})
    assert found["mean slowdown"] == pytest.approx(sum(2 / n for n in range(1, 11)) / 10)


def test_latency_counts_from_when_the_request_was_due(monkeypatch):
    now = 0.0
    monkeypatch.setattr(open_loop, "time", SimpleNamespace(perf_counter=lambda: now))

    async def submit(seconds):
        nonlocal now
        now += seconds  # and holds up the loop

    requests = [(0.0, 10), (0.01, 10), (0.02, 5)]
    assert asyncio.run(open_loop.latencies(submit, requests)) == [10, 19.99, 24.98]


def test_request_without_an_answer_counts_with_its_time_so_far(monkeypatch):
    monkeypatch.setattr(open_loop, "_PATIENCE", 0.01)
    cancelled = []

    async def submit(answered):
        try:
            await asyncio.sleep(0 if answered else 600)
        except asyncio.CancelledError:
            cancelled.append(answered)
            raise

    requests = [(0.0, False), (0.0, True), (0.0, False)]
    found = asyncio.run(open_loop.latencies(submit, requests))
    assert found[0] > found[1] < found[2]
    assert cancelled == [False, False]


def environment(**changed):
    return replace(Environment.here(quick=True), **changed)


def result(*runs, better="lower", metric="time"):
    return Result(
        "2.1.0", "latency", "a case", POLARS_ASYNC, metric, "ms", better, runs=runs, **spread(runs)
    )


def ratio(figure, *, case="a case", pair=(POLARS_ASYNC, POLARS), limit="<= 2", **changed):
    holds = {"target": "a target", "holds": True, **changed}
    place = ("2.1.0", "latency", case, "time")
    return Ratio(*place, *pair, figure, figure, figure, limit=limit, **holds)


@pytest.mark.parametrize(
    ("old", "new", "better", "verdict"),
    [
        ((3, 4, 5), (1, 2), "lower", "better"),
        ((3, 4, 5), (1, 2), "higher", "worse"),
        ((3, 4, 5), (6, 7), "lower", "worse"),
        ((3, 4, 5), (6, 7), "higher", "better"),
        ((3, 4, 5), (5, 9), "lower", "within noise"),
        ((3,), (3,), "lower", "within noise"),
    ],
)
def test_change_is_one_where_the_spreads_do_not_meet(old, new, better, verdict):
    assert table.change(result(*old, better=better), result(*new, better=better)) == verdict


def test_comparison_names_what_is_in_one_alone(capsys):
    table.compare(
        Report(results=[result(1), result(2, metric="gone")]), Report(results=[result(9)])
    )
    printed = capsys.readouterr().out
    assert "worse" in printed
    assert "not in the new report: a case, polars-async, gone" in printed


@pytest.mark.parametrize(
    "text", [None, "", "# no JSON", "[]", '{"schema": 1}', "{}", '{"schema": 2, "results": 3}']
)
@pytest.mark.parametrize("command", ["compare", "show"])
def test_file_that_is_no_report_is_named(tmp_path, text, command):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    rest = [str(path)] if command == "compare" else [f"--output={tmp_path}"]
    with pytest.raises(SystemExit, match=r"cannot read the report, .*: .*other\.json"):
        main([command, str(path), *rest])


def test_contender_that_does_not_end_is_a_row():
    case = Case(
        "latency",
        "tiny, asyncio, in-memory",
        (POLARS_ASYNC,),
        (Metric("round trip", "us"),),
        {"trips": 10, "fan": 10},
        timeout=0.01,
    )
    report = measure([case], 1, quick=True)
    assert report.results == []
    assert [(each.contender, each.what) for each in report.errors] == [
        (POLARS_ASYNC, "no end after 0.01 s"),
    ]
    table.show(report)


def test_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["run", "speed", "--json=x"])
    known = "engines, faults, latency, load, memory, processes, remote"
    assert f"no such suite: speed; choose from {known}" in capsys.readouterr().err


GPU = ["--scale=0.03", f"--data={CACHE}", "--exits=1", "--queries", "6", "17"]


def test_gpu_checks_run_on_a_simulated_gpu(capsys, tmp_path):
    path = tmp_path / "report.md"
    assert gpu.main(["--simulate", f"--report={path}", *GPU]) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed[:50]
    assert path.read_text() == printed
    assert "Nothing: every check ran to its end." in printed
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["simulated"]
    names = ["facts", "offload", "data", "answers", "memory", "collectors", "stall", "exits"]
    names += ["speed", "throughput", "compare"]
    assert [each["name"] for each in report["checks"]] == names
    assert {each["verdict"] for each in report["checks"]} == {"passed"}


def test_gpu_says_what_could_not_be_run_without_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main([f"--report={tmp_path / 'report.md'}", *GPU]) == 2
    printed = capsys.readouterr().out
    assert "**No GPU is usable here, so nothing was checked:** " in printed
    assert "SIMULATED" not in printed
    assert "- Offload, Data of scale 0.03, Answers at scale 0.03, Out of memory, " in printed


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        ("os.abort()", "**died of SIGABRT**"),
        ("sys.exit(3)", "**died, exit status 3**"),
        ("raise MemoryError('cuda')", "**died, exit status 1**"),
        ("open('asleep', 'w'), time.sleep(600)", "**was killed at its time limit**"),
        ("print(json.dumps({'what': 'then', 'found': 'a fault', 'ok': False}))", "1 of 2 FAILED"),
        ("print(json.dumps({'row': {'query': 'q1'}, 'ok': False}))", "1 of 2 FAILED"),
    ],
)
def test_gpu_report_outlives_a_check_that_fails(end, verdict, capsys, tmp_path, monkeypatch):
    check, asleep = tmp_path / "benchmarks" / "gpu" / "run_check.py", tmp_path / "asleep"
    wait_for = gpu._wait

    def wait(process, seconds):
        until(lambda: asleep.exists() or process.poll() is not None)
        return wait_for(process, 0.0 if asleep.exists() else seconds)

    check.parent.mkdir(parents=True)
    check.write_text(
        "import json, os, sys, time\n"
        "print('noise')\n"
        "print(json.dumps({'what': 'before', 'found': 'all', 'ok': True}), flush=True)\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        f"if sys.argv[1] == 'offload': {end}\n"
    )
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    if "sleep" in end:  # the time is over once it sleeps
        clock = SimpleNamespace(monotonic=lambda: 3600.0 if asleep.exists() else 0.0)
        monkeypatch.setattr(gpu, "time", clock)
        monkeypatch.setattr(gpu, "_wait", wait)
    asked = ["offload", "collectors", "--minutes=1", f"--report={tmp_path / 'report.md'}"]
    assert gpu.main(asked) == 1
    printed = capsys.readouterr().out
    assert f"## Offload: {verdict}\n\n- ok: before: all\n" in printed
    assert ("Its process" in printed) == ("last words\n" in printed) == ("**" in verdict)
    if "sleep" in end:
        assert "- Two collectors: the 1 minutes were over" in printed
    else:
        assert "| Two collectors | passed |" in printed


def test_steps_of_a_query_are_measured():
    micro = ROOT / "benchmarks" / "micro.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        micro,
        "-p",
        "no:cacheprovider",
        "--benchmark-disable",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.returncode, done.stdout
    assert re.search(r"^=+ 21 passed in", done.stdout, re.MULTILINE)
