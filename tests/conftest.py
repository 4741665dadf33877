"""What all tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Small models are fastest in one thread, and tests must not depend on how many cores there are.
os.environ["OMP_NUM_THREADS"] = "1"

# Time is never asserted; CI draws the same examples each time, so that it fails for a reason in the change.
settings.register_profile("longshort", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("longshort")

ROOT = Path(__file__).parent.parent

# The built-in text is parsed once for all sessions; what a session encodes must not serve the next one.
CACHE = ROOT / ".pytest_cache" / "longshort"
os.environ["LONGSHORT_CACHE"] = str(CACHE)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Delete what an earlier session encoded, before any worker begins."""
    if not hasattr(session.config, "workerinput"):
        shutil.rmtree(CACHE / "ids", ignore_errors=True)
        shutil.rmtree(CACHE / "stdin", ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first, so that no worker is left with one at the end."""
    longest = ("test_sanitizers", "test_faults", "test_build", "test_processes", "test_readme")
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(longest))


SHARED_TEXTS = ROOT.parent / "shared" / "data"


def shared_text(name: str) -> Path:
    """Return a text that is not part of the project, or skip the test where it is not there."""
    path = SHARED_TEXTS / name
    if not path.is_file():
        pytest.skip(f"the text {name} is not on this machine")
    return path


def need_target(target: str) -> None:
    """Skip the test, naming the target, where this processor cannot run it."""
    from longshort import native

    if target not in native.supported():
        pytest.skip(f"this processor has no {target}")


@pytest.fixture(scope="session")
def english() -> str:
    """About 20,000 characters of made-up English: repeatable on every Python."""
    from longshort.text import grammar

    return grammar.generate(20_000, seed=0)


@pytest.fixture
def text_file(tmp_path: Path, english: str) -> Path:
    """That text as a file."""
    path = tmp_path / "english.txt"
    path.write_text(english, encoding="utf-8")
    return path
