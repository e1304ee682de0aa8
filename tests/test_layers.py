"""The layers of the package: what each module may import, for types, too."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import polars_async

LAYERS = (
    ("errors", "reasons"),
    ("_runtime",),
    ("bridges",),
    ("gpu",),
    ("resolution",),
    ("wording",),
    ("events", "progress"),
    ("executors",),
    ("scheduling",),
    ("handle", "iteration", "options", "streams", "sharing", "watches"),
    ("collector",),
    ("api", "drawing", "engine", "showing"),
    ("compare",),
    (
        "testing",
        "pytest_plugin",
        "doctor",
        "cli",
        "__main__",
        "_pytest_entry",
        "starlette",
        "instrumentation",
    ),
)
"""From the lowest to the highest. The package itself names what is public, and is above all."""
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
ROOT = Path(polars_async.__file__).parent


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(ROOT.rglob("*.py")) if _name(path)}


def imported_by(path):
    """List the modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polars_async"):
            parent = node.module.removeprefix("polars_async").removeprefix(".")
            names = {".".join(filter(None, (parent, each.name))) for each in node.names}
            yield from {name if name in MODULES else parent for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_of_a_higher_layer(module):
    layer = LAYER_OF[module.partition(".")[0]]
    imported = set(imported_by(MODULES[module])) - {""}
    assert not {name for name in imported if LAYER_OF[name.partition(".")[0]] > layer}


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported_by(path)) - {name, ""} for name, path in MODULES.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)
