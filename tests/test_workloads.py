"""`bench train`, `generate` and `score` compare like with like, and say what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longshort import native, training
from longshort.bench import profiling, workloads
from longshort.bench.workloads import KINDS, SYMBOLS, Contest, Setting, Training
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.scoring import score
from longshort.text.tokenizers import CharTokenizer

SMALL: dict[str, Any] = {"hidden": 12, "embedding": 8, "batch_size": 4, "seq_len": 6, "warmup": 0.0, "final_lr": 1.0}


@pytest.mark.parametrize("options", [{}, {"embedding": 0, "optimizer": "sgd", "lr": 1.0}])
def test_both_sides_of_a_training_step_learn_the_same(options: dict[str, Any]) -> None:
    contest = workloads._train(Training("small", TrainConfig(**(SMALL | options)), "abcdefghij\n"), Setting(1))
    for _ in range(8):
        assert contest.ours() == pytest.approx(contest.theirs(), rel=1e-4)


def test_both_sides_score_lines_alike() -> None:
    tokenizer = CharTokenizer(workloads.SYMBOLS)
    assert tokenizer.size == 65
    model, plain = workloads._models(TrainConfig(**SMALL, lines=True), tokenizer)
    lines = workloads._lines(150)
    ours = [found.bits_per_character for found in score(Decoder(model.config, model.weights(), tokenizer), lines)]
    np.testing.assert_allclose(list(workloads._with_padding(plain, tokenizer, lines)), ours, rtol=1e-4)


def test_the_peers_model_is_ours() -> None:
    tokenizer = CharTokenizer("abc\n")
    model = training.make_model(TrainConfig(**SMALL), tokenizer).eval()
    plain = workloads.PlainModel(model)
    ids = torch.randint(4, (7, 3))
    torch.testing.assert_close(plain(ids, None)[0], model(ids)[0], rtol=0, atol=1e-5)
    rounded = Setting(1, "int8", "int8").turned(plain)
    error = (rounded(ids, None)[0] - model(ids)[0]).abs().max()
    assert 0 < error < 0.05
    for model_of_peer in (plain, rounded):
        workloads._with_layer(model_of_peer, 3, 4)
    plain.recurrent = workloads._cell_of(plain.recurrent)
    logits, h = [], [torch.zeros(3, 12)] * 2
    for t in range(7):
        h = plain.recurrent(plain.inputs(ids[t]), h)
        logits.append(plain.output(h[0]))
    torch.testing.assert_close(torch.stack(logits), model(ids)[0], rtol=0, atol=1e-5)
    for model_of_peer in (
        plain,
        Setting(1, "int8", "int8").turned(plain),
        Setting(1, "bfloat16", "bfloat16").turned(plain),
    ):
        workloads._with_cell(model_of_peer, 3, 4)


def small(setting: Setting) -> Contest:
    return Contest(
        name="adding",
        peer=setting.peer("another"),
        unit="sums",
        ours=lambda: sum(range(100)),
        theirs=lambda: sum(range(1000)),
        ours_units=2,
        peer_units=2,
        operations=100,
    )


def test_the_command_measures_prints_and_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KINDS, "generate", (small,))
    monkeypatch.setattr("longshort.bench.peers.GEMM_SIZE", 64)
    monkeypatch.setattr(workloads, "BLOCK_SECONDS", 0.0)
    out = tmp_path / "result.json"
    assert main(["bench", "generate", "--threads", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "adding" in printed.out
    assert "1/1 adding beside another" in printed.err
    kept = json.loads(out.read_text())
    assert kept["command"] == "longshort bench generate --threads 1"
    (row,) = kept["rows"]
    assert row["ratio"] == pytest.approx(row["ours_per_second"] / row["peer_per_second"])
    assert row["ratio"] > 1
    assert len(row["ours_blocks"]) == 9
    assert main(["bench", "generate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threads"] == 2
    monkeypatch.setattr(native, "need_bfloat16", lambda: None)
    assert main(["bench", "generate", "--precision", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"].endswith("--threads 2 --precision bfloat16")
    assert [row["peer"] for row in found["rows"]] == ["another", "another, bfloat16"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid", "marks"], "--grid goes with bench layers, not with bench score"),
        (["--cells", "gru"], "--cells and --modes go with bench layers"),
        (["--neighbour"], "--neighbour goes with bench layers"),
        (["--threads", "0"], "--threads must be from 1 to 1024, not 0"),
        (["--threads", "1,2"], "whole numbers|from 1"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "score", *flags]) == 2
    said = capsys.readouterr().err
    assert any(word in said for word in words.split("|")), said


@pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
@pytest.mark.parametrize("given", [{}, {"embedding": 0, "optimizer": "sgd", "lr": 1.0, "clip": 1e-6}])
def test_a_profile_names_every_part_of_a_step(given: dict[str, Any]) -> None:
    kind = Training("a name", TrainConfig(**({"hidden": 64, "batch_size": 8, "seq_len": 16} | given)), SYMBOLS[:20])
    found = profiling.profile_step(*kind.prepare())
    assert set(found) == {*profiling.PARTS.values(), profiling.TABLE, profiling.WEIGHTS, profiling.PYTHON}
    assert all(seconds > 0 for part, seconds in found.items() if part not in (profiling.PYTHON, profiling.WEIGHTS))
    assert all(seconds >= 0 for seconds in found.values())


@pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
def test_the_command_shows_where_the_time_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = Training("small", TrainConfig(hidden=8, batch_size=2, seq_len=4), SYMBOLS[:20])
    monkeypatch.setattr(workloads, "_trainings", lambda threads, precision: (kind,))
    assert main(["bench", "train", "--profile"]) == 0
    printed = capsys.readouterr()
    assert "recurrence, backward" in printed.out
    assert "1/1 small" in printed.err
    assert main(["bench", "train", "--profile", "--json", "--threads", "1"]) == 0
    assert set(json.loads(capsys.readouterr().out)["seconds"]) == {"small"}
    for flags in (["bench", "score", "--profile"], ["bench", "train", "--profile", "--grid", "marks"]):
        assert main(flags) == 2
        assert "--profile" in capsys.readouterr().err


@pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
def test_what_is_measured_is_what_is_promised() -> None:
    """The contests themselves can be made, and one of each kind runs."""
    for builders in KINDS.values():
        contest = builders[0](Setting(1))
        assert contest.operations > 0
    written = KINDS["generate"][0](Setting(1))
    written.ours()
    assert written.ours_units == 2_000


@pytest.mark.skipif(not native.bfloat16(), reason="this processor has no products of bfloat16")
@pytest.mark.parametrize("build", [KINDS["train"][1], *KINDS["generate"], *KINDS["score"]])
def test_both_sides_run_in_bfloat16(build: Callable[[Setting], Contest]) -> None:
    contest = build(Setting(1, "bfloat16", "bfloat16"))
    assert contest.peer.endswith(", bfloat16")
    contest.ours()
    contest.theirs()
