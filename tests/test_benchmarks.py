"""The benchmarks run, in a size that says nothing, and no contender goes without figures."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu, load
from benchmarks.contenders import NATIVE, OWN

CACHE = Path(__file__).parents[1] / ".cache" / "data"


@pytest.mark.parametrize("row", ["p6", "p7", "p8", "r3"])
def test_load_measures_every_contender(row, capsys):
    sizes = ["--quick", "--runs=1", "--exits=1", "--scale=0.03", f"--data={CACHE}"]
    assert load.main([row, *sizes, "--max-running", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{OWN} max_running=1" in printed
    assert "failed" not in printed
    # Polars' own may abort at the exit, after its figures.
    assert not [line for line in printed.splitlines() if OWN in line and "run 1 of 1:" in line]


def test_load_says_why_a_contender_has_no_figures(capsys):
    assert load.main(["p7", "--quick", "--runs=1", "--timeout=0.01"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [f"  P7 {who}, run 1 of 1: no end after 0.01 s" for who in (NATIVE, OWN)]


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
    assert [each["name"] for each in report["checks"]] == [*names, "speed"]
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
        ("time.sleep(600)", "**was killed: no end in time**"),
        ("print(json.dumps({'what': 'then', 'found': 'a fault', 'ok': False}))", "1 of 2 FAILED"),
        ("print(json.dumps({'row': {'query': 'q1'}, 'ok': False}))", "1 of 2 FAILED"),
    ],
)
def test_gpu_report_outlives_a_check_that_fails(end, verdict, capsys, tmp_path, monkeypatch):
    checks = tmp_path / "benchmarks" / "gpu_checks.py"
    checks.parent.mkdir()
    checks.write_text(
        "import json, os, sys, time\n"
        "print('noise')\n"
        "print(json.dumps({'what': 'before', 'found': 'all', 'ok': True}), flush=True)\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        f"if sys.argv[1] == 'offload': {end}\n"
    )
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    monkeypatch.setattr(gpu, "_SHORTEST", 0.0)
    minutes = 0.02 if "sleep" in end else 1
    asked = ["offload", "collectors", f"--minutes={minutes}", f"--report={tmp_path / 'report.md'}"]
    assert gpu.main(asked) == 1
    printed = capsys.readouterr().out
    assert f"## Offload: {verdict}\n\n- ok: before: all\n" in printed
    assert ("Its process" in printed) == ("last words\n" in printed) == ("**" in verdict)
    if "sleep" in end:
        assert "- Two collectors: the 0.02 minutes were up" in printed
    else:
        assert "| Two collectors | passed |" in printed
