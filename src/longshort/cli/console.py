"""What the verbs of the command line share: how they speak, and what they read from the user's words.

Results go to standard output, everything else (progress, notes, errors) to standard error.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from longshort.config import is_own_cell
from longshort.errors import MissingExtraError, OutputError, UsageError

RANK = os.environ.get("RANK", "0").removeprefix("0")
"""Number of this process among those that torchrun has started; empty of the first, and where there is only one."""


def need_torch(verb: str) -> None:
    """Raise MissingExtraError where PyTorch is not installed, which `longshort VERB` needs."""
    from longshort.machine import version_of

    if version_of("torch") is None:
        raise MissingExtraError("PyTorch", "train", f"longshort {verb}")


def set_threads(threads: int | None) -> None:
    """Let PyTorch use so many threads, if a number is given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def program() -> str:
    """Return what a user types to run this program, which may not be on their PATH, as in a fresh clone's .venv."""
    if shutil.which("longshort") or Path(sys.argv[0]).name != "longshort":
        return "longshort"
    return shlex.quote(min(sys.argv[0], os.path.relpath(sys.argv[0]), key=len))


def launcher() -> str:
    """Return what starts this program as it was started, with as many processes."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return program() if number == "1" else f"torchrun --nproc-per-node {number} -m longshort"


def load_own_cell(given: str | None) -> None:
    """Load the cell that a model needs, if one is given.

    Raises:
        UsageError: it is none of the user's own.
    """
    if given is not None and not is_own_cell(given):
        raise UsageError(f"--cell is for a cell of your own, FILE.py:NAME, not {given!r}.", "Leave it out.")
    load_cell(given)


def load_cell(given: str | None) -> str:
    """Return the name of a cell, which if it is one of the user's own is loaded from its file."""
    if given is None or not is_own_cell(given):
        return given or ""
    need_torch("--cell FILE.py:NAME")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("A cell of your own trains in one process.", "Start it without torchrun.")
    from longshort import own_cells

    return own_cells.load_cell(given)


def path(given: str | None) -> Path | None:
    """Return a path if one is given."""
    return Path(given) if given is not None else None


def empty(flag: str) -> UsageError:
    """The error to raise for a flag whose value is empty."""
    return UsageError(f"{flag} is empty.", "An unset shell variable looks like this.")


def names(given: str | None) -> list[str]:
    """Return what a list of names holds; nothing if none was given."""
    if given is None:
        return []
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UsageError(f"A list of names separated by commas was wanted, not {given!r}.")
    return names


def whole(word: str, flag: str) -> int:
    """Return the number that a word of a list is; UsageError, naming the flag, where it is none."""
    if not word.isdecimal():
        raise UsageError(f"{flag} takes whole numbers separated by commas, not {word!r}.")
    return int(word)


def check_plot(path: str) -> None:
    """Refuse a picture that could not be written after the runs have taken their minutes."""
    from longshort.machine import version_of

    if version_of("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot", "A picture")
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"The picture {path!r} has an unknown format.", "End its name in .png, .svg or .pdf.")
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a directory" if Path(path).is_dir() else "its directory is missing or read-only"
        raise OutputError(f"The picture {path!r} cannot be written: {reason}.", "Choose another --plot.")


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output, with the version of its form."""
    print(as_json({"format_version": 1, **content}, indent=2))


def as_json(content: Any, indent: int | None = None) -> str:
    """Return JSON, in which a number that is not finite, as a model that diverged gives, is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, allow_nan=False)


class Voice:
    """Standard error, which falls silent once it cannot be written: its reader has gone, or its disk is full.

    What is said there is about the work, and never worth ending it.

    Args:
        stream: what writes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, words: str) -> int:
        """Write, if that can be."""
        try:
            return self._stream.write(words)
        except OSError:
            give_up(self._stream)
            return len(words)

    def flush(self) -> None:
        """Give out what is held, if that can be."""
        try:
            self._stream.flush()
        except OSError:
            give_up(self._stream)


def give_up(stream: TextIO) -> None:
    """Let all that is written to a stream go nowhere, also what it holds, which would fail once more at exit."""
    with suppress(OSError):  # of a stream that has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def streams() -> Iterator[None]:
    """Have a standard output and error that can be written to, also where they were closed before the program began."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = sys.stdout or nowhere, cast(TextIO, Voice(sys.stderr or nowhere))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def say(words: str) -> None:
    """Print a line on standard error."""
    print(words, file=sys.stderr, flush=True)


def complain(words: str) -> None:
    """Print an error on standard error: control characters made visible, three lines at most."""
    from longshort.cli.screen import visible

    name = f"longshort (process {RANK})" if RANK else "longshort"
    lines = [line for line in visible(words).split("\n") if line.strip()]
    say("\n".join([f"{name}: {lines[0]}", *lines[1:3]]) if lines else f"{name}: failed")
