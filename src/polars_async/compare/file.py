"""The queries and engines that a Python file has, which is imported."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from polars_async.errors import describe

if TYPE_CHECKING:
    from types import ModuleType

_SEPARATORS: Final = re.compile("[,:]")
_PROGRAM: Final = "main"
WANTED: Final = (
    "a query is a LazyFrame of the file, or a function of it that returns one and needs no "
    "arguments, and its name does not begin with _"
)


def split_argument(argument: str) -> tuple[Path, list[str]]:
    """
    Return the file, and the names, of an argument such as ``FILE:NAME,NAME``.

    Raises
    ------
    ValueError
        There is no such file, or it is not one of Python, or no name follows the colon.
    """
    path, names = Path(argument), ""
    if not path.exists():
        # From the left: the names may be separated by colons, too.
        file, colon, names = argument.partition(":")
        path = Path(file)
        if colon and not _names(names):
            raise ValueError(f"a name must follow the colon of {argument!r}, as in FILE:NAME,NAME")
    if not path.is_file():
        raise ValueError(f"FILE must be a Python file with queries, and there is no file {path}")
    if path.suffix != ".py":
        raise ValueError(f"FILE must be a Python file, whose name ends with .py, got {path}")
    return path.resolve(), _names(names)


def _names(names: str) -> list[str]:
    return list(dict.fromkeys(filter(None, map(str.strip, _SEPARATORS.split(names)))))


def import_file(path: Path) -> ModuleType:
    """
    Import a file as a module, not as ``__main__``, with its folder first in ``sys.path``.

    Raises
    ------
    ValueError
        The file raises, or it ends the program.
    """
    name = f"{path.stem}_compared" if path.stem in sys.modules else path.stem
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses, for one, need it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(
            f"{path} cannot be imported ({describe(error)}): it must be a Python file that can "
            'be, so put what only a program should do under `if __name__ == "__main__":`'
        ) from error
    return module


def find_queries(module: ModuleType, names: list[str]) -> dict[str, Any]:
    """
    Return the LazyFrames and functions of a module by their names: those named, or else all.

    Of functions that are not named, these are left out: ``main``, and those whose annotation says
    that they return something else.

    Raises
    ------
    ValueError
        A name is not that of a query, or no query was found.
    """
    imported = _imported(Path(str(module.__file__)))
    found = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in imported and _may_be_query(value)
    }
    if not names:
        queries = {name: value for name, value in found.items() if _is_meant(name, value)}
        if not queries:
            raise ValueError(f"{module.__file__} has no queries: {WANTED}")
        return queries
    for name in names:
        if name not in found:
            known = ", ".join(found) or "none"
            raise ValueError(
                f"{name!r} is no query of {module.__file__}, which has {known}: {WANTED}"
            )
    return {name: found[name] for name in names}


def find_engine(module: ModuleType, name: str) -> pl.Engine | None:
    """Return the engine object that a module calls `name`; None if there is none."""
    engine = getattr(module, name, None)
    return engine if isinstance(engine, pl.Engine) else None


def _imported(path: Path) -> set[str]:
    """Return the names that a file imports."""
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def _may_be_query(value: object) -> bool:
    if isinstance(value, pl.LazyFrame):
        return True
    if not callable(value) or isinstance(value, type | pl.Expr):
        return False
    if inspect.iscoroutinefunction(value) or inspect.isgeneratorfunction(value):
        return False
    with suppress(ValueError, TypeError):  # such as of what is not written in Python
        inspect.signature(value).bind()
        return True
    return False


def _is_meant(name: str, value: Any) -> bool:
    """Return whether to take a query that was not named: no function is to be called by chance."""
    if isinstance(value, pl.LazyFrame):
        return True
    hints: dict[str, Any] = {}
    with suppress(Exception):  # such as a name that is there for type checkers alone
        hints = typing.get_type_hints(value)
    if "return" in hints:
        return hints["return"] is pl.LazyFrame
    written = getattr(value, "__annotations__", {}).get("return")
    if isinstance(written, str):
        return written.rpartition(".")[2] == pl.LazyFrame.__name__
    return name != _PROGRAM
