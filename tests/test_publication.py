"""Models that are handed on: the same model, and a card that says what is true of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import longshort
from longshort import checkpoint, publication, training
from longshort.cli import main
from longshort.config import LabelTrainConfig, TrainConfig
from longshort.errors import ConfigError, OutputError, UsageError
from longshort.model_files import Saved
from longshort.publication import publish
from longshort.text.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh \n")


def run(tmp_path: Path, english: str, *more: str, name: str = "english.txt") -> Path:
    """Train a small model."""
    (tmp_path / name).write_text(english[:6000], encoding="utf-8")
    words = ["train", str(tmp_path / name), "--out", str(tmp_path / "run"), "--steps", "6", "--threads", "1"]
    assert main([*words, "--hidden", "12", "--embedding", "8", "--seq-len", "12", "--batch-size", "4", *more]) == 0
    return tmp_path / "run"


def read(path: Path) -> str:
    return (path / "README.md").read_text(encoding="utf-8")


def facts(path: Path) -> dict[str, str]:
    """Return the table of a card."""
    return dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", read(path), re.MULTILINE))


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A model directory that no run has made."""
    model = training.make_model(TrainConfig(hidden=12, embedding=7, cell="gru", layers=2, residual=True), TOKENIZER)
    path = tmp_path / "untrained"
    checkpoint.save_model(path, model.weights(), model.config.to_dict(), TOKENIZER.to_json(), {})
    return path


