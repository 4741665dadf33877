"""Cells of a user's own: `--cell FILE.py:NAME`.

The file is a Python program; NAME is a `cells.Cell` in it: the names of its gates, of its state's tensors and of
further vectors, and one step, written with tensor operations. It runs as any other cell, by the reference equations.

Running a file is trusting it. A run or a model only keeps the name, `FILE.py:NAME` without folders, and nothing that is
loaded is ever run unless the command names the file once more.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path
from types import ModuleType

import torch

from longshort import cells
from longshort.cells import Cell
from longshort.errors import UsageError
from longshort.text.corpus import open_file

_loaded: dict[str, str] = {}
"""Name of each cell that was loaded, and the SHA-256 of its file."""
_numbers = itertools.count()


def load_cell(place: str) -> str:
    """Run a file and take a cell from it.

    Args:
        place: `FILE.py:NAME`.

    Returns:
        The name under which `cells.get_cell` has it now, and a model's configuration keeps it: `FILE.py:NAME` without
        folders.

    Raises:
        UsageError: there is no such file, it cannot be run, or NAME is no cell that works.
    """
    path_name, _, name = place.rpartition(":")
    path = Path(path_name)
    with open_file(path, "Give the file of your cell, FILE.py:NAME.") as stream:
        source = stream.read()
    module = ModuleType(f"_longshort_own_cell_{next(_numbers)}_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses look their module up while it is executed, and pickle later, so it stays there with its cell.
    sys.modules[module.__name__] = module
    try:
        cell = _cell_of(module, source, path, name)
        _check(place, cell, path)
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise
    known = f"{path.name}:{name}"
    cells.CELLS[known] = cell
    _loaded[known] = hashlib.sha256(source).hexdigest()
    return known


def digest() -> str:
    """Return what tells the files of all cells that were loaded from others: `none`, or a hash."""
    content = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(_loaded.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16] if content else "none"


def _cell_of(module: ModuleType, source: bytes, path: Path, name: str) -> Cell:
    """Run a file as `module`, and return the cell of that name in it."""
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} cannot be run: {_told(error, path)}.") from error
    cell = getattr(module, name, None)
    if not isinstance(cell, Cell):
        there = [key for key, value in vars(module).items() if isinstance(value, Cell)]
        hint = f"It has {', '.join(there)}." if there else "docs/cells.md shows how a cell is written."
        raise UsageError(f"{path} has no longshort.cells.Cell called {name!r}.", hint)
    return cell


def _check(place: str, cell: Cell, path: Path) -> None:
    """Make one step of two rows of three units, and see that it gives what a step has to."""
    B, H = 2, 3
    names = (*cell.gates, *cell.states, *cell.vectors)
    if not (cell.gates and cell.states) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise UsageError(
            f"{place}: gates, states and vectors are tuples of names; a cell has a gate and a state at least."
        )
    share = torch.zeros(B, len(cell.gates) * H)
    state = tuple(torch.zeros(B, H) for _ in cell.states)
    try:
        after, gates = cell.stepping([torch.zeros(H) for _ in cell.vectors])(share, share, state)
        fits = len(after) == len(state) and len(gates) == len(cell.gates)
        shapes = {tuple(tensor.shape) for tensor in (*after, *gates)}
    except Exception as error:
        raise UsageError(f"The step of {place} fails: {_told(error, path)}.") from error
    if not fits or shapes != {(B, H)}:
        raise UsageError(
            f"The step of {place} must return {len(state)} states and {len(cell.gates)} gates, each of shape (B, H).",
            f"For B={B} H={H} it gave {len(after)} and {len(gates)}, of shapes {', '.join(map(str, sorted(shapes)))}.",
        )


def _told(error: BaseException, path: Path) -> str:
    """Return an error in a user's file in one line, with the line of the file where it came up."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" in line {line}" if line else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())!s:.300}"
