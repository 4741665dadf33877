"""Cells of one's own: the examples do what they say, every verb runs them, and no file is run unless it is named."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ROOT
from longshort import cells, own_cells
from longshort.cells import Cell, Options
from longshort.cli import main, tables
from longshort.config import is_own_cell
from longshort.errors import UsageError
from longshort.options import read_lengths

EXAMPLES = sorted((ROOT / "examples" / "cells").glob("*.py"))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CELLS", dict(cells.CELLS))
    monkeypatch.setattr(own_cells, "_loaded", {})


def place(path: Path) -> str:
    return f"{path}:cell"


def weights_of(cell: Cell, I: int, H: int, directions: int = 1) -> list[list[Tensor]]:
    torch.manual_seed(0)
    G = len(cell.gates) * H
    shapes: list[tuple[int, ...]] = [(G, I), (G, H), (G,), (G,), *[(H,)] * len(cell.vectors)]
    return [[torch.randn(shape, dtype=torch.float64) * 0.5 for shape in shapes] for _ in range(directions)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_page_and_its_gradients_are_right(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    cell = cells.get_cell(own_cells.load_cell(place(path)))
    T, B, I, H = 3, 2, 2, 2
    (layer,) = weights_of(cell, I, H)
    x = torch.randn(T, B, I, dtype=torch.float64)
    state = [torch.randn(1, B, H, dtype=torch.float64) for _ in cell.states]
    inputs = [tensor.requires_grad_() for tensor in (x, *state, *layer)]

    def run(x: Tensor, *rest: Tensor) -> Any:
        n = len(cell.states)
        y, after = cells.run_stack(cell, x, rest[:n], [rest[n:]], bias=True)
        return (y, *after)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_lengths_and_both_directions(path: Path) -> None:
    cell = cells.get_cell(own_cells.load_cell(place(path)))
    T, I, H, lengths = 5, 3, 4, [5, 0, 2]
    both = weights_of(cell, I, H, directions=2)
    x = torch.randn(T, 3, I, dtype=torch.float64)
    state = tuple(torch.randn(2, 3, H, dtype=torch.float64) for _ in cell.states)
    y, after = cells.run_stack(
        cell, x, state, both, bias=True, bidirectional=True, sequences=read_lengths(lengths, T, 3)
    )
    for row, length in enumerate(lengths):
        assert not y[length:, row].any()
        own = tuple(tensor[:, row : row + 1] for tensor in state)
        if not length:
            assert all(torch.equal(a[:, row : row + 1], b) for a, b in zip(after, own, strict=True))
            continue
        alone, last = cells.run_stack(cell, x[:length, row : row + 1], own, both, bias=True, bidirectional=True)
        torch.testing.assert_close(y[:length, row], alone[:, 0])
        for a, b in zip(after, last, strict=True):
            torch.testing.assert_close(a[:, row], b[:, 0])


def test_peepholes_and_coupled_gates_are_those_of_the_layers() -> None:
    x, H = torch.randn(4, 2, 3, dtype=torch.float64), 5
    state = tuple(torch.randn(1, 2, H, dtype=torch.float64) for _ in range(2))
    cases: list[tuple[str, dict[str, Any]]] = [("peephole_lstm", {}), ("coupled_lstm", {"coupled": True})]
    for stem, given in cases:
        cell = cells.get_cell(own_cells.load_cell(place(ROOT / "examples" / "cells" / f"{stem}.py")))
        (layer,) = weights_of(cell, 3, H)
        if cell.vectors:
            given = dict(zip(("weight_ci", "weight_cf", "weight_co"), layer[4:], strict=True))
        ours = cells.run_stack(cell, x, state, [layer], bias=True)
        lstm = cells.run_stack(cells.get_cell("lstm"), x, state, [layer[:4]], bias=True, options=[Options(**given)])
        torch.testing.assert_close(ours, lstm)


def test_the_grus_are_pieces_of_the_whole_one() -> None:
    """With its reset gate wide open, or its update gate shut, a GRU is one of the examples."""
    H, x = 3, torch.randn(4, 2, 3, dtype=torch.float64)
    state = (torch.randn(1, 2, H, dtype=torch.float64),)
    (gru,) = weights_of(cells.get_cell("gru"), 3, H)
    for stem, gate, bias in (("update_gru", 0, 1e3), ("reset_gru", 1, -1e3)):
        cell = cells.get_cell(own_cells.load_cell(place(ROOT / "examples" / "cells" / f"{stem}.py")))
        whole = [tensor.clone() for tensor in gru]
        whole[2][gate * H : (gate + 1) * H] = bias  # of b_ih
        rows = [i for i in range(3 * H) if not gate * H <= i < (gate + 1) * H]
        ours = cells.run_stack(cell, x, state, [[tensor[rows] for tensor in gru]], bias=True)
        torch.testing.assert_close(ours, cells.run_stack(cells.get_cell("gru"), x, state, [whole], bias=True))


# ----------------------------------------------------------------------------------------------- the command line

TINY = ["--hidden", "8", "--embedding", "4", "--batch-size", "4", "--seq-len", "8"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_verb_runs_it(path: Path, tmp_path: Path, english: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, own = tmp_path / "t.txt", ["--cell", place(path)]
    text.write_text(english[:5000], encoding="utf-8")
    flags = [*TINY, "--layers", "2", "--dropout", "0.1"]
    for name, steps in (("whole", "6"), ("cut", "3")):
        assert main(["train", str(text), *own, *flags, "--steps", steps, "--out", str(tmp_path / name)]) == 0
    assert main(["resume", str(tmp_path / "cut"), *own, "--steps", "6"]) == 0
    capsys.readouterr()
    run = str(tmp_path / "cut")
    assert main(["eval", run, "--split", "valid", *own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_token"] > 0
    assert main(["generate", run, "--length", "20", *own]) == 0
    assert main(["score", run, str(text), "--top", "1", *own]) == 0
    capsys.readouterr()
    assert main(["inspect", run, str(text), *own, "--plot", str(tmp_path / "gates.png"), "--json"]) == 0
    gates = [gate["name"] for gate in json.loads(capsys.readouterr().out)["gates"] if gate["layer"] == 1]
    cell = own_cells.load_cell(place(path))
    assert gates == list(dict.fromkeys([*cells.get_cell(cell).gates, *cells.get_cell(cell).states]))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["train"]["cell"] == f"{path.name}:cell"


def test_it_is_a_row_of_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    own = place(ROOT / "examples" / "cells" / "min_gru.py")
    arguments = ["compare", "--cells", f"rnn,{own}", "--implementations", "reference", "--epochs", "1", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["cell"] for row in result["rows"]] == ["rnn", "min_gru.py:cell"]
    tables.print_comparison(result)
    shown = capsys.readouterr().out
    assert "\nRNN  reference: " in shown
    assert "\nmin_gru.py:cell reference: " in shown
    assert "MIN_GRU" not in shown


MARKS = """
from pathlib import Path
from longshort.cells import Cell
Path({marker!r}).touch()
import torch
def step(x, h, state):
    return (torch.tanh(x + h),), (x,)
