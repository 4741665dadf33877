from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longshort import checkpoint, loop, recipes, training, updates
from longshort.config import TrainConfig
from longshort.errors import ConfigError, TextError, TrainingError, UsageError
from longshort.evaluation import evaluate
from longshort.model import load_language_model
from longshort.text import grammar
from longshort.text.tokenizers import ByteTokenizer

SMALL: dict[str, Any] = {"hidden": 16, "embedding": 16, "seq_len": 16, "batch_size": 8, "steps": 12, "threads": 1}


def run(text_file: Path, out: Path, **changes: Any) -> list[training.Event]:
    config = TrainConfig(**(SMALL | {"texts": (str(text_file),), "out": str(out)} | changes))
    return list(training.train(config))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_yields_events_and_keeps_everything(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    events = run(text_file, out)
    assert isinstance(events[0], training.Started)
    assert isinstance(events[-1], training.Finished)
    looks = [event for event in events if isinstance(event, training.Looked)]
    assert [look.step for look in looks] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events if isinstance(event, training.Progress)] == list(range(1, 13))
    assert min(looks, key=lambda look: look.heldout.nats_per_token).step == events[-1].best_step
    steps = [line["step"] for line in metrics(out) if "nats_per_token" in line]
    assert steps == list(range(1, 13))
    assert not any("second" in key for line in metrics(out) for key in line)
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in timing)
    saved = checkpoint.open_run(out).config()
    assert TrainConfig.from_dict(saved["train"]) == events[0].config
    assert saved["train"]["steps"] == 12
    assert len(list((out / "checkpoints").iterdir())) <= 3


def test_a_run_repeats_exactly(text_file: Path, tmp_path: Path) -> None:
    for cell in ("lstm", "gru", "rnn"):
        for name in ("a", "b"):
            run(text_file, tmp_path / f"{cell}-{name}", cell=cell, dropout=0.2, layers=2)
        first, second = metrics(tmp_path / f"{cell}-a"), metrics(tmp_path / f"{cell}-b")
        assert first == second
    assert metrics(tmp_path / "lstm-a") != metrics(tmp_path / "gru-a")
    run(text_file, tmp_path / "other", seed=1, dropout=0.2, layers=2)
    assert metrics(tmp_path / "other") != metrics(tmp_path / "lstm-a")


def test_the_last_figure_is_the_best_checkpoints_in_one_lane(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = run(text_file, out)[-1]
    assert isinstance(finished, training.Finished)
    model = load_language_model(out)
    assert model.tokenizer is not None
    again = evaluate(model.reader(), model.tokenizer, training.heldout_part(out, model.tokenizer))
    assert again == finished.heldout
    by_torch = evaluate(model, model.tokenizer, training.heldout_part(out, model.tokenizer))
    assert by_torch.nats_per_token == pytest.approx(again.nats_per_token, abs=1e-6)
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["heldout"] == again.to_dict()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert updates.device("cuda").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"3 processes here, but PyTorch sees 2 GPUs: each takes one\.\nStart 2 with"):
        updates.device("cuda")
    assert updates.device("cpu").type == "cpu"


def test_what_is_learned_comes_close_to_the_entropy_of_the_text(tmp_path: Path) -> None:
    """The text comes from a grammar whose entropy is known; no model can do better, and a good one comes near."""
    text = tmp_path / "grammar.txt"
    text.write_text(grammar.generate(60_000, seed=5), encoding="utf-8")
    settings: dict[str, Any] = {
        "hidden": 96,
        "embedding": 32,
        "seq_len": 48,
        "batch_size": 16,
        "steps": 260,
        "lr": 0.01,
    }
    finished = run(text, tmp_path / "run", **settings)[-1]
    assert isinstance(finished, training.Finished)
    assert finished.heldout is not None
    entropy = grammar.entropy_bits_per_character()
    assert 0.97 * entropy < finished.heldout.bits_per_character < 1.35 * entropy


def test_training_stops_early_when_held_out_text_stops_gaining(tmp_path: Path) -> None:
    noise = "".join(np.random.default_rng(0).choice(list("abcdefgh"), size=2000))
    text = tmp_path / "noise.txt"
    text.write_text(noise, encoding="utf-8")
    events = run(text, tmp_path / "run", hidden=64, steps=400, validate_every=10, patience=3, lr=0.02)
    finished = events[-1]
    assert isinstance(finished, training.Finished)
    assert finished.stopped_early
    assert finished.step == finished.best_step + 30 < 400
    assert load_language_model(tmp_path / "run").config.hidden == 64


