"""The module that pytest loads where polars-async is installed; an old pytest must not fail."""

from __future__ import annotations

import sys

import pytest

_OLDEST = 8

if int(getattr(pytest, "version_tuple", (0,))[0]) >= _OLDEST:
    from polars_async import pytest_plugin as plugin
else:  # an older pytest lacks the stashes and the hook wrappers that the plug-in uses
    plugin = sys.modules[__name__]

__all__ = ["plugin"]
