"""What a model shows of its inside, against the equations in float64, evaluation, and units that were planted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import longshort
from conftest import ROOT
from longshort import native, training
from longshort.cli import main
from longshort.config import ModelConfig, TrainConfig
from longshort.decoder import Decoder
from longshort.errors import TextError
from longshort.evaluation import evaluate
from longshort.inspection import Inspection, inspect
from longshort.model import LanguageModel
from longshort.scoring import score
from longshort.text.aspects import ASPECTS
from longshort.text.tokenizers import train_tokenizer

Array = NDArray[np.float32]
LAYERS = {"rnn": longshort.RNN, "rnn_relu": longshort.RNN, "gru": longshort.GRU, "lstm": longshort.LSTM}
TEXT = 'ab "ba" aab\nb (a) b\n\nab aab "b'


def make(tokenizer_name: str = "char", **settings: Any) -> tuple[Decoder, LanguageModel]:
    """Return a small model of `TEXT` with random weights, without PyTorch and with."""
    tokenizer = train_tokenizer(tokenizer_name, TEXT)
    torch.manual_seed(3)
    model = training.make_model(TrainConfig(**{"hidden": 12, "embedding": 6, **settings}), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Decoder(model.config, model.weights(), tokenizer), model


def by_equations(model: LanguageModel, ids: NDArray[np.int64]) -> list[dict[str, Array]]:
    """Return the readings of the layer of the same weights, by its equations in float64."""
    config = model.config
    options: dict[str, Any] = {"layer_norm": config.layer_norm, "residual": config.residual}
    if config.cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    width = config.embedding or config.vocab_size
    layer = LAYERS[config.cell](width, config.hidden, config.layers, dtype=torch.float64, **options)
    recurrent = {name: value for name, value in model.state_dict().items() if name.startswith("recurrent.")}
    layer.load_state_dict({name.removeprefix("recurrent."): value.double() for name, value in recurrent.items()})
    rows = np.eye(config.vocab_size) if model.embedding is None else model.embedding.weight.detach().double().numpy()
    x_TI = torch.from_numpy(np.vstack([rows, np.zeros(width)])[ids])
    with longshort.kernels.use("reference"), torch.no_grad():
        _, _, readings = layer(x_TI, return_gates=True)
    return [{name: value.numpy() for name, value in each.items()} for each in readings]


CASES = [
    {"cell": cell, "layers": layers, "embedding": embedding, "layer_norm": layer_norm, "residual": layers > 1}
    for cell in LAYERS
    for layers, embedding, layer_norm in ((1, 6, False), (2, 0, False), (3, 6, True))
]


@pytest.mark.parametrize("settings", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_readings_are_those_of_the_equations(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, model = make(**settings)
    ids = np.append(decoder.tokenizer.encode(TEXT), decoder.tokenizer.size).astype(np.int64)  # the last is unknown
    expected = by_equations(model, ids)
    found = [decoder.readings(ids), model.readings(ids)]
    monkeypatch.setattr(native, "ready", lambda: False)
    found.append(Decoder(model.config, model.weights(), decoder.tokenizer).readings(ids))
    for readings in found:
        assert [list(each) for each in readings] == [list(each) for each in expected]
        for ours, theirs in zip(readings, expected, strict=True):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("tokenizer_name", ["char", "byte", "word"])
def test_each_symbol_costs_what_evaluation_says(tokenizer_name: str) -> None:
    decoder, model = make(tokenizer_name)
    readers: list[Any] = [decoder, model]
    for reader in readers:
        found = inspect(reader, decoder.tokenizer, TEXT)
        assert np.isnan(found.nats[0])
        assert found.nats_per_token == pytest.approx(evaluate(reader, decoder.tokenizer, TEXT).nats_per_token, rel=1e-6)
        assert "".join(found.symbols) == TEXT
        assert len(found.symbols) == len(found.nats) == len(found.layers[0]["h"])


def test_lines_begin_from_a_zero_state_after_a_newline() -> None:
    decoder, _ = make(lines=True)
    found = inspect(decoder, decoder.tokenizer, TEXT)
    assert "".join(found.symbols) == TEXT
    assert not np.isnan(found.nats).any()
    place = 0
    for line, scored in zip(TEXT.split("\n")[:-1], score(decoder, TEXT.split("\n")[:-1]), strict=True):
        nats = found.nats[place : place + len(line) + 1]
        assert nats.sum() / math.log(2) / (len(line) + 1) == pytest.approx(scored.bits_per_character, rel=1e-5)
        alone = inspect(decoder, decoder.tokenizer, line) if line else None
        if alone is not None:
            assert found.layers[0]["c"][place : place + len(line)] == pytest.approx(alone.layers[0]["c"], abs=1e-6)
        place += len(line) + 1


@pytest.mark.parametrize("tokenizer_name", ["char", "byte", "word", "bpe"])
def test_a_text_of_lines_need_not_end_in_a_newline(tokenizer_name: str) -> None:
    decoder, _ = make(tokenizer_name, lines=True)
    whole = inspect(decoder, decoder.tokenizer, TEXT + "\n")
    found = inspect(decoder, decoder.tokenizer, TEXT)
    assert "".join(found.symbols) == TEXT
    assert found.symbols == whole.symbols[:-1]
    np.testing.assert_array_equal(found.nats, whole.nats[:-1])
    for name, value in found.layers[0].items():
        np.testing.assert_array_equal(value, whole.layers[0][name][:-1])
    with pytest.raises(TextError, match="nothing to read"):
        inspect(decoder, decoder.tokenizer, "")


def test_what_the_vocabulary_lacks_is_read_and_not_predicted() -> None:
    decoder, _ = make()
    found = inspect(decoder, decoder.tokenizer, "abéb")
    assert np.isnan(found.nats).tolist() == [True, False, True, False]
    assert found.symbols == ["a", "b", "é", "b"]
    with pytest.raises(TextError, match="nothing to read"):
        inspect(decoder, decoder.tokenizer, "")


# ------------------------------------------------------------------------------------------------- what is made of it


class Planted:
    """A model whose units are what the test says."""

    def __init__(self, readings: list[dict[str, Array]], cell: str) -> None:
        self.config = ModelConfig(cell=cell, hidden=readings[0]["h"].shape[1], layers=len(readings), vocab_size=256)
        self._readings = readings

    def readings(self, ids_T: NDArray[np.int64]) -> list[dict[str, Array]]:
        return self._readings

    def nats(self, inputs_TB: NDArray[np.int64], targets_TB: NDArray[np.int64], state: Any) -> tuple[Any, Any]:
        return np.ones(inputs_TB.shape), None

    def logits(self, ids_T: NDArray[np.int64], state: Any) -> tuple[Any, Any]:
        raise NotImplementedError


def planted(text: str, readings: list[dict[str, Array]], cell: str = "rnn") -> Inspection:
    return inspect(Planted(readings, cell), train_tokenizer("byte", ""), text)


QUOTED = 'he said "that is so" and she (his sister) said "no" again\n' * 20


def noise(units: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(len(QUOTED), units)).astype(np.float32) * 0.5


def test_a_unit_that_follows_is_found() -> None:
    inside = ASPECTS["inside quotation marks"](QUOTED)
    readings = [{"h": noise(5)}, {"h": noise(5, 1)}]
    readings[1]["h"][:, 3] -= 2 * inside
    found = planted(QUOTED, readings).following()
    best = next(each for each in found if each.aspect == "inside quotation marks")
    assert (best.layer, best.unit, best.value) == (1, 3, "h")
    expected = np.corrcoef(readings[1]["h"][len(QUOTED) // 2 :, 3], inside[len(QUOTED) // 2 :])[0, 1]
    assert best.correlation == pytest.approx(expected, abs=1e-5)
    assert best.correlation < -0.8
    assert found[0] == best
    assert all(abs(each.correlation) < 0.3 for each in found if (each.layer, each.unit) != (1, 3))


def test_a_unit_that_follows_by_chance_is_not_believed() -> None:
    inside, middle = ASPECTS["inside brackets"](QUOTED), len(QUOTED) // 2
    readings = [{"h": noise(5)}]
    readings[0]["h"][:middle, 2] += 2 * inside[:middle]
    best = next(each for each in planted(QUOTED, readings).following() if each.aspect == "inside brackets")
    assert best.unit == 2
    assert best.chosen > 0.7
    assert abs(best.correlation) < 0.15


def test_an_aspect_that_is_hardly_there_is_left_out() -> None:
    text = "a" * 600 + '"b" (c) 12\n' + "d " * 20
    found = planted(text, [{"h": np.random.default_rng(0).normal(size=(len(text), 3)).astype(np.float32)}])
    assert {each.aspect for each in found.following()} <= {"letters since the word began", "a vowel"}
    assert planted("short", [{"h": np.zeros((5, 3), np.float32)}]).following() == []


@pytest.mark.parametrize(("cell", "gate"), [("lstm", "f"), ("gru", "z")])
def test_memory_is_the_half_life_of_the_gate(cell: str, gate: str) -> None:
    T = 101
    kept = np.full((T, 4), (0.4, 0.9, 1.0, 1.0), np.float32)
    kept[::10, 3] = 0.0  # forgets all at once, now and then
    names = {"lstm": "ifgohc", "gru": "rznh"}[cell]
    readings = {name: np.zeros((T, 4), np.float32) for name in names} | {gate: kept}
    (memory,) = planted("a" * T, [readings], cell).memories()
    assert (memory.layer, memory.gate) == (0, gate)
    # 0.9^7 is below a half; what is never lost is there to the end; 1 to 10 steps to the next zero.
    assert memory.half_life.tolist() == [1, 7, 50, 5]
    assert memory.quantiles() == {"0.1": pytest.approx(2.2), "0.5": 6, "0.9": pytest.approx(37.1), "1.0": 50}


def test_gates_are_summed_up_and_units_shown() -> None:
    readings = {name: np.zeros((4, 2), np.float32) for name in "ifgohc"}
    readings["i"] = np.array([[0.05, 0.95], [0.5, 0.95], [0.05, 0.05], [0.5, 0.5]], np.float32)
    readings["c"] = np.array([[-3, 0], [0.5, 0], [-1, 0], [0, 0]], np.float32)
    found = planted("abcd", [readings], "lstm")
    of_i, of_c = (next(gate for gate in found.gates() if gate.name == name) for name in "ic")
    assert [*of_i] == [0, "i", pytest.approx(readings["i"].mean()), 3 / 8, 2 / 8]
    assert [*of_c] == [0, "c", pytest.approx(4.5 / 8), None, 2 / 8]
    assert found.value == "tanh c"
    assert found.unit(0, 0) == pytest.approx(np.tanh([-3, 0.5, -1, 0]))
    assert found.unit(0, 1, "i").tolist() == readings["i"][:, 1].tolist()


@given(text=st.text(st.sampled_from('aB1 "([“”)].?\n'), max_size=60), cut=st.integers(0, 60))
def test_no_aspect_knows_what_comes(text: str, cut: int) -> None:
    for name, say in ASPECTS.items():
        values = say(text)
        assert values.shape == (len(text),), name
        assert values.dtype == np.float32
        assert values[:cut].tolist() == say(text[:cut]).tolist(), name


def test_aspects_by_hand() -> None:
    def say(aspect: str, text: str) -> list[int]:
        return [int(value) for value in ASPECTS[aspect](text)]

    assert say("inside quotation marks", 'a"b"c') == [0, 1, 1, 0, 0]
    assert say("inside quotation marks", "“a” b") == [1, 1, 0, 0, 0]
    assert say("inside quotation marks", '"a\n\nb') == [1, 1, 1, 0, 0]
    assert say("inside brackets", "a(b[c]d)e)f") == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert say("characters since the line began", "ab\nc") == [1, 2, 0, 1]
    assert say("characters since the sentence ended", "a. b") == [1, 0, 1, 2]
    assert say("letters since the word began", "ab c") == [1, 2, 0, 1]
    assert say("a capital letter", "aB") == [0, 1]
    assert say("a vowel", "aBE") == [1, 0, 1]
    assert say("a punctuation mark", "a, ") == [0, 1, 0]


# ------------------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A directory with a text and a run."""
    place = tmp_path_factory.mktemp("inspect")
    (place / "text.txt").write_text(english, encoding="utf-8")
    small = ["--hidden", "12", "--embedding", "8", "--layers", "2", "--seq-len", "12", "--batch-size", "4"]
    arguments = [str(place / "text.txt"), "--steps", "20", *small, "--threads", "1", "--out", str(place / "run")]
    assert main(["train", *arguments]) == 0
    return place


