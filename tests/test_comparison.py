from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import shared_text
from longshort import cells, comparison, plots, recipes, scratch
from longshort.errors import TextError, UsageError
from longshort.ngram import NGram, counted_perplexity
from longshort.text.corpus import Text
from test_cells import SCRATCH_GATES

texts = st.text(alphabet="abc", min_size=6, max_size=80)

LIBRARY = [name for name in comparison.IMPLEMENTATIONS if name != "scratch"]


@given(text=texts, order=st.integers(1, 4))
def test_counted_perplexity_is_the_exponential_of_the_conditional_entropy(text: str, order: int) -> None:
    grams = [text[i : i + order] for i in range(len(text) - order + 1)]
    joint, contexts = Counter(grams), Counter(gram[:-1] for gram in grams)
    entropy = -sum(math.log(joint[gram] / contexts[gram[:-1]]) for gram in grams) / len(grams)
    assert counted_perplexity(text, order) == pytest.approx(math.exp(entropy))


@given(text=texts, order=st.integers(1, 4), context=st.text(alphabet="abcd", max_size=6))
def test_ngram_probabilities_sum_to_one(text: str, order: int, context: str) -> None:
    model = NGram(text, order)
    assert sum(model.probability(context, s) for s in model.vocabulary) == pytest.approx(1.0)
    assert all(model.probability(context, s) > 0 for s in model.vocabulary)


def test_ngram_by_hand() -> None:
    model = NGram("aab", 2)  # p1(a) = (2 + 2/2) / (3 + 2) = 3/5; after a: one a, one b, two kinds
    assert model.probability("", "a") == pytest.approx(3 / 5)
    assert model.probability("a", "b") == pytest.approx((1 + 2 * 2 / 5) / 4)
    assert model.probability("b", "a") == pytest.approx(3 / 5)  # b was never followed by anything
    assert model.perplexity("abz") == pytest.approx(1 / model.probability("a", "b"))


def test_the_lectures_text_and_counts() -> None:
    content = shared_text("timemachine.txt").read_text(encoding="utf-8")
    train, heldout = comparison.lecture_text(content)
    assert (len(train), len(heldout), len(set(train))) == (10_000, 5_000, 43)
    assert train.startswith("the time machine, by h. g. wells [1898]     i   the time tra")
    result = comparison.result(Text.of(content, "timemachine.txt"), threads=1, cells=[], implementations=[])
    assert result["text"]["train_sha256"] == comparison.LECTURE_TEXT_SHA256
    assert "lecture" in result
    found = [baseline["train_perplexity"] for baseline in result["baselines"]]
    assert found == pytest.approx([19.55, 10.29, 4.91, 2.54], abs=0.005)


def test_what_follows_may_be_nothing_that_can_be_predicted() -> None:
    for tail in ("", "y", "Ж" * 500):
        assert comparison.lecture_text("xy" * 5_000 + tail)[1] == ""
    result = comparison.result(Text.of("xy" * 5_000 + "x", "t"), threads=1, cells=["rnn"], epochs=1)
    assert [row["heldout_perplexity"] for row in result["rows"]] == [None] * (1 + len(LIBRARY))


def test_a_short_text_is_refused() -> None:
    with pytest.raises(TextError, match="10,000 characters; this text has 9,999"):
        comparison.lecture_text("x" * 9_999)
    assert comparison.lecture_text("X\r\n" * 5000) == ("x  " * 3333 + "x", "  x" * 1666 + "  ")


@pytest.fixture(scope="module")
def result(english: str) -> dict[str, Any]:
    text = Text.of(english, "english")
    choice: dict[str, Any] = {"cells": ["rnn", "lstm"], "implementations": ["scratch", *LIBRARY]}
    return comparison.result(text, threads=1, seeds=2, epochs=2, **choice)


def test_native_and_torch_are_one_program(result: dict[str, Any]) -> None:
    """The same weights on the same windows: two epochs of the lecture's steps apart by rounding."""
    if "native" not in LIBRARY:
        pytest.skip("there are no native kernels here")
    curves = {(row["cell"], row["seed"], row["implementation"]): row["curve"] for row in result["rows"]}
    for (cell, seed, implementation), curve in curves.items():
        if implementation == "native":
            assert curve == pytest.approx(curves[cell, seed, "torch"], rel=1e-3)