def test_nothing_held_out_is_possible(text_file: Path, tmp_path: Path) -> None:
    finished = run(text_file, tmp_path / "run", heldout=0.0)[-1]
    assert isinstance(finished, training.Finished)
    assert finished.heldout is None
    assert finished.best_step == 12
    for changes in ({"patience": 2}, {"eval_lanes": 2}):
        with pytest.raises(UsageError, match="needs held-out text"):
            run(text_file, tmp_path / "other", heldout=0.0, **changes)
    with pytest.raises(UsageError, match="held nothing out"):
        training.heldout_part(tmp_path / "run", ByteTokenizer())


def test_a_changed_text_is_noticed(text_file: Path, tmp_path: Path) -> None:
    run(text_file, tmp_path / "run")
    text_file.write_text("something else, long enough to be split", encoding="utf-8")
    with pytest.raises(UsageError, match="has changed"):
        training.heldout_part(tmp_path / "run", ByteTokenizer())


def test_held_out_characters_do_not_enter_the_vocabulary(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcd" * 450 + "abc" + "xyz" * 66, encoding="utf-8")
    events = run(text, tmp_path / "run")
    assert isinstance(events[0], training.Started)
    assert events[0].tokenizer.size == 4
    assert isinstance(events[-1], training.Finished)
    assert events[-1].heldout is not None
    assert events[-1].heldout.skipped == 198


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged at step") as caught:
        run(text_file, tmp_path / "run", lr=1e300, optimizer="sgd", cell="rnn_relu", clip=None, steps=50)
    assert "lower --lr" in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing was saved, so nothing stays
    with pytest.raises(TrainingError, match="diverged at step 1: the held-out part has"):
        run(text_file, tmp_path / "run", lr=1e300, steps=1)  # the last update is the one that breaks it
    assert not (tmp_path / "run").exists()


def test_what_was_saved_before_a_run_diverges_stays(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "learning_rate", lambda config, step, steps: 1e-3 if step < 6 else 1e300)
    with pytest.raises(TrainingError, match="diverged"):
        run(text_file, tmp_path / "run", steps=20)
    assert all(np.isfinite(weight).all() for weight in checkpoint.load_model(tmp_path / "run").weights.values())
    content = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in content
    assert "Infinity" not in content


def test_clipping_holds_each_step_of_gradient_descent_to_lr_times_clip(text_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(**(SMALL | recipes.RECIPES["lecture"] | {"texts": (str(text_file),), "epochs": None}))
    prepared = training.Prepared(config)
    model = training.make_model(config, prepared.tokenizer)
    stepper = training.TextStepper(model, config, 100)
    sampler = prepared.sampler(config)
    for number in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        _, norm, rate = stepper.step(number, sampler.batch(number))
        moved = math.sqrt(
            sum(
                float(((a - b) ** 2).sum())
                for a, b in zip(before, [p.detach() for p in model.parameters()], strict=True)
            )
        )
        assert rate == 100.0
        assert moved == pytest.approx(100.0 * min(norm, 0.01), rel=1e-3)


def test_the_rate_rises_and_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=0.1, final_lr=0.1)
    rates = [updates.learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert rates[10] == max(rates) == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)
    flat = TrainConfig(lr=3.0, warmup=0.0, final_lr=1.0)
    assert {updates.learning_rate(flat, step, 7) for step in range(7)} == {3.0}
    assert updates.learning_rate(TrainConfig(lr=2.0), 0, 1) == 2.0


# -------------------------------------------------------------------------------------------- recipes and the dial


def test_flags_win_over_toml_over_recipe() -> None:
    settings = recipes.combine({"hidden": 3}, {"hidden": 2, "lr": 2.0}, "lecture")
    assert (settings["hidden"], settings["lr"], settings["clip"], settings["epochs"]) == (3, 2.0, 0.01, 160)
    assert "epochs" not in recipes.combine({"steps": 5}, {}, "lecture")
    assert recipes.combine({}, {"epochs": 2}, "lecture")["epochs"] == 2
    assert recipes.combine({"texts": ("a",)}, {"corpus": "builtin", "lr": 1.0}) == {"texts": ("a",), "lr": 1.0}
    assert recipes.combine({"corpus": "builtin"}, {"texts": ["a"]}) == {"corpus": "builtin"}
    with pytest.raises(UsageError, match="Did you mean 'lecture'"):
        recipes.combine({}, {}, "lectur")


def test_one_width_is_enough_for_tied_weights() -> None:
    for given, size in (({}, 256), ({"hidden": 64}, 64), ({"embedding": 32}, 32)):
        settings = recipes.combine({"tied": True, **given})
        config = TrainConfig.from_dict(settings)
        assert (config.hidden, config.embedding) == (size, size)
    with pytest.raises(ConfigError, match="tied needs embedding = hidden"):
        TrainConfig.from_dict(recipes.combine({"tied": True, "hidden": 64, "embedding": 32}))


@pytest.mark.parametrize("texts", ["a.txt", [3], 3, [["a.txt"]]])
def test_texts_are_a_list(texts: Any) -> None:
    with pytest.raises(ConfigError, match="texts must be a list of texts"):
        TrainConfig.from_dict({"texts": texts})
    assert TrainConfig.from_dict({"texts": ["a.txt"]}).texts == ("a.txt",)


def test_the_lecture_recipe_is_the_lectures() -> None:
    config = TrainConfig(**recipes.RECIPES["lecture"])
    assert (config.hidden, config.seq_len, config.batch_size, config.epochs) == (256, 35, 32, 160)
    assert (config.lr, config.clip, config.optimizer, config.embedding) == (100.0, 0.01, "sgd", 0)
    assert (config.warmup, config.final_lr, config.weight_decay, config.dropout) == (0, 1, 0, 0)


def test_the_dial_fills_what_is_unset_and_nothing_else(text_file: Path) -> None:
    settings: dict[str, Any] = {"texts": (str(text_file),), "cell": "gru", "seq_len": 8, "threads": 1}
    prepared = training.Prepared(TrainConfig(**settings))
    found = recipes.plan(0.1, settings, prepared, since=time.perf_counter())
    assert found.config.steps is not None
    assert found.config.steps >= 1
    assert (found.config.cell, found.config.seq_len, found.config.threads) == ("gru", 8, 1)
    assert found.config.hidden in recipes.SIZES
    fixed = recipes.plan(0.05, settings | {"hidden": 10, "embedding": 5}, prepared, since=time.perf_counter())
    assert (fixed.config.hidden, fixed.config.embedding) == (10, 5)
    assert list(fixed.seconds_per_step) == [10]


def test_the_dial_refuses_what_makes_no_sense(text_file: Path) -> None:
    settings: dict[str, Any] = {"texts": (str(text_file),)}
    prepared = training.Prepared(TrainConfig(**settings))
    for minutes in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="minutes must be a positive number"):
            recipes.plan(minutes, settings, prepared, since=0)
    with pytest.raises(UsageError, match="not both"):
        recipes.plan(1, settings | {"steps": 3}, prepared, since=0)


