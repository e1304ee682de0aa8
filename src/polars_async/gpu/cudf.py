"""Which cudf-polars is installed, without its import: that takes half a second, and loads CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import polars as pl

from polars_async.errors import describe
from polars_async.reasons import Diagnosis, Reason

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

MODULE: Final = "cudf_polars"


class Build(NamedTuple):
    """
    One of the distributions of cudf-polars, and the oldest GPU and driver that it runs on.

    Its metadata tell the major version of CUDA, in the name, and the Polars that it needs. The rest
    is from the documentation of RAPIDS. It is not known yet for builds for a later CUDA: they are
    taken to need the first release of that CUDA, and no newer GPU than the newest build that is.
    """

    name: str
    compute_capability: tuple[int, int]
    cuda_version: tuple[int, int]


CU12: Final = Build("cudf-polars-cu12", (7, 0), (12, 2))
CU13: Final = Build("cudf-polars-cu13", (7, 5), (13, 0))
_LATER: Final = tuple(
    Build(f"cudf-polars-cu{major}", CU13.compute_capability, (major, 0)) for major in (14, 15, 16)
)
# Conda's distribution does not say which CUDA it is for, and a module without a distribution says
# nothing: then the more lenient rules hold, and a query that should not have passed fails later.
UNKNOWN: Final = Build("cudf-polars", CU12.compute_capability, CU12.cuda_version)
_BUILDS: Final = (CU12, CU13, *_LATER, UNKNOWN)


class CudfPolars(NamedTuple):
    """The cudf-polars of this host, and what rules it out."""

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
    Record that ``import cudf_polars`` raised `error`, which only an import can show.

    Code that imports it calls this. From then on `polars_async.gpu_status` reports the failure,
    until cudf-polars is imported after all or the status is requested with ``refresh=True``.

    Parameters
    ----------
    error
        The error of the import; its type and the first line of its text are kept.
    """
    global _import_failure  # noqa: PLW0603  # a fact about the process
    _import_failure = describe(error)


def forget_import_failure() -> None:
    """Forget that an import has failed, as if it had not been tried."""
    global _import_failure  # noqa: PLW0603  # a fact about the process
    _import_failure = None


def imported() -> object:
    """Return the module if it is imported, None if its import is blocked, else its name."""
    return sys.modules.get(MODULE, MODULE)


def overridden() -> CudfPolars | None:
    """Return the cudf-polars that tests have set in place of the installed one, if they have."""
    return _override


def import_failure() -> str | None:
    """Return the error of the import of cudf-polars, in words, if it was tried and failed."""
    return _import_failure


class Override(NamedTuple):
    """The cudf-polars in place of the installed one, and the failure of its import."""

    here: CudfPolars | None = None
    """None for the one that is installed."""
    import_failure: str | None = None


def override(new: Override) -> Override:
    """Replace what is known, for `polars_async.testing`; return what was, to restore it."""
    global _import_failure, _override  # facts about the process
    before = Override(_override, _import_failure)
    _override, _import_failure = new
    return before


def find_cudf_polars() -> CudfPolars:
    """Look for cudf-polars; a module that is imported already counts as installed and sound."""
    if _override is not None:
        here = _override
        failed = here.diagnosis is None and _import_failure is not None
        return here._replace(diagnosis=diagnose_import(here)) if failed else here
    builds = [(build, each) for build in _BUILDS for each in _distributions(build)]
    # Two builds overwrite each other's module, so it is unknown whose is left.
    build = builds[0][0] if len(builds) == 1 else UNKNOWN
    here = CudfPolars(build=build, version=builds[0][1].version if builds else None)
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
        return here._replace(diagnosis=diagnosis) if builds else here._replace(installed=False)
    return here._replace(diagnosis=_diagnose(here, [each for _, each in builds]))


def _diagnose(here: CudfPolars, distributions: list[Distribution]) -> Diagnosis | None:
    for needed in filter(None, map(_needed_polars, distributions)):
        if not needed.contains(pl.__version__, prereleases=True):
            return diagnose_incompatible(here, str(needed))
    return None if _import_failure is None else diagnose_import(here)


def diagnose_incompatible(here: CudfPolars, needed: str) -> Diagnosis:
    """Return the diagnosis of a cudf-polars that needs another Polars, such as ``"<1.45"``."""
    installed = f"Polars {pl.__version__}"
    return Diagnosis(
        Reason.CUDF_INCOMPATIBLE,
        f"{here} needs Polars {needed} and {installed} is installed",
        f'install "polars{needed}", or a {here.build.name} that supports {installed}',
    )


def diagnose_import(here: CudfPolars) -> Diagnosis:
    """Return the diagnosis of a cudf-polars whose import has failed."""
    return _diagnose_broken(here, f"but its import fails ({_import_failure})")


def _diagnose_broken(here: CudfPolars, how: str) -> Diagnosis:
    return Diagnosis(
        Reason.CUDF_BROKEN, f"{here} is installed, {how}", f"reinstall {here.build.name}"
    )


def _distributions(build: Build) -> list[Distribution]:
    from importlib import metadata  # noqa: PLC0415  # its import takes as long as this package's

    try:
        return [metadata.distribution(build.name)]
    except metadata.PackageNotFoundError:
        return []


def _needed_polars(distribution: Distribution) -> SpecifierSet | None:
    """Return the versions of Polars that a distribution needs; None if that cannot be told."""
    try:
        requirements = importlib.import_module("packaging.requirements")
    except ImportError:
        return None  # cudf-polars imports packaging too: its import will fail, and be recorded
    found: SpecifierSet | None = None
    for line in distribution.requires or ():
        try:
            needed: Requirement = requirements.Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate()
        except ValueError:  # the base of all that packaging raises for what it cannot read
            continue
        if needed.name.lower() == "polars" and applies:
            found = needed.specifier if found is None else found & needed.specifier
    return found
