"""The snippets of README.md and of the pages in docs/: what runs, and what it has to print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n+)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\w+\.py)\n")
_SECONDS = re.compile(r"\d+\.\d+ s\b")


@dataclass(frozen=True)
class Snippet:
    """
    A fenced block of code.

    A `mark` is the HTML comment before it: ``notebook``, where it is one of Jupyter, or
    ``not run: REASON``. `following` is the language and the code of the next block.
    """

    page: str
    number: int
    mark: str
    language: str
    code: str
    following: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{self.page}-{self.number}"

    @property
    def file(self) -> str | None:
        """The name of the file that this is, by its first line; None if it is none."""
        match = _FILE.match(self.code) if self.language == "python" else None
        return match and match[1]

    @property
    def is_program(self) -> bool:
        return self.language == "python" and self.file is None and not self.mark


def without_seconds(text: str) -> str:
    """Return `text` without what it says of durations, which differ from run to run."""
    return _SECONDS.sub("? s", text)


def _snippets(page: Path) -> list[Snippet]:
    blocks = _BLOCK.findall(page.read_text())
    following = [block[1:] for block in blocks[1:]]
    return [
        Snippet(page.name, number, *block, next_block or ("", ""))
        for number, (block, next_block) in enumerate(zip_longest(blocks, following), 1)
    ]


SNIPPETS = [snippet for page in PAGES for snippet in _snippets(page)]
PROGRAMS = [snippet for snippet in SNIPPETS if snippet.is_program]
FILES = {snippet.file: snippet for snippet in SNIPPETS if snippet.file}