def test_rows_hold_what_is_promised(result: dict[str, Any]) -> None:
    assert len(result["rows"]) == 4 * (1 + len(LIBRARY))
    for row in result["rows"]:
        assert row["train_perplexity"] == {2: row["curve"][1]}
        assert row["seconds_per_epoch"] > 0
        assert row["tokens_per_second"] == pytest.approx(8960 / row["seconds_per_epoch"], rel=0.5)
        assert row["heldout_perplexity"] > 1
    assert {(row["cell"], row["implementation"], row["seed"]) for row in result["rows"]} == {
        (cell, implementation, seed)
        for cell in ("rnn", "lstm")
        for implementation in ("scratch", *LIBRARY)
        for seed in (0, 1)
    }
    assert "lecture" not in result
    json.dumps(result, allow_nan=False)


def test_scratch_and_torch_are_one_program(english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, the textbook and the library's layers train alike, step by step, in float64."""
    monkeypatch.setitem(recipes.RECIPES["lecture"], "hidden", 24)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for cell, gates in SCRATCH_GATES.items():
            text = english[:10_000]
            # The generator has drawn the parameters when it first gives control back: after one epoch at rate zero.
            start = next(scratch.train(text, cell, num_hiddens=24, num_epochs=1, learning_rate=0.0)).model.params
            blocks = {gate: start[3 * i : 3 * i + 3] for i, gate in enumerate(gates)}
            order = [blocks[gate] for gate in cells.CELLS[cell].gates]
            library = comparison._LibraryModel("torch", text, cell, 0, 4)
            weights = {
                "recurrent.weight_ih_l0": torch.cat([block[0].T for block in order]),
                "recurrent.weight_hh_l0": torch.cat([block[1].T for block in order]),
                "recurrent.bias_ih_l0": torch.cat([block[2] for block in order]),
                "output.weight": start[-2].T,
                "output.bias": start[-1],
            }
            with torch.no_grad():
                for name, parameter in library._model.named_parameters():
                    if name in weights:
                        parameter.copy_(weights.pop(name))
            assert not weights
            found = [perplexity for perplexity, _, _ in library.epochs()]
            expected = [epoch.perplexity for epoch in scratch.train(text, cell, num_hiddens=24, num_epochs=4)]
            # PyTorch's clipping divides by the norm + 1e-6; without that they agree to 1e-9.
            assert found == pytest.approx(expected, rel=5e-5)
            assert library.parameters == sum(param.numel() for param in start)
    finally:
        torch.set_default_dtype(before)


def test_the_picture_is_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    for ending in ("png", "svg"):
        plots.comparison(result, tmp_path / f"curves.{ending}")
        assert (tmp_path / f"curves.{ending}").stat().st_size > 5000
    with pytest.raises(UsageError, match="unknown format"):
        plots.comparison(result, tmp_path / "curves.xyz")


def test_a_readers_copy_becomes_a_row(tmp_path: Path, english: str) -> None:
    source = Path(scratch.__file__).read_text(encoding="utf-8")
    gate = "I = torch.sigmoid(X @ W_xi + H @ W_hi + b_i)  # input gate"
    assert gate in source
    mine = tmp_path / "mine.py"
    mine.write_text(source.replace(gate, "I = torch.full_like(H, 0.9)"), encoding="utf-8")
    rows = list(comparison.run(english, cells=["lstm"], implementations=["scratch", str(mine)], epochs=1))
    assert [row.implementation for row in rows] == ["scratch", str(mine)]
    assert rows[0].parameters == rows[1].parameters
    assert rows[0].curve != rows[1].curve


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        ("def broken(:", "cannot be run: SyntaxError"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("x = 1", "has no CELLS, train, predict"),
    ],
)
def test_copies_that_cannot_serve_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        next(comparison.run("x" * 20_000, implementations=[str(path)]))


def test_unknown_names_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(UsageError, match="no implementation called 'natvie'"):
        next(comparison.run("x" * 20_000, implementations=["scratch", "natvie"]))
    with pytest.raises(UsageError, match="no cell called 'lsmt'"):
        next(comparison.run("x" * 20_000, cells=["lsmt"]))
