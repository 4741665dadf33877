"""Deep language models in every verb, residual and normalised; depth held against width."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import longshort
from conftest import ROOT
from longshort import depth, native, plots, training
from longshort.cli import main, tables
from longshort.config import ModelConfig, TrainConfig
from longshort.errors import ConfigError, TrainingError, UsageError
from longshort.training import Prepared

SMALL = ["--hidden", "12", "--embedding", "6", "--batch-size", "8", "--seq-len", "16", "--tokenizer", "char"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    path = tmp_path_factory.mktemp("deep") / "text.txt"
    path.write_text(english, encoding="utf-8")
    return path


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--layers", "3", "--residual"],
        ["--layers", "2", "--residual", "--layer-norm", "--cell", "gru"],
        ["--layer-norm"],
    ],
)
def test_every_verb_has_deep_models(
    flags: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    said(capsys, "train", str(text), "--steps", "6", "--out", run, *flags, *SMALL, "--dropout", "0.1")
    said(capsys, "resume", run, "--steps", "12")
    figure = json.loads(said(capsys, "eval", run, "--split", "valid", "--json"))
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert figure["nats_per_token"] == result["heldout"]["nats_per_token"]
    model = longshort.load(run, train=True)
    assert model.config.residual is ("--residual" in flags)
    assert model.config.layer_norm is ("--layer-norm" in flags)
    written = said(capsys, "generate", run, "--prompt", "The", "--length", "30", "--temperature", "0")
    greedy = longshort.generate(model, model.tokenizer, "The", 30, longshort.Sampling(temperature=0))
    assert written == "The" + "".join(greedy) + "\n"
    short = tmp_path / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    assert len(said(capsys, "score", run, str(short)).splitlines()) == len(short.read_text().splitlines())
    said(capsys, "eval", run, str(short), "--dynamic")
    said(capsys, "train", str(text), "--from", run, "--steps", "1", "--out", str(tmp_path / "next"))
    assert longshort.load(tmp_path / "next", train=True).config == model.config
    if native.targets():
        said(capsys, "generate", run, "--length", "5", "--weights", "int8")
    plain = ["train", str(text), "--from", run, "--steps", "1", "--no-layer-norm", "--no-residual"]
    assert main([*plain, "--out", str(tmp_path / "other")]) == 2
    assert "does not go with --from" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="second layer on, but there is one"):
        ModelConfig(residual=True)
    with pytest.raises(ConfigError, match="two hidden units or more"):
        ModelConfig(layer_norm=True, hidden=1)


def test_gains_start_at_one_with_the_lectures_weights_too(english: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(english, encoding="utf-8")
    config = TrainConfig(texts=(str(path),), layer_norm=True, layers=2, hidden=8, embedding=0, init="normal")
    model = training.make_model(config, Prepared(config).tokenizer)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert bool((parameter == 1).all()), name
        elif parameter.dim() == 1:
            assert bool((parameter == 0).all()), name
    assert model.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("kind", depth.KINDS)
def test_stacks_are_as_wide_as_makes_their_weights_equal(cell: str, kind: str) -> None:
    one = ModelConfig(cell=cell, hidden=100, vocab_size=40)
    wanted = longshort.LanguageModel(one).num_parameters
    for layers in (2, 5):
        config = ModelConfig(cell=cell, layers=layers, vocab_size=40, **depth.KINDS[kind])
        counts = {}
        width = depth.equal_width(config, wanted)
        for hidden in (width - 1, width, width + 1):
            sized = ModelConfig(**{**config.to_dict(), "hidden": hidden})
            counts[hidden] = longshort.LanguageModel(sized).num_parameters
        assert min(counts, key=lambda hidden: abs(counts[hidden] - wanted)) == width


def test_depth_against_width(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "depth", "--seconds", "0.2", "--hidden", "24", "--layers", "1,3", "--cells", "gru"]
    flags += ["--kinds", "plain,residual,both"]
    picture = tmp_path / "deep.png"
    assert main(["compare", str(text), *flags, "--seeds", "2", "--json", "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    kinds = [(row["layers"], row["kind"]) for row in rows[: len(rows) // 2]]
    assert kinds == [(1, "plain"), (3, "plain"), (3, "residual"), (3, "both")]
    for row in rows:
        assert abs(row["parameters"] / rows[0]["parameters"] - 1) < 0.05
        assert row["seconds"] >= 0.2
        assert len(row["curve"]) == depth.LOOKS
        assert 0 < row["bits_per_character"] < 8
        assert row["steps"] > 0
    assert {row["seed"] for row in rows} == {0, 1}
    assert picture.stat().st_size > 5000
    plots.depths({**found, "rows": [*rows, {**rows[0], "cell": "lstm"}]}, tmp_path / "two.svg")
    tables.print_depths(found)
    shown = capsys.readouterr().out
    assert "residual" in shown
    assert "held-out bits/character" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "1,x"], "--layers takes whole numbers"),
        (["--layers", "0"], "--layers must be numbers"),
        (["--kinds", "wide"], "no kind of stack called 'wide'"),
        (["--seconds", "0"], "--seconds must be a positive"),
        (["--hidden", "0"], "--hidden must be at least 1"),
        (["--epochs", "3"], "--epochs is not for --recipe depth"),
        (["--implementations", "torch"], "--implementations is not for --recipe depth"),
        (["--cells", "lsmt"], "no cell called 'lsmt'"),
    ],
)
def test_flags_of_the_comparison(flags: list[str], words: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(text), "--recipe", "depth", *flags]) == 2
    assert words in capsys.readouterr().err
    assert main(["compare", str(text), "--layers", "2"]) == 2
    assert "--layers is not for --recipe lecture" in capsys.readouterr().err


def test_what_cannot_be_compared(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(TrainConfig(texts=(str(text),), heldout=0.0))
    with pytest.raises(UsageError, match="too short to hold"):
        next(depth.run(prepared))
    monkeypatch.setattr(training.TextStepper, "step", lambda *_: (float("nan"), 1.0, 0.0))
    with pytest.raises(TrainingError, match="plain, 1 layers: the loss is nan at step 0"):
        next(depth.run(Prepared(TrainConfig(texts=(str(text),))), hidden=8, layers=[1], kinds=["plain"]))


def test_a_deep_residual_net_passes_gradients_on() -> None:
    """Of 24 plain layers of small weights the first learns nothing; where each adds to the one below, it does."""
    size = {}
    for residual in (False, True):
        torch.manual_seed(0)
        model = longshort.LanguageModel(ModelConfig(layers=24, hidden=16, vocab_size=5, residual=residual))
        model.initialise_normal(0.05)
        ids = torch.randint(5, (7, 4))
        loss, _ = model.loss(ids[:-1], ids[1:], None, 24)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient: Any = model.recurrent.weight_ih_l0.grad
        size[residual] = float(gradient.norm())
    assert size[True] > 1e6 * size[False]


def test_the_page_has_the_figures_of_the_file() -> None:
    page = (ROOT / "docs" / "deep.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "2026-11-25-depth.json").read_text(encoding="utf-8"))
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["layers"], row["hidden"], row["kind"].replace("_", " ")), []).append(row)
    for (layers, hidden, kind), rows in groups.items():
        steps, speed, bits = (
            statistics.median(row[name] for row in rows)
            for name in ("steps", "tokens_per_second", "bits_per_character")
        )
        figures = f"{rows[0]['parameters']:,} | {steps:,.0f} | {speed:,.0f} | {bits:.3f}"
        assert f"| {layers} x {hidden} | {kind} | {figures} |" in page
