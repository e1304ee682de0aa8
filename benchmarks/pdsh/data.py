"""The PDS-H data: made once by tpchgen-cli, kept as one parquet file a table."""

import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Final

import polars as pl
import polars.selectors as cs

from benchmarks.pdsh.tables import Tables

TABLES: Final = tuple(field.name for field in fields(Tables))
_GENERATOR: Final = "tpchgen-cli"


def make(scale: float, folder: Path) -> Path:
    """
    Make the data of one scale, unless it is there already.

    Parameters
    ----------
    scale
        Size of the data: 1 is six million lines of orders, 345 MB of parquet.
    folder
        Where data of every scale is kept; made if it is not there.

    Returns
    -------
    pathlib.Path
        The folder inside ``folder`` with the eight parquet files.

    Raises
    ------
    FileNotFoundError
        If tpchgen-cli is not installed in this environment.
    RuntimeError
        If tpchgen-cli fails, or the data that is there lacks tables.
    """
    made = folder / f"pdsh-{scale:g}"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{made.name}-", dir=folder) as scratch:
            fresh = Path(scratch) / "tables"
            _generate(scale, fresh)
            _move(fresh, made)
    if missing := [name for name in TABLES if not (made / f"{name}.parquet").is_file()]:
        raise RuntimeError(f"{made} lacks {', '.join(missing)}: delete it to have it made anew")
    return made


def tables(folder: Path) -> Tables:
    """
    Scan the eight tables in a folder that ``make`` returned.

    Decimals become floats: Polars rounds the product and the quotient of two decimals to the
    scale of its operands, here two digits, which is too coarse for a discounted price or a share.
    """
    return Tables(
        **{
            name: pl.scan_parquet(folder / f"{name}.parquet").with_columns(
                cs.decimal().cast(pl.Float64)
            )
            for name in TABLES
        }
    )


def _generate(scale: float, folder: Path) -> None:
    beside = Path(sys.executable).with_name(_GENERATOR)
    # Where `pip install --target` puts programs.
    among = (Path(place, "bin", _GENERATOR) for place in sys.path)
    command = next((each for each in (beside, *among) if each.is_file()), None)
    if command is None:
        raise FileNotFoundError(
            f"{_GENERATOR} makes the data, but there is no {beside}: install it into this "
            f"environment with `uv pip install {_GENERATOR}`"
        )
    made = subprocess.run(
        [command, "parquet", "--quiet", "-s", f"{scale:g}", "--output-dir", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise RuntimeError(f"tpchgen-cli failed at scale {scale:g}: {made.stderr.strip()}")


def _move(fresh: Path, made: Path) -> None:
    """Rename finished data into its place; if another process was first, keep what it made."""
    try:
        fresh.rename(made)
    except OSError:
        if not made.is_dir():
            raise
