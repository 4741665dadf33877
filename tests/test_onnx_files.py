"""Models as ONNX files: ONNX Runtime gives what PyTorch gives; what ONNX cannot hold is refused by name."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import longshort
from conftest import ROOT
from longshort import checkpoint, onnx_files, training
from longshort.cli import main
from longshort.config import LabelModelConfig, TrainConfig
from longshort.errors import LongshortError, OutputError, UsageError
from longshort.generation import Sampling, generate
from longshort.labels.examples import Batch
from longshort.labels.labellers import Labeller, make_labeller
from longshort.model import LanguageModel
from longshort.text.tokenizers import CharTokenizer, from_json
from longshort.text.words import WordTokenizer

runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

TOKENIZER = CharTokenizer("abcdefgh \n")
CELLS = ("rnn", "rnn_relu", "gru", "lstm")


def language_model(**given: Any) -> LanguageModel:
    """Return a model with random weights."""
    model = training.make_model(TrainConfig(**{"hidden": 12, "embedding": 7, **given}), TOKENIZER).eval()
    torch.manual_seed(0)
    # Larger ones let differences grow from step to step.
    scale = (0.7 if model.config.cell == "rnn_relu" else 1.4) * model.config.hidden**-0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def labeller(**given: Any) -> Labeller:
    """Return a classifier or tagger with random weights."""
    torch.manual_seed(0)
    config = LabelModelConfig(**{"labels": ("a", "b", "c"), "hidden": 5, "embedding": 4, "vocab_size": 6, **given})
    model = make_labeller(config, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def saved(model: LanguageModel, path: Path) -> Path:
    """Save a model as a model directory."""
    checkpoint.save_model(path, model.weights(), model.config.to_dict(), TOKENIZER.to_json(), {})
    return path


def session(model: Any) -> Any:
    """Return what runs the exported model."""
    return runtime.InferenceSession(onnx_files.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def zeros(model: LanguageModel, rows: int) -> dict[str, NDArray[np.float32]]:
    """Return the state before a text, by name."""
    return dict(zip(("h", "c"), (tensor.numpy() for tensor in model.zero_state(rows)), strict=False))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"embedding": 0},
        {"layers": 3},
        {"layers": 3, "residual": True},
        {"tied": True, "embedding": 12},
        {"hidden": 1, "embedding": 1},
    ],
    ids=str,
)
def test_a_language_model_gives_what_pytorch_gives(cell: str, given: dict[str, Any]) -> None:
    model = language_model(cell=cell, **given)
    run = session(model)
    for T in (1, 2, 17, 100):
        for B in (1, 3, 8):
            state = zeros(model, B)
            tensors = tuple(torch.randn(tensor.shape) * 0.5 for tensor in state.values())
            state = {name: tensor.numpy() for name, tensor in zip(state, tensors, strict=True)}
            ids_TB = torch.randint(0, TOKENIZER.size + 1, (T, B))  # the unknown symbol too
            with torch.no_grad():
                logits, after = model(ids_TB, tensors)
            found = run.run(None, {"ids": ids_TB.numpy(), **state})
            for ours, theirs in zip((logits, *after), found, strict=True):
                assert theirs.shape == ours.shape
                np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


def test_an_adaptive_softmax_gives_log_p() -> None:
    given = TrainConfig(hidden=20, embedding=9, adaptive_softmax=True, tokenizer="word")
    model = LanguageModel(given.model(1500)).eval()
    ids_TB = torch.randint(0, 1501, (9, 3))
    with torch.no_grad():
        logits, _ = model(ids_TB)
    found = session(model).run(["logits"], {"ids": ids_TB.numpy(), **zeros(model, 3)})[0]
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)


@settings(max_examples=40)
@given(
    cell=st.sampled_from(CELLS),
    layers=st.integers(1, 3),
    both=st.booleans(),
    residual=st.booleans(),
    reads=st.sampled_from([{"embedding": 4}, {"embedding": 0}, {"reads": "vectors", "vocab_size": 0, "inputs": 3}]),
    decides=st.sampled_from([{"pooling": "mean"}, {"pooling": "ends"}, {"per_step": True}]),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
)
def test_a_labeller_gives_what_pytorch_gives(
    cell: str, layers: int, both: bool, residual: bool, reads: Any, decides: Any, lengths: list[int]
) -> None:
    model = labeller(cell=cell, layers=layers, bidirectional=both, residual=residual and layers > 1, **reads, **decides)
    config, rng, shape = model.config, np.random.default_rng(0), (max(lengths), len(lengths))
    lengths_B = np.array(lengths)
    inputs: Any = rng.integers(7, size=shape)
    if config.inputs:
        inputs = rng.normal(size=(*shape, config.inputs)).astype(np.float32)
    ours = model.logits(Batch(inputs, lengths_B, np.empty(0, np.int64)))
    given = {"x" if config.inputs else "ids": inputs, "lengths": lengths_B}
    (theirs,) = session(model).run(None, given)
    assert theirs.shape == ours.shape
    if config.per_step:  # beyond a row's end they mean nothing
        has_TB = np.arange(shape[0])[:, None] < lengths_B
        ours, theirs = ours[has_TB], theirs[has_TB]
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_text_is_written(cell: str, tmp_path: Path) -> None:
    path = saved(language_model(cell=cell, layers=2), tmp_path / "model")
    file = tmp_path / "model.onnx"
    longshort.export_onnx(longshort.load(path), file)
    run = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tokenizer = from_json(run.get_modelmeta().custom_metadata_map["longshort_tokenizer"])
    state, ids, text = zeros(language_model(cell=cell, layers=2), 1), tokenizer.encode("bad "), ""
    for _ in range(100):
        logits, *after = run.run(None, {"ids": np.array(ids, np.int64)[:, None], **state})
        state, ids = dict(zip(state, after, strict=True)), np.array([logits[-1, 0].argmax()])
        text += tokenizer.decode(ids)
    decoder = longshort.load(path)
    ours = "".join(generate(decoder, decoder.tokenizer, "bad ", 100, Sampling(temperature=0)))
    assert text == ours


def test_the_verb_says_what_it_wrote_and_how_near_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(language_model(layers=2), tmp_path / "model")
    file = tmp_path / "model.onnx"
    assert main(["export", str(path), "--out", str(file)]) == 0
    first, inputs, outputs, compared = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}: 0.0 MB")
    assert inputs == "in   ids (T, B), h (2, B, 12), c (2, B, 12)"
    assert outputs == "out  logits (T, B, 10), h_n (2, B, 12), c_n (2, B, 12)"
    assert compared.startswith("ONNX Runtime")
    assert " gives the same, to " in compared
    again = tmp_path / "again.onnx"
    assert main(["export", str(path), "--out", str(again), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == again.stat().st_size
    assert found["inputs"]["h"] == [2, "B", 12]
    assert 0 <= found["largest_difference"] < 1e-5
    assert file.read_bytes() == again.read_bytes()


def test_the_page_and_the_example_run(
    tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text.txt").write_text(english, encoding="utf-8")
    assert main(["train", "my-text.txt", "--steps", "2", "--out", "my-text-run"]) == 0
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    commands = re.findall(r"^longshort (.*)$", page, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["publish", "generate", "export"]
    for command in commands:
        assert main(shlex.split(command)) == 0
    decoder = longshort.load("my-text-run")
    by_runtime, by_torch = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    capsys.readouterr()
    exec(by_runtime, {})
    ids = decoder.tokenizer.encode("the ").astype(np.int64)
    likeliest = decoder.tokenizer.decode([int(decoder.logits(ids, None)[0].argmax())])
    assert capsys.readouterr().out == f"{likeliest}\n"
    names: dict[str, Any] = {}
    exec(by_torch, names)
    wanted, _ = decoder.logits(np.array([0, 1, 2]), None)
    np.testing.assert_allclose(names["logits"][-1, 0].detach().numpy(), wanted, atol=1e-5)
    example = [sys.executable, str(ROOT / "examples" / "write_onnx.py"), "my-text-run.onnx", "--temperature", "0"]
    done = subprocess.run([*example, "--prompt", "the ☃", "--length", "40"], capture_output=True, check=True)
    ours = "".join(generate(decoder, decoder.tokenizer, "the ☃", 40, Sampling(temperature=0)))
    assert done.stdout.decode() == f"the ☃{ours}\n"


def test_the_pages_figures_are_the_result_files() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"benchmarks/results/[\w.-]+\.json", page)
    one, two = (row["ratio"] for row in json.loads((ROOT / name).read_text(encoding="utf-8"))["rows"])
    assert f"{one:.0f} times as fast as ONNX Runtime with one thread each, {two:.1f} times with two" in page


def test_the_example_refuses_models_of_words(tmp_path: Path) -> None:
    tokenizer = WordTokenizer.train(["a b a\n"])
    model = LanguageModel(TrainConfig(hidden=4, embedding=3, tokenizer="word").model(tokenizer.size), tokenizer).eval()
    longshort.export_onnx(model, tmp_path / "words.onnx")
    example = [sys.executable, str(ROOT / "examples" / "write_onnx.py"), str(tmp_path / "words.onnx")]
    done = subprocess.run(example, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "does not read characters" in done.stderr


def test_the_name_is_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(language_model(), tmp_path / "my-run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "my-run/"]) == 0
    assert (tmp_path / "my-run.onnx").is_file()


def test_a_labeller_is_exported_from_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ({}, {"per_step": True}, {"reads": "vectors", "vocab_size": 0, "inputs": 3}):
        model = labeller(**kind)
        path = tmp_path / f"model-{len(kind)}"
        checkpoint.save_model(path, model.weights(), model.config.to_dict(), "null\n", {})
        assert main(["export", str(path), "--out", f"{path}.onnx", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["largest_difference"] < 1e-5
        assert found["inputs"]["lengths"] == ["B"]


def test_without_a_runtime_the_file_is_written_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(language_model(), tmp_path / "model")
    monkeypatch.setattr(onnx_files, "version_of", lambda package: None)
    assert main(["export", str(path), "--out", str(tmp_path / "model.onnx")]) == 0
    assert "pip install onnxruntime" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("make", [language_model, labeller])
def test_a_file_that_differs_is_not_written(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = onnx_files._Operator("LSTM", (0, 1, 2, 3))
    monkeypatch.setitem(onnx_files._OPERATORS, "lstm", wrong)
    with pytest.raises(LongshortError, match="differs from the model by"):
        longshort.export_onnx(make(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_no_success(tmp_path: Path) -> None:
    model = language_model()
    with torch.no_grad():
        model.state_dict()["output.bias"][0] = float("nan")
    with pytest.raises(LongshortError, match="differs"):
        longshort.export_onnx(model, tmp_path / "model.onnx")


def test_what_onnx_cannot_hold_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    normalised = saved(language_model(layer_norm=True), tmp_path / "normalised")
    assert main(["export", str(normalised), "--out", str(tmp_path / "a.onnx")]) == 2
    assert "no layer normalisation" in capsys.readouterr().err
    own = language_model().config.to_dict() | {"cell": "mine.py:Mine"}
    checkpoint.save_model(tmp_path / "own", language_model().weights(), own, TOKENIZER.to_json(), {})
    assert main(["export", str(tmp_path / "own"), "--out", str(tmp_path / "a.onnx")]) == 2
    assert "no operator for the cell mine.py:Mine" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(language_model(), tmp_path / "model")
    file = tmp_path / "model.onnx"
    file.write_text("mine")
    assert main(["export", str(path), "--out", str(file)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == "mine"
    with pytest.raises(OutputError, match="Cannot write"):
        longshort.export_onnx(language_model(), tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize("out", ["model.pt", "model"])
def test_only_names_of_onnx_files_are_taken(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(language_model(), tmp_path / "model")
    assert main(["export", str(path), "--out", out]) == 2
    assert "End the name of --out in .onnx" in capsys.readouterr().err


def test_too_many_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "LIMIT", 1000)
    with pytest.raises(UsageError, match="one piece has 1,000 at most"):
        longshort.export_onnx(language_model(), tmp_path / "model.onnx")


def test_without_onnx_the_command_that_installs_it_is_told(tmp_path: Path) -> None:
    path = saved(language_model(), tmp_path / "model")
    program = (
        "import sys; sys.modules['onnx'] = None; from longshort.cli import main;"
        f"sys.exit(main(['export', {str(path)!r}, '--out', {str(tmp_path / 'a.onnx')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "longshort: An ONNX file needs onnx, which is not installed.",
        "Install it with: pip install 'longshort[export]'",
    ]


def test_no_torch_is_needed(tmp_path: Path) -> None:
    path = saved(language_model(), tmp_path / "model")
    program = (
        "import sys; sys.modules['torch'] = None; from longshort.cli import main;"
        f"sys.exit(main(['export', {str(path)!r}, '--out', {str(tmp_path / 'a.onnx')!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_adaptive_softmax_without_torch_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = language_model().config.to_dict() | {"adaptive_softmax": True}
    checkpoint.save_model(tmp_path / "model", language_model().weights(), config, TOKENIZER.to_json(), {})
    monkeypatch.setattr(onnx_files, "version_of", lambda package: None)
    with pytest.raises(LongshortError, match="adaptive softmax needs PyTorch"):
        onnx_files.load(tmp_path / "model")
