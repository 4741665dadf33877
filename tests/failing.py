"""Calls to the system that fail when they are told to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FAILING = ("open", "write", "fsync", "replace", "rename", "mkdir")
"""The calls by which files are written."""


@contextmanager
def nth_call_fails(number: int, code: int, names: tuple[str, ...] = FAILING) -> Iterator[list[str]]:
    """Let the `number`-th call of those in `names` raise OSError; yields the names of the calls made."""
    calls: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, failing(name, getattr(os, name)))
        yield calls
