"""What pytest loads where polars-async is installed: an old one must not fail at its start."""

from __future__ import annotations

import sys

import pytest

_OLDEST = 8

if int(getattr(pytest, "version_tuple", (0,))[0]) >= _OLDEST:
    from polars_async import pytest_plugin as plugin
else:  # which has neither the stashes nor the wrappers that the plug-in is made of
    plugin = sys.modules[__name__]

__all__ = ["plugin"]
