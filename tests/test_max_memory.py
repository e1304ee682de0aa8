"""What ``max_memory=`` takes: a number of bytes, or a text with a unit."""

from __future__ import annotations

from math import inf, nan

import pytest

import polars_async as pa
from polars_async.options import checked_bytes


@pytest.mark.parametrize(
    ("size", "number"),
    [
        (1, 1),
        (4e9, 4 * 10**9),
        (2.5, 2),
        ("4GB", 4 * 1000**3),
        ("4 GB", 4 * 1000**3),
        ("4gb", 4 * 1000**3),
        ("4 GiB", 4 * 1024**3),
        ("1.5 GiB", 1536 * 1024**2),
        (" 500 MB ", 500 * 1000**2),
        ("512MiB", 512 * 1024**2),
        ("3 kB", 3000),
        ("3 KiB", 3072),
        ("1TB", 1000**4),
        ("1 TiB", 1024**4),
        ("7 B", 7),
    ],
)
def test_size_is_a_number_of_bytes(size, number):
    assert checked_bytes("max_memory", size) == number


WRONG = [
    0,
    -1,
    0.5,
    inf,
    nan,
    True,
    "",
    "4",
    "4 G",
    "4 GIGB",
    "-4GB",
    "GB",
    "0 GB",
    "4,5GB",
    b"4GB",
]


@pytest.mark.parametrize("size", WRONG)
@pytest.mark.parametrize("make", [pa.Collector, pa.configure])
def test_wrong_size_is_named_with_what_was_expected(make, size, monkeypatch):
    monkeypatch.setattr("polars_async.api._Default.collector", None)
    with pytest.raises(ValueError, match=r"^max_memory must be a number of bytes, ") as caught:
        make(executor="processes", max_memory=size)
    assert str(caught.value).endswith(
        f"a text such as '4GB', '4 GiB' or '75%', or None, got {size!r}"
    )


def test_limit_of_the_worker_is_that_number():
    with pa.Collector(executor="processes", max_memory="0.4 GB") as collector:
        assert collector._cpu.executor._max_memory == 400_000_000
