"""Which cudf-polars is installed, found without importing it: that takes half a second and CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import polars as pl

from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from importlib.metadata import Distribution

MODULE: Final = "cudf_polars"


class Build(NamedTuple):
    """One of the distributions of cudf-polars, and the oldest GPU and driver that it runs on."""

    name: str
    compute_capability: tuple[int, int]
    cuda_version: tuple[int, int]


CU12: Final = Build("cudf-polars-cu12", (7, 0), (12, 2))
CU13: Final = Build("cudf-polars-cu13", (7, 5), (13, 0))
# Conda's distribution does not tell which CUDA it is for, and a stand-in module tells nothing: the
# rules that are easier to pass then hold, and what they let through too much fails when it runs.
UNKNOWN: Final = Build("cudf-polars", CU12.compute_capability, CU12.cuda_version)


class CudfPolars(NamedTuple):
    """What is known of cudf-polars on this host, and what rules it out."""

    installed: bool = True
    build: Build = UNKNOWN
    version: str | None = None
    diagnosis: Diagnosis | None = None

    def __str__(self) -> str:
        return self.build.name if self.version is None else f"{self.build.name} {self.version}"


_import_failure: str | None = None
_override: CudfPolars | None = None


def note_import_failure(error: BaseException) -> None:
    """
    Record that ``import cudf_polars`` raised `error`, which cannot be known without trying.

    Whoever imports it calls this, and `polars_async.gpu_status` says so from then on, until
    cudf-polars is imported after all or the status is asked with ``refresh=True``.

    Parameters
    ----------
    error
        What the import raised; its type and the first line of its text are kept.
    """
    global _import_failure  # noqa: PLW0603  # a fact about the process
    _import_failure = described(error)


def described(error: BaseException) -> str:
    """Give the type of an error and the first line of its text."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def forget_import_failure() -> None:
    """Take an import that failed for one that has not been tried."""
    global _import_failure  # noqa: PLW0603  # a fact about the process
    _import_failure = None


def imported() -> object:
    """Give the module if it is imported, None if its import is blocked, else its name."""
    return sys.modules.get(MODULE, MODULE)


def overridden() -> CudfPolars | None:
    """Give what stands in for what is installed; None if nothing does."""
    return _override


def import_failure() -> str | None:
    """Give what the import of cudf-polars raised, if it was tried and failed."""
    return _import_failure


class Known(NamedTuple):
    """What there is to be found, and what came of its import."""

    here: CudfPolars | None = None
    """None where that is really looked for."""
    import_failure: str | None = None


def override(known: Known) -> Known:
    """Put what is known aside, for `polars_async.testing`; gives that, to put it back."""
    global _import_failure, _override  # facts about the process
    before = Known(_override, _import_failure)
    _override, _import_failure = known
    return before


def find_cudf_polars() -> CudfPolars:
    """Look for cudf-polars; an imported module counts, whatever its distribution says."""
    if _override is not None:
        here = _override
        failed = here.diagnosis is None and _import_failure is not None
        return here._replace(diagnosis=diagnose_import(here)) if failed else here
    found = [(build, each) for build in (CU12, CU13, UNKNOWN) for each in _distributions(build)]
    # Two builds overwrite each other's module, so which one is left cannot be told.
    build = found[0][0] if len(found) == 1 else UNKNOWN
    here = CudfPolars(build=build, version=found[0][1].version if found else None)
    module = imported()
    if module is None:
        return here._replace(installed=False)
    if module is not MODULE:
        version = getattr(module, "__version__", None)
        return here._replace(version=version) if isinstance(version, str) else here
    spec = importlib.util.find_spec(MODULE)
    # A folder without code, as an uninstall leaves behind, makes a namespace package.
    if spec is None or spec.origin is None:
        diagnosis = _diagnose_broken(here, f"but its module {MODULE} was not found")
        return here._replace(diagnosis=diagnosis) if found else here._replace(installed=False)
    return here._replace(diagnosis=_diagnose(here, [each for _, each in found]))


def _diagnose(here: CudfPolars, distributions: list[Distribution]) -> Diagnosis | None:
    for needed in filter(None, map(_unmet_polars, distributions)):
        return diagnose_incompatible(here, needed)
    return None if _import_failure is None else diagnose_import(here)


def diagnose_incompatible(here: CudfPolars, needed: str) -> Diagnosis:
    """Tell that cudf-polars needs another Polars, such as ``"<1.45"``."""
    cause = f"{here} needs Polars {needed} and Polars {pl.__version__} is installed"
    return Diagnosis(Reason.CUDF_INCOMPATIBLE, cause, f'install "polars{needed}"')


def diagnose_import(here: CudfPolars) -> Diagnosis:
    """Tell of the import that failed."""
    return _diagnose_broken(here, f"but its import fails ({_import_failure})")


def _diagnose_broken(here: CudfPolars, how: str) -> Diagnosis:
    return Diagnosis(
        Reason.CUDF_BROKEN, f"{here} is installed, {how}", f"reinstall {here.build.name}"
    )


def _distributions(build: Build) -> list[Distribution]:
    from importlib import metadata  # noqa: PLC0415  # which takes as long as all of this package

    try:
        return [metadata.distribution(build.name)]
    except metadata.PackageNotFoundError:
        return []


def _unmet_polars(distribution: Distribution) -> str | None:
    """Give the Polars that a distribution needs, where the installed one will not do."""
    try:
        requirements = importlib.import_module("packaging.requirements")
    except ImportError:
        return None  # cudf-polars itself imports packaging: its import will fail, and be noted
    for line in distribution.requires or ():
        try:
            needed = requirements.Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate()
            met: bool = needed.specifier.contains(pl.__version__, prereleases=True)
        except ValueError:  # of all that packaging raises: a line or a version it cannot read
            continue
        if needed.name == "polars" and applies:
            return None if met else str(needed.specifier)
    return None