cell = Cell(step, gates=("a",))
"""


def test_nothing_that_is_loaded_is_run_unless_it_is_named(
    tmp_path: Path, english: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, text, mine = tmp_path / "was-run", tmp_path / "t.txt", tmp_path / "mine.py"
    mine.write_text(MARKS.format(marker=str(marker)), encoding="utf-8")
    text.write_text(english, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "t.txt", "--cell", "mine.py:cell", *TINY, "--steps", "2", "--out", "run"]) == 0
    assert marker.exists()
    marker.unlink()
    cells.CELLS.pop("mine.py:cell")  # as in a new process
    capsys.readouterr()
    model = str(next((tmp_path / "run" / "checkpoints").iterdir()))
    for arguments in (
        ["resume", "run", "--steps", "4"],
        ["eval", "run", "--split", "valid"],
        ["eval", model, "t.txt"],
        ["generate", "run"],
        ["score", "run", "t.txt"],
        ["train", "t.txt", "--from", "run"],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "one of a user's own" in said, arguments
        assert "--cell PATH/mine.py:cell" in said
        assert len(said.splitlines()) <= 3
    assert not marker.exists()
    # A file that has changed is told where a run goes on with it.
    mine.write_text(MARKS.format(marker=str(marker)) + "\n# changed\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["resume", "run", "--cell", "mine.py:cell", "--steps", "4"]) == 0
    assert "own cells" in capsys.readouterr().err
    assert main(["train", "t.txt", "--from", "run", "--cell", "mine.py:cell", "--steps", "2", "--out", "more"]) == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def step(:", "SyntaxError in line 1"),
        ("x = 1\nraise SystemExit(0)", "SystemExit in line 2"),
        ("import nothing_of_this_name", "ModuleNotFoundError in line 1"),
        ("x = 1", "has no longshort.cells.Cell called 'cell'"),
        ("from longshort.cells import Cell\nother = Cell(None, gates=('a',))", "It has other"),
        ("from longshort.cells import Cell\ncell = Cell(None, gates=())", "has a gate and a state at least"),
        (
            "from longshort.cells import Cell\ncell = Cell(lambda x, h, s: 1 / 0, gates=('a',))",
            "ZeroDivisionError in line 2",
        ),
        (
            "from longshort.cells import Cell\ncell = Cell(lambda x, h, s: (s, ()), gates=('a',))",
            "must return 1 states and 1 gates",
        ),
        ("from longshort.cells import Cell\ncell = Cell(lambda x, h, s: (s, (x,)), gates=('a', 'b'))", "gave 1 and 1"),
        (
            "from longshort.cells import Cell\ncell = Cell(lambda x, h, s: ((x[0],), (x,)), gates=('a',))",
            "of shapes (2, 3), (3,)",
        ),
        ("from longshort.cells import Cell\ncell = Cell(lambda x, h, s: 5, gates=('a',))", "TypeError"),
    ],
)
def test_what_is_no_cell_is_refused(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    before = set(sys.modules)
    with pytest.raises(UsageError) as caught:
        own_cells.load_cell(f"{tmp_path}/mine.py:cell")
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not any("own_cell_" in name for name in set(sys.modules) - before)
    assert not any(is_own_cell(name) for name in cells.CELLS)


DATACLASS = """
from dataclasses import dataclass, field
from typing import ClassVar
import torch
from longshort.cells import Cell
@dataclass
class Rate:
    names: ClassVar[tuple] = ()
    value: float = 0.5
    more: list = field(default_factory=list)
RATE = Rate()
def step(x, h, state):
    return (state[0] + RATE.value * torch.tanh(x + h),), (x,)
cell = Cell(step, gates=("a",))
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_a_file_may_have_dataclasses(future: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(future + DATACLASS, encoding="utf-8")
    found = []
    for _ in range(2):  # of the same file, as resuming loads it again
        cell = cells.get_cell(own_cells.load_cell(place(tmp_path / "mine.py")))
        found.append(cell.step.__globals__["RATE"])
    for rate in found:
        assert pickle.loads(pickle.dumps(rate)) == rate
    assert type(found[0]) is not type(found[1])


def test_a_file_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--corpus", "builtin", "--cell", "nowhere.py:cell", "--steps", "1"]) == 2
    said = capsys.readouterr().err
    assert "There is no file or folder 'nowhere.py'" in said
    assert "Give the file of your cell" in said
    assert own_cells.digest() == "none"


def test_the_pages_table_is_the_result_file() -> None:
    page = (ROOT / "docs" / "cells.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "results" / "2026-11-25-exercise-cells.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 3 + len(EXAMPLES)
    for row in rows:
        name = row["cell"].removesuffix(".py:cell").replace("_", " ")
        figures = [f"{row['train_perplexity'][epoch]:.2f}" for epoch in ("40", "80", "120", "160")]
        assert f"| {name} | {' | '.join(figures)} | {row['heldout_perplexity']:.1f} |" in page


def test_the_pages_file_and_commands_run(
    tmp_path: Path, english: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "cells.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    (tmp_path / "my-text.txt").write_text(english, encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "longshort"
        arguments += ["--epochs", "1"] if arguments[0] == "compare" else []
        if "--steps" in arguments:
            arguments[arguments.index("--steps") + 1] = "2"
        assert main(arguments) == 0, capsys.readouterr().err
