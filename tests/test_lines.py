"""Models that are trained on lines: exact masks, zero states, one protocol for looks, figures and `eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longshort import recipes, training
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.errors import ConfigError, TextError
from longshort.evaluation import evaluate
from longshort.generation import Sampling, generate
from longshort.model import LanguageModel, load_language_model
from longshort.text.batches import Lines
from longshort.text.encoding import encode_text
from longshort.text.tokenizers import CharTokenizer, Tokenizer

SMALL: dict[str, Any] = {"lines": True, "hidden": 16, "embedding": 8, "batch_size": 8, "steps": 12, "threads": 1}
PROTOCOL = "each line from a zero state, after a newline"


def log(lines: int, seed: int = 0) -> str:
    """Lines of very different lengths, some empty."""
    rng = np.random.default_rng(seed)
    words = ["open", "close", "read", "write", "error", "12", "7", "ok"]
    return "".join(" ".join(rng.choice(words, size=rng.integers(0, 12))) + "\n" for _ in range(lines))


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    path.write_text(log(300), encoding="utf-8")
    return path


def run(path: Path, out: Path, **changes: Any) -> list[training.Event]:
    config = TrainConfig(**(SMALL | {"texts": (str(path),), "out": str(out)} | changes))
    return list(training.train(config))


def one_by_one(model: LanguageModel, tokenizer: Tokenizer, lines: list[str], window: int) -> tuple[torch.Tensor, int]:
    """Return the nats of all lines, each read alone, the gradient cut every `window` symbols; and their number."""
    total, symbols = torch.zeros((), dtype=torch.float64), 0
    for line in lines:
        ids = torch.from_numpy(tokenizer.encode_lines(f"\n{line}\n").astype(np.int64)).unsqueeze(1)
        state = None
        for first in range(0, len(ids) - 1, window):
            targets = ids[first + 1 : first + window + 1]
            logits, state = model(ids[first : first + window][: len(targets)], state)
            state = tuple(tensor.detach() for tensor in state)
            total = total + F.cross_entropy(logits[:, 0], targets[:, 0], reduction="sum")
        symbols += len(ids) - 1
    return total, symbols


@pytest.mark.parametrize("window", [1000, 7])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_batch_of_lines_is_its_lines_one_by_one(cell: str, window: int) -> None:
    """Loss and gradients in float64; with a short window, both cut the gradient at the same places."""
    text = log(8)
    tokenizer = CharTokenizer.train(text)
    config = TrainConfig(cell=cell, layers=2, **SMALL | {"seq_len": window, "batch_size": 10})
    model = training.make_model(config, tokenizer).double()
    stepper = training.TextStepper(model, config, 1)
    part = encode_text(tokenizer, text, lines=True)
    assert part.breaks is not None
    batch = Lines(part.ids, 10, window, breaks=part.breaks, unknown=tokenizer.size).batch(0)
    assert batch.tokens == len(text)
    stepper.state = model.zero_state(10)
    loss = stepper.read(batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, symbols = one_by_one(model, tokenizer, text.removesuffix("\n").split("\n"), window)
    assert symbols == batch.tokens
    (total / symbols).backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(total.item() / symbols, rel=1e-12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "lstm", "layers": 2, "dropout": 0.3},
        {"cell": "gru", "tokenizer": "byte"},
        {"cell": "rnn", "tokenizer": "word"},
        {"cell": "rnn_relu", "embedding": 0},
        {"cell": "lstm", "tokenizer": "bpe", "vocab_size": 300, "seq_len": 5},
    ],
)
def test_a_run_on_lines_is_measured_as_it_was_trained(options: dict[str, Any], log_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    events = run(log_file, out, **options)
    finished = events[-1]
    assert isinstance(finished, training.Finished)
    assert finished.heldout is not None
    assert finished.heldout.protocol == PROTOCOL
    model = load_language_model(out)
    assert model.config.lines
    assert model.tokenizer is not None
    lines = log(300).removesuffix("\n").split("\n")[270:]  # the last tenth of the lines
    heldout = "".join(f"{line}\n" for line in lines)
    # The same figure for the text at hand, for the run's own part and from lines read one by one.
    assert evaluate(model.reader(), model.tokenizer, heldout) == finished.heldout
    assert evaluate(model.reader(), model.tokenizer, training.heldout_part(out, model.tokenizer)) == finished.heldout
    total, symbols = one_by_one(model.double(), model.tokenizer, lines, 1000)
    assert finished.heldout.tokens == symbols
    assert finished.heldout.nats_per_token == pytest.approx(total.item() / symbols, rel=1e-5)
    assert finished.heldout.characters == len(heldout)
    bits = total.item() / math.log(2)
    assert finished.heldout.bits_per_character == pytest.approx(bits / len(heldout), rel=1e-5)


def test_a_run_on_lines_repeats_exactly_and_learns(log_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(log_file, tmp_path / name, layers=2, dropout=0.2, steps=60, lr=0.02)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("a", "b"))
    assert first == second
    looks = [line for line in map(json.loads, first.splitlines()) if "heldout_nats_per_token" in line]
    assert looks[-1]["heldout_nats_per_token"] < 0.9 * looks[0]["heldout_nats_per_token"]
    assert {look["protocol"] for look in looks} == {PROTOCOL}


def test_what_lines_exclude_is_named(tmp_path: Path, log_file: Path) -> None:
    excluded: list[dict[str, Any]] = [{"sampler": "random"}, {"drop_incomplete": True}, {"eval_lanes": 2}]
    for options in excluded:
        with pytest.raises(ConfigError, match="With lines, each is read alone"):
            TrainConfig(lines=True, **options)
    excluded = [{"min_freq": 2}, {"vocab_size": 300}, {"tokenizer": "word", "vocab_size": 300}]
    for options in excluded:
        with pytest.raises(ConfigError, match="is for the tokenizer"):
            TrainConfig(**options)
    one = tmp_path / "one.txt"
    one.write_text("a single line without an end", encoding="utf-8")
    with pytest.raises(TextError, match="1 line:"):
        run(one, tmp_path / "run")
    run(log_file, tmp_path / "run")
    model = load_language_model(tmp_path / "run")
    assert model.tokenizer is not None
    part = training.heldout_part(tmp_path / "run", model.tokenizer)
    excluded = [{"lanes": 2}, {"block": 5}]
    for options in excluded:
        with pytest.raises(ConfigError, match="lanes and block do not go with them"):
            evaluate(model, model.tokenizer, part, **options)
        assert "lane" in evaluate(model, model.tokenizer, log(20), lanes=2).protocol
    assert evaluate(model, model.tokenizer, log(20), lines=False).protocol == "state carried through the text, one lane"


def test_the_command_line_trains_evaluates_and_writes_lines(
    log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--lines", "--hidden", "16", "--embedding", "8", "--steps", "20", "--threads", "1", "--out", "run"]
    assert main(["train", str(log_file), *flags]) == 0
    assert PROTOCOL in capsys.readouterr().err
    for arguments in (["--split", "valid"], [str(log_file)]):
        assert main(["eval", "run", *arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["protocol"] == PROTOCOL
    assert main(["eval", "run", str(log_file), "--block", "5", "--json"]) == 0
    assert "block of 5" in json.loads(capsys.readouterr().out)["protocol"]
    assert main(["eval", "run", "--split", "valid", "--block", "5"]) == 2
    assert "trained on lines" in capsys.readouterr().err
    assert main(["generate", "run", "--length", "50", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) >= 50
    assert main(["train", str(log_file), "--lines", "--sampler", "random"]) == 2
    assert "With lines" in capsys.readouterr().err


def test_the_dial_knows_lines(log_file: Path) -> None:
    settings: dict[str, Any] = {"texts": (str(log_file),), "lines": True, "hidden": 8, "threads": 1}
    prepared = training.Prepared(TrainConfig(**settings))
    plan = recipes.plan(0.01, settings, prepared, since=0.0)
    assert plan.config.lines
    assert plan.config.steps is not None
    assert plan.config.eval_lanes is None


def test_every_line_is_written_from_a_zero_state() -> None:
    """After a newline the model goes on as if nothing had been written before."""
    tokenizer = CharTokenizer("ab\n")
    torch.manual_seed(1)
    model = training.make_model(TrainConfig(**SMALL), tokenizer).eval()
    with torch.no_grad():
        model.recurrent.all_weights[0][1].mul_(4)  # a state that matters
    text = "".join(generate(model, tokenizer, "", 200, Sampling(seed=3)))
    nats: list[float] = []
    state: Any = None
    for before, after in zip("\n" + text, text, strict=False):
        state = None if before == "\n" else state
        logits, state = model.logits(tokenizer.encode(before).astype(np.int64), state)
        p = np.exp(logits - logits.max())
        nats.append(-math.log(p[tokenizer.encode(after)[0]] / p.sum()))
    assert text.count("\n") > 20
    assert evaluate(model, tokenizer, text[: text.rindex("\n") + 1]).nats_per_token == pytest.approx(
        np.mean(nats[: text.rindex("\n") + 1]), rel=1e-5
    )
    # What is sampled depends on the line alone: greedy lines are all the same.
    greedy = "".join(generate(model, tokenizer, "", 30, Sampling(temperature=0)))
    assert len(set(greedy.split("\n")[:-1])) <= 1
    # Of a prompt only its last line counts.
    one, other = (list(generate(model, tokenizer, prompt, 20)) for prompt in ("ab\nba\nab", "ab"))
    assert one == other