def test_the_model_is_the_runs_best_and_the_card_has_its_figures(
    tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = run(tmp_path, english, "--lr", "0.01", "--seed", "7")
    out = publish(path, tmp_path / "my model")
    model, kept = longshort.load(path), longshort.load(out)
    for name, weight in model.weights().items():
        np.testing.assert_array_equal(kept.weights()[name], weight)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "MANIFEST.json", "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    card, result = facts(out), json.loads((path / "result.json").read_text())
    found = result["heldout"]
    assert card["held out"].startswith(f"{found['bits_per_character']:.4f} bits a character, ")
    assert card["held out"].endswith(
        f"of {found['characters']} characters that it was not trained on: {found['protocol']}"
    )
    assert card["trained for"] == f"{result['best_step']} steps of 4 rows x 12 symbols"
    assert "lr 0.01, " in card["with"]
    assert card["with"].endswith("seed 7")
    assert "sha256" not in card["learned from"]
    saved = checkpoint.load_model(path)
    assert card["learned from"] == f"english.txt, SHA-256 {saved.extra['text_sha256']}"
    assert card["weights"] == f"{sum(w.size for w in model.weights().values()):,}, float32"
    assert card["layers"] == "1 x 12 units of the cell lstm, embedding 8"
    assert card["symbols"] == f"{model.config.vocab_size} characters"
    assert str(tmp_path) not in read(out)  # nothing of who trained it
    # What the card says of its use is so.
    shell, python = re.findall(r"```(?:sh|python)\n(.*?)```", read(out), re.DOTALL)
    (tmp_path / "FILE").write_text("the dog\n", encoding="utf-8")
    for command in shell.splitlines():
        assert main(shlex.split(command, comments=True)[1:]) == 0
    capsys.readouterr()
    exec(python, {})
    assert len(capsys.readouterr().out) == 201


def test_half_the_size(tmp_path: Path, english: str) -> None:
    path = run(tmp_path, english)
    out = publish(path, tmp_path / "half", weights="float16")
    model, kept = longshort.load(path), longshort.load(out)
    for name, weight in model.weights().items():
        np.testing.assert_array_equal(kept.weights()[name], weight.astype(np.float16).astype(np.float32))
    whole = publish(path, tmp_path / "whole")
    sizes = [(each / "model.safetensors").stat().st_size for each in (out, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    assert facts(out)["weights"].endswith(", float16")
    again = facts(publish(out, tmp_path / "again"))  # what is known travels with the model
    assert again == facts(out) | {"weights": facts(whole)["weights"], "rounded": "to float16"}
    assert again.keys() == {*facts(whole), "rounded"}


def test_what_a_figure_leaves_out_is_said(tmp_path: Path, english: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path, english, "--tokenizer", "word", "--min-freq", "3")
    skipped = json.loads((path / "result.json").read_text())["heldout"]["skipped"]
    assert skipped
    assert f" tokens, without {skipped} outside the vocabulary; " in capsys.readouterr().err
    card = facts(publish(path, tmp_path / "model"))
    assert card["held out"].endswith(f"; {skipped} symbols outside its vocabulary are left out")
    assert "sampler" in card["with"]


def test_a_model_of_lines_says_so(tmp_path: Path, english: str) -> None:
    card = facts(publish(run(tmp_path, english.replace(" (", "\n"), "--lines"), tmp_path / "model"))
    assert card["reads"] == "lines, each from a zero state"
    assert "sampler" not in card["with"]


def test_figures_of_other_weights_are_left_out(tmp_path: Path, english: str, untrained: Path) -> None:
    path = run(tmp_path, english)
    assert "held out" in facts(publish(path, tmp_path / "a"))
    opened = checkpoint.open_run(path)
    result = opened.result()
    assert result is not None
    opened.write_result({**{k: v for k, v in result.items() if k != "sha256"}, "best_step": 1})
    assert "held out" not in facts(publish(path, tmp_path / "b"))
    opened.write_result(None)
    card = facts(publish(path, tmp_path / "c"))
    assert "held out" not in card
    assert "trained for" in card
    alone = facts(publish(untrained, tmp_path / "d"))
    assert alone.keys() == {"layers", "weights", "symbols"}
    assert alone["layers"] == "2 x 12 units of the cell gru, embedding 7, residual"


def test_a_text_of_any_name(tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = run(tmp_path, english, name="a|b `x`\n.txt")
    out = publish(path, tmp_path / 'it\'s "mine" | $(x)')
    assert facts(out)["learned from"].startswith("'a\\|b `x`\\n.txt', SHA-256 ")
    shell, python = re.findall(r"```(?:sh|python)\n(.*?)```", read(out), re.DOTALL)
    assert main(shlex.split(shell.splitlines()[0], comments=True)[1:]) == 0
    exec(python, {})


def test_models_that_label(tmp_path: Path) -> None:
    texts, labels = ["abab", "aab", "cdcd", "ccdd"] * 6, ["x", "x", "y", "y"] * 6
    examples, heldout = longshort.Examples(texts, labels).split(0.25)
    config = LabelTrainConfig(out=str(tmp_path / "run"), hidden=6, embedding=4, epochs=1, threads=1)
    list(longshort.train_labels(config, examples, heldout))
    out = publish(tmp_path / "run", tmp_path / "model")
    card, model = facts(out), longshort.load(out)
    found = longshort.evaluate_labels(model, heldout)
    assert card["labels"] == "x, y"
    assert card["held out"] == (
        f"accuracy {found.accuracy:.4f}, macro F1 {found.macro_f1:.4f}, of 6 labels that it was not trained on"
    )
    assert "text-classification" in read(out)
    assert "labels texts" in read(out)


def test_what_needs_pytorch_is_said(tmp_path: Path, english: str) -> None:
    for options, words in (
        ({"adaptive_softmax": True, "vocab_size": 2000}, "It needs PyTorch."),
        ({"cell": "mine.py:MyCell"}, "the file of its cell, `mine.py:MyCell`"),
    ):
        config: dict[str, Any] = {**TrainConfig(hidden=16, embedding=4).model(TOKENIZER.size).to_dict(), **options}
        saved = Saved(tmp_path, {}, config, TOKENIZER.to_json(), None, {})
        card = publication.card(saved, "it", {})
        assert words in card
        assert "```python" not in card
    assert "--cell mine.py:MyCell it --prompt" in card


def test_what_cannot_be_is_refused(tmp_path: Path, untrained: Path) -> None:
    with pytest.raises(ConfigError, match="float32 or float16, not 'int8'"):
        publish(untrained, tmp_path / "out", weights="int8")
    with pytest.raises(UsageError, match="Wanted a run or model directory"):
        publish(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        publish(untrained, tmp_path / "there")
    saved = checkpoint.load_model(untrained)
    saved.weights["output.bias"][3] = -70_000
    checkpoint.save_model(tmp_path / "large", saved.weights, saved.model, saved.tokenizer_json, {})
    with pytest.raises(UsageError, match=r"A weight of output\.bias is beyond 65,504"):
        publish(tmp_path / "large", tmp_path / "out", weights="float16")
    assert not (tmp_path / "out").exists()
    publish(tmp_path / "large", tmp_path / "out")


def test_the_verb(
    tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path, english)
    capsys.readouterr()
    assert main(["publish", "run/", "--weights", "float16"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"run-model: \d+\.\d MB; run-model/README\.md says what it is: .*\n", captured.out)
    if longshort.load("run").writes:
        assert re.search(r"float16 weights cost 0\.0\d+ bits a character", captured.err)
    assert main(["publish", "run"]) == 1
    assert "run-model is there already" in capsys.readouterr().err
    assert main(["publish", "run", "--out", "other", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "other").iterdir())
    assert (found["out"], found["weights"]) == ("other", "float32")
