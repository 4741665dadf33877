"""The adaptive softmax: its probabilities and gradients by hand in float64, and in every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longshort
from longshort.cli import main
from longshort.config import ModelConfig, TrainConfig, adaptive_cutoffs
from longshort.decoder import weight_shapes
from longshort.errors import ConfigError, UsageError
from longshort.head import AdaptiveSoftmax
from longshort.text.batches import IGNORED

V, H = 1200, 20


def log_p_by_hand(output: AdaptiveSoftmax, h_NH: Tensor) -> Tensor:
    """Return log p of every symbol in float64: of the frequent ones from one softmax, of a group times its own."""
    weights = {name: parameter.double() for name, parameter in output.named_parameters()}
    cutoffs = [*adaptive_cutoffs(V), V]
    head = torch.log_softmax(h_NH.double() @ weights["head.weight"].T + weights["head.bias"], -1)
    parts = [head[:, : cutoffs[0]]]
    for group in range(len(cutoffs) - 1):
        hidden = h_NH.double() @ weights[f"tail.{group}.0.weight"].T
        inside = torch.log_softmax(hidden @ weights[f"tail.{group}.1.weight"].T, -1)
        parts.append(head[:, cutoffs[0] + group, None] + inside)
    return torch.cat(parts, -1)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), N=st.integers(1, 9), ignored=st.integers(0, 9))
def test_probabilities_and_gradients(seed: int, N: int, ignored: int) -> None:
    torch.manual_seed(seed)
    output = AdaptiveSoftmax(H, V)
    h_NH = torch.randn(N, H, requires_grad=True)
    targets_N = torch.randint(V, (N,))
    targets_N[:2] = torch.tensor([V - 1, 0])[:N]
    log_p = log_p_by_hand(output, h_NH)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(output.logits(h_NH.unsqueeze(1)).squeeze(1).double(), log_p, rtol=1e-5, atol=1e-5)
    nats_N = -log_p.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(output.nats(h_NH, targets_N).double(), nats_N, rtol=1e-5, atol=1e-5)
    known = torch.arange(N) >= ignored
    found = output.loss(h_NH, torch.where(known, targets_N, IGNORED), 7)
    wanted = nats_N[known].sum() / 7
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    inputs = [h_NH, *output.parameters()]
    pairs = [torch.autograd.grad(loss, inputs, materialize_grads=True, retain_graph=True) for loss in (found, wanted)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_has_the_weights_that_the_decoder_knows_of() -> None:
    config = ModelConfig(hidden=70, vocab_size=5000, adaptive_softmax=True)
    model = longshort.LanguageModel(config)
    assert {name: array.shape for name, array in model.weights().items()} == weight_shapes(config, 4)
    model.load_weights(model.weights())
    whole = longshort.LanguageModel(ModelConfig(hidden=70, vocab_size=5000))
    assert model.num_parameters < 0.85 * whole.num_parameters


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 1,200 words, the k-th in proportion to 1 / k, each of them at its beginning once."""
    path = tmp_path_factory.mktemp("words") / "text.txt"
    p = 1 / np.arange(1, V + 1)
    drawn = np.random.default_rng(0).choice(V, 6000, p=p / p.sum())
    words = [f"w{number}" for number in (*range(V), *drawn)]
    lines = [" ".join(words[first : first + 12]) for first in range(0, len(words), 12)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 0
    return capsys.readouterr().out


def test_every_verb_has_it(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, sizes = str(tmp_path / "run"), ["--hidden", "24", "--embedding", "12", "--batch-size", "8", "--lr", "0.02"]
    said(capsys, "train", str(text), "--tokenizer", "word", "--adaptive-softmax", "--steps", "60", "--out", run, *sizes)
    said(capsys, "resume", run, "--steps", "80")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nats = [line["nats_per_token"] for line in lines if "nats_per_token" in line]
    assert nats[-1] < nats[0] - 0.5
    figure = json.loads(said(capsys, "eval", run, "--split", "valid", "--json"))
    assert (
        figure["nats_per_token"]
        == json.loads((tmp_path / "run" / "result.json").read_text())["heldout"]["nats_per_token"]
    )
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w1\nw3 w1199 w7 w1\n" * 4, encoding="utf-8")
    said(capsys, "eval", run, str(short), "--dynamic")
    assert said(capsys, "generate", run, "--prompt", "w1 w2", "--length", "5").startswith("w1 w2 ")
    assert len(said(capsys, "score", run, str(short)).splitlines()) == 8
    inside = json.loads(said(capsys, "inspect", run, str(short), "--json"))
    assert [gate["name"] for gate in inside["gates"]] == [*"ifgohc"]
    assert inside["symbols"][:3] == ["w1", " w2", " w1"]
    said(capsys, "train", str(text), "--from", run, "--steps", "1", "--out", str(tmp_path / "next"))
    with pytest.raises(UsageError, match="An adaptive softmax runs with PyTorch only"):
        longshort.load(run)
    model = longshort.load(run, train=True)
    ids = model.tokenizer.encode("w0 w7 w1199")[:, None].astype(np.int64)
    log_p = F.log_softmax(torch.from_numpy(model.logits(ids[:2, 0], None)[0]).double(), -1)
    assert model.nats(ids[:2], ids[1:], None)[0][1, 0] == pytest.approx(-float(log_p[ids[2, 0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vocab_size": 999}, "for 1,000 symbols or more; this text has 999"),
        ({"vocab_size": 2000, "tied": True, "embedding": 256}, "cannot be tied"),
        ({"vocab_size": 2000, "hidden": 15}, "16 hidden units or more"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(adaptive_softmax=True, **given)
    with pytest.raises(ConfigError, match="order of their frequency"):
        TrainConfig(adaptive_softmax=True, tokenizer="bpe")