def test_the_length_of_a_run_is_settled_once() -> None:
    assert training.settle(TrainConfig(epochs=2.5), 10, 9).steps == 25
    assert training.settle(TrainConfig(), 10, 9).steps == 100
    settled = training.settle(TrainConfig(steps=7), 10, 9)
    assert (settled.steps, settled.epochs, settled.validate_every, settled.eval_lanes) == (7, None, 1, 1)
    assert training.settle(TrainConfig(), 1, heldout_tokens=8191).eval_lanes == 1
    assert training.settle(TrainConfig(), 1, heldout_tokens=8192).eval_lanes == 2
    assert training.settle(TrainConfig(), 1, heldout_tokens=10**9).eval_lanes == 64
    assert settled.threads == torch.get_num_threads()
    with pytest.raises(UsageError, match="not both"):
        training.settle(TrainConfig(steps=1, epochs=1.0), 10, 9)


def test_texts_that_cannot_be_used_leave_nothing_behind(tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("x", encoding="utf-8")
    with pytest.raises(TextError, match="1 character"):
        run(text, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    text.write_text("x" * 100 + "y" * 11, encoding="utf-8")
    with pytest.raises(TextError, match="shares no symbol"):
        run(text, tmp_path / "run")
    text.write_text("x" * 100, encoding="utf-8")
    with pytest.raises(UsageError, match="consecutive sampler"):
        run(text, tmp_path / "run", sampler="random", drop_incomplete=True)
    assert not (tmp_path / "run").exists()


def test_run_directories_get_free_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loop.free_directory("my text") == Path("my-text")
    Path("my-text").mkdir()
    assert loop.free_directory("my text") == Path("my-text-2")
    assert loop.free_directory("../x") == Path("x")
    assert loop.free_directory("..") == Path("run")
    assert len(str(loop.free_directory("chapter " * 50))) <= 60


def test_the_dial_drops_more_the_oftener_a_text_is_read() -> None:
    assert [recipes.dropout_for(epochs) for epochs in (0.1, 6, 6.1, 10, 10.5, 1000)] == [0, 0, 0.2, 0.2, 0.3, 0.3]
