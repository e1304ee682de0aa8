"""
Every snippet of the README and of the pages in docs/ runs, and prints what stands below it.

test_services and test_recipes run those that begin with the name of a file, below which stands the
command that runs it, and the notebook.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import FILES, PAGES, PROGRAMS, ROOT, SNIPPETS, without_seconds

import polars_async
from polars_async.gpu.cudf import find_cudf_polars

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def environment():
    """Give the variables of a user, who has set none of those of polars-async and Polars."""
    chosen = ("POLARS_", "CUDA_", "CUDF_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(chosen)}
    # A nanny of dask warns where the machine is busy.
    return {**inherited, "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}


@pytest.mark.slow
@pytest.mark.parametrize("snippet", PROGRAMS, ids=lambda snippet: snippet.name)
def test_snippet_prints_what_stands_below_it(snippet, tmp_path):
    _, output = snippet.following
    if output.startswith("unknown") and find_cudf_polars().installed:
        pytest.skip("the page shows a host without cudf-polars")
    program = tmp_path / "snippet.py"
    program.write_text(snippet.code)
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=tmp_path,  # some write files
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    printed = without_seconds(done.stdout)
    assert (printed, done.stderr, done.returncode) == (without_seconds(output), "", 0)


def test_every_program_is_followed_by_its_output_and_every_file_by_its_command():
    languages = {snippet.language for snippet in SNIPPETS}
    assert languages <= {"python", "py", "text", "sh", "console"}
    assert len(PROGRAMS) > 20
    for snippet in SNIPPETS:
        following, _ = snippet.following
        if snippet.language == "python":
            prints = snippet.is_program or snippet.mark == "notebook"
            assert prints == (following == "text"), snippet.name
        assert snippet.file is None or following == "sh", snippet.name
        assert snippet.mark in ("", "notebook") or re.match("not run: .+", snippet.mark)


def test_no_two_files_of_the_pages_have_the_same_name():
    assert len(FILES) == sum(snippet.file is not None for snippet in SNIPPETS)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_a_page_names_can_be_run(page):
    for command in set(re.findall(r"\bci/[\w-]+(?![\w.])", page.read_text())):
        path = ROOT / command
        assert path.stat().st_mode & 0o111, command
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_and_sections_that_are_linked_exist(page):
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text()):
        target, _, section = link.partition("#")
        path = (page.parent / target) if target else page
        assert path.is_file(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings]
            assert section in anchors, link


def test_readme_names_every_page():
    linked = set(re.findall(r"\]\(docs/(.*?)\)", README))
    others = {"index.md", "changelog.md", "dask.md"}
    assert linked == {page.name for page in DOCS.glob("*.md")} - others


def test_reference_has_every_public_name():
    documented = set(re.findall(r"^\.\. auto\w+:: polars_async\.(\w+)$", api(), re.MULTILINE))
    assert documented == set(polars_async.__all__)


def api():
    return (DOCS / "api.md").read_text()


def test_errors_of_the_page_on_troubleshooting_are_those_of_the_library():
    page = (DOCS / "troubleshooting.md").read_text()
    texts = texts_of_library()
    quoted = [
        part.strip()
        for row in re.findall(r"^\| (\".*?) \|", page, re.MULTILINE)
        for text in re.findall(r'"(.*?)"', row)
        for part in text.split("…")
        if part.strip()
    ]
    assert len(quoted) > 20
    assert [each for each in quoted if not any(each in text for text in texts)] == []


def texts_of_library():
    """Give all strings of the library; where a value is put into one, an ellipsis stands."""
    texts = []
    for path in Path(polars_async.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    each.value if isinstance(each, ast.Constant) else "…" for each in node.values
                ]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