def test_the_verb_shows_what_python_gives(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, text = str(run / "run"), str(run / "text.txt")
    picture, arrays = tmp_path / "gates.png", tmp_path / "new" / "gates.npz"
    more = ["--plot", str(picture), "--layer", "0", "--out", str(arrays), "--unit", "1:3", "--json"]
    capsys.readouterr()
    assert main(["inspect", model, text, "--length", "2000", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    decoder = longshort.load(model)
    content = Path(text).read_text(encoding="utf-8")[:2000]
    expected = longshort.inspect(decoder, decoder.tokenizer, content)
    wanted = json.loads(json.dumps(expected.to_dict()))
    assert {name: found[name] for name in wanted} == {**wanted, "symbols": list(content)}
    assert (found["model"], found["text"], found["tokens"]) == (model, "text.txt", 2000)
    assert found["text_sha256"] == hashlib.sha256(content.encode()).hexdigest()
    assert found["unit"]["values"] == pytest.approx(expected.unit(1, 3), abs=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with np.load(arrays, allow_pickle=False) as read:
        assert set(read) == {"symbols", "nats", *(f"{name}_l{layer}" for name in "ifgohc" for layer in (0, 1))}
        assert read["f_l1"] == pytest.approx(expected.layers[1]["f"])

    assert main(["inspect", model, text, "--length", "2000"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "LSTM 2 x 12, 2,000 symbols",
        "below 0.1",
        "Layer 1: half of what",
        "letters since the word began",
    ):
        assert words in shown
    bars = [line for line in shown.splitlines() if line and set(line) <= set("▁▂▃▄▅▆▇█")]
    assert sum(map(len, bars)) >= 480


def test_a_unit_has_a_bar_below_each_symbol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(run / "run"), "--prompt", "one\ttwo\n\x1b end", "--unit", "0:1", "--value", "f"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["one two⏎", "␛ end"]
    assert [len(line) for line in lines[1::2]] == [8, 5]
    assert set("".join(lines[1::2])) <= set("▁▂▃▄▅▆▇█")


def test_standard_input_is_read_and_not_kept(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longshort", "inspect", str(run / "run"), "-", "--unit", "0:1"]
    kept = {"LONGSHORT_CACHE": str(tmp_path)}
    done = subprocess.run(command, input="one\ntwo", capture_output=True, text=True, env=os.environ | kept, check=True)
    assert done.stdout.splitlines()[::2] == ["one⏎", "two"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "One text is wanted"),
        (["text.txt", "--prompt", "a"], "One text is wanted"),
        (["--prompt", "a", "--length", "0"], "--length must be at least 1"),
        (["--prompt", "a", "--value", "f"], "--unit LAYER:NUMBER"),
        (["--prompt", "a", "--unit", "0:12"], "from 0:0 to 1:11"),
        (["--prompt", "a", "--unit", "7"], "from 0:0 to 1:11"),
        (["--prompt", "a", "--unit", "0:1", "--value", "q"], "i, f, g, o, h, c, tanh c"),
        (["--prompt", "a", "--layer", "1"], "--plot"),
        (["--prompt", "a", "--layer", "2", "--plot", "a.png"], "from 0 to 1"),
        (["--prompt", "a", "--plot", "a.bmp"], "unknown format"),
        (["--prompt", "a", "--out", "a.txt"], ".npz"),
        (["missing.txt"], "missing.txt"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    before = sorted(run.iterdir())
    capsys.readouterr()
    assert main(["inspect", "run", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) <= 3
    assert sorted(run.iterdir()) == before


def test_the_page_is_true(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "2026-11-26-inspection.json").read_text(encoding="utf-8"))
    found = [{each["aspect"]: each for each in row["following"]} for row in result["rows"]]
    assert set(found[0]) == set(ASPECTS)
    for aspect in ASPECTS:
        units = [
            f"{row[aspect]['correlation']:+.2f} (0:{row[aspect]['unit']})" if aspect in row else "-" for row in found
        ]
        assert f"| {aspect} | {' | '.join(units)} |" in page
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text-run").symlink_to(run / "run")
    exec(program, {})
    assert (tmp_path / "gates.npz").is_file()
    # The commands, on the run of this test; the first unit that the page names is beyond its 12.
    (tmp_path / "longshort-demo").symlink_to(run / "run")
    (tmp_path / "my-text.txt").symlink_to(run / "text.txt")
    commands = re.findall(r"^longshort (inspect .*)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("0:64", "0:6"))
        assert main([*words, "--length", "3000"]) == 0, command
