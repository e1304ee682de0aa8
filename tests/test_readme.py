"""Every snippet of the README runs, and prints what stands below it; test_services serves those
that begin with the name of a file, below which stands the command that serves it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polars_async.gpu.cudf import find_cudf_polars

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```\n", re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
BLOCKS = [
    ("file" if FILE.match(code) else language, code) for language, code in BLOCK.findall(README)
]
PROGRAMS = [
    (code, BLOCKS[place + 1][1])
    for place, (language, code) in enumerate(BLOCKS)
    if language == "python"
]
FILES = {
    FILE.match(code)[1]: (code, BLOCKS[place + 1][1])
    for place, (language, code) in enumerate(BLOCKS)
    if language == "file"
}


@pytest.mark.parametrize(("code", "output"), PROGRAMS)
def test_snippet_prints_what_the_readme_says(code, output, tmp_path):
    if output.startswith("unknown") and find_cudf_polars().installed:
        pytest.skip("the README shows a host without cudf-polars")
    program = tmp_path / "snippet.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=tmp_path,  # some write files
        # A nanny of dask warns where the machine is busy.
        env={**os.environ, "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_every_program_is_followed_by_its_output():
    languages = [language for language, _ in BLOCKS]
    assert languages.count("python") == languages.count("text") == len(PROGRAMS) > 4
    for first, second in zip(languages, [*languages[1:], None], strict=True):
        assert (first == "python") == (second == "text")
        assert first != "file" or second == "sh"


@pytest.mark.parametrize(
    "command", ["ci/demo", "ci/test", "ci/bench", "ci/test-cudf", "ci/soak", "ci/gpu"]
)
def test_commands_of_the_readme_can_be_run(command):
    assert f"\n{command} " in README
    path = ROOT / command
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_sections_that_are_linked_exist():
    headings = {
        heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings
