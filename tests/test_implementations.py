"""`bench kernels` measures every implementation of a layer, and says how exact each is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from longshort import kernels, native
from longshort.bench import implementations, timing
from longshort.bench.grids import Case
from longshort.bench.implementations import TORCH_NN, Shape
from longshort.bench.timing import Side
from longshort.cli import main
from longshort.errors import UsageError

SMALL = Shape(3, 2, 40)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)


def test_all_sides_take_turns_in_their_contexts() -> None:
    now, said = 0.0, []

    def side(name: str, seconds: float) -> Side:
        @contextmanager
        def within() -> Iterator[None]:
            said.append(f"{name}[")
            yield
            said.append("]")

        def call() -> None:
            nonlocal now
            now += seconds
            said.append(name)

        return Side(call, within=within)

    sides = [side("a", 1.0), side("b", 2.0), side("c", 5.0)]
    found = timing.take_turns(sides, blocks=2, block_seconds=2.0, clock=lambda: now)
    assert found == [[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]
    warm = "a[aa] b[bb] c[cc]"  # two calls are enough where they are long
    assert "".join(said) == f"{warm} a[aa] b[b] c[c] c[c] b[b] a[aa]".replace(" ", "")


def test_every_implementation_is_measured_and_compared_with_float64() -> None:
    reported: list[tuple[Case, str, int, int]] = []
    found = implementations.result(
        cells=["gru"], shapes=[SMALL, Shape(1, 1, 8)], threads=1, report=lambda *said: reported.append(said)
    )
    assert [(str(case), done, cases) for case, _, done, cases in reported] == [
        (f"gru {mode} T={T} B={B} H={H} threads=1", done, 4)
        for done, (mode, (T, B, H)) in enumerate(
            ((mode, shape) for mode in ("train", "infer") for shape in ((3, 2, 40), (1, 1, 8))), 1
        )
    ]
    names = [*implementations.names(), TORCH_NN]
    assert {"torch", "reference", *native.targets()} < set(names)
    for number, (_, fastest, _, _) in enumerate(reported):
        rows = found["rows"][number * len(names) : (number + 1) * len(names)]
        assert [row["kernel"] for row in rows] == names
        assert min(rows, key=lambda row: row["seconds"])["kernel"] == fastest
        (auto,) = [row["kernel"] for row in rows if row["auto"]]
        assert auto == (kernels.available()[0] if kernels.available()[0] in native.targets() else "torch")
        for row in rows:
            assert len(row["blocks"]) == timing.BLOCKS
            exact = row["kernel"] not in native.LOWER
            assert 0 < row["error"] < (1e-5 if exact else 0.05)
            if row["kernel"] in native.BFLOAT16 and row["T"] > 1:  # a single step of few rows reads weights as they lie
                assert row["error"] > 1e-4
    command = "longshort bench kernels --cells gru --modes train,infer --shapes 3x2x40,1x1x8 --threads 1"
    assert found["command"] == command


@pytest.mark.parametrize("words", ["", "3x4", "3x4x5x6", "0x1x1", "3xax5", "-1x2x3", "3x4x9999999", "3 x 4 x 5"])
def test_shapes_that_cannot_be_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match="--shapes takes steps, rows and units such as 35x20x256, not"):
        implementations.read_shape(words)


@pytest.mark.parametrize(("name", "given"), [("cell", {"cells": ["lsmt"]}), ("mode", {"modes": ["learn"]})])
def test_unknown_names_are_refused(name: str, given: Any) -> None:
    with pytest.raises(UsageError, match=f"There is no {name} "):
        implementations.result(**given, shapes=[SMALL])


def test_the_command_prints_a_table_and_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    flags = ["--cells", "rnn", "--shapes", "3x2x40", "--threads", "1", "--out", str(out)]
    assert main(["bench", "kernels", *flags]) == 0
    said = capsys.readouterr()
    for name in (*implementations.names(), TORCH_NN, "RNN, train", "RNN, infer", "3x2x40", "auto"):
        assert name in said.out
    assert said.out.count("* ") >= 2
    assert "2/2 rnn infer T=3 B=2 H=40 threads=1: " in said.err
    assert json.loads(out.read_text(encoding="utf-8"))["command"] == "longshort bench kernels " + " ".join(
        ["--cells", "rnn", "--modes", "train,infer", "--shapes", "3x2x40", "--threads", "1"]
    )
    assert main(["bench", "kernels", *flags[:-2], "--modes", "infer", "--json"]) == 0
    assert {row["mode"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"infer"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernels", "--grid", "marks"], "--grid goes with bench layers, not with bench kernels"),
        (["kernels", "--precision", "bfloat16"], "--precision goes with bench train"),
        (["kernels", "--shapes", "3x4"], "--shapes takes steps, rows and units"),
        (["kernels", "--threads", "1,2"], "whole numbers|from 1"),
        (["layers", "--shapes", "3x4x5"], "--shapes goes with bench kernels, not with bench layers"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert any(each in capsys.readouterr().err for each in words.split("|"))
