"""A run that was stopped and resumed is the run that never was; what is damaged or has changed is told."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longshort import (
    checkpoint,
    documents,
    durable,
    head,
    kernels,
    loop,
    model_files,
    native,
    precision,
    snapshot,
    training,
    updates,
)
from longshort.checkpoint import load_model
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.errors import CheckpointError, LongshortError, OutputError, TextError, TrainingError, UsageError
from longshort.model import load_language_model
from longshort.model_files import load_training
from longshort.text import builtin, corpus, grammar
from longshort.text.tokenizers import train_tokenizer

SMALL: dict[str, Any] = {"hidden": 12, "embedding": 8, "seq_len": 12, "batch_size": 8, "steps": 40, "threads": 1}
DEEP: dict[str, Any] = SMALL | {"layers": 2, "dropout": 0.3}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "english.txt"
    path.write_text(grammar.generate(3_000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def after(steps: int) -> Callable[[], bool]:
    """Return what asks to stop when it has been asked `steps` times before: after each step, and in looks."""
    asked = itertools.count()
    return lambda: next(asked) >= steps


def train(text_file: Path, out: Path, stop: Callable[[], bool] = lambda: False, **given: Any) -> training.Event:
    """Train and return the last event."""
    config = TrainConfig(**(DEEP | {"texts": (str(text_file),), "out": str(out)} | given))
    return list(training.train(config, stop=stop))[-1]


def resume(out: Path, *given: Any, **named: Any) -> training.Event:
    """Resume and return the last event."""
    return list(training.resume(out, *given, **named))[-1]


def state_of(out: Path) -> dict[str, Any]:
    """Return everything that must repeat: weights, optimizer, random numbers, position, metrics, the last figure."""
    saved, kept = load_training(out / "checkpoints" / json.loads((out / "latest.json").read_text())["checkpoint"])
    arrays = {**saved.weights, **kept.arrays}
    return {
        "arrays": {name: array.tobytes() for name, array in arrays.items()},
        "position": kept.values["position"],
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "result": (out / "result.json").read_bytes(),
        "best": (out / "best.json").read_bytes(),
    }


# --------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cell": "gru", "threads": 2},
        {"cell": "rnn", "threads": 2, "optimizer": "sgd", "lr": 0.5},
        {"sampler": "random", "tied": True, "hidden": 12, "embedding": 12},
        {"drop_incomplete": True, "embedding": 0, "single_bias": True, "init": "normal"},
        {"heldout": 0.0, "weight_decay": 0.1, "clip": None},
        {"validate_every": 7, "patience": 2, "lr": 1.0},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.skipif(not native.bfloat16(), reason="no bfloat16")),
    ],
)
def test_a_stopped_run_ends_as_one_that_never_stopped(text_file: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    pick = random.Random(repr(given))
    assert isinstance(train(text_file, tmp_path / "whole", **given), training.Finished)
    for trial in range(3):
        out = tmp_path / f"cut-{trial}"
        last = train(text_file, out, after(pick.randrange(1, 30)), **given)
        for _ in range(2):
            assert isinstance(last, training.Stopped | training.Finished)
            last = resume(out, stop=after(pick.randrange(1, 15)))
        assert isinstance(resume(out), training.Finished)
        assert state_of(out) == state_of(tmp_path / "whole")


def test_every_cut_is_exact(text_file: Path, tmp_path: Path) -> None:
    """One stop after the other: after each step and within each look, also the last one."""
    few: dict[str, Any] = {"steps": 6, "validate_every": 2, "save_every": 1}
    train(text_file, tmp_path / "whole", **few)
    last = train(text_file, tmp_path / "cut", after(1), **few)
    stops = 1
    while isinstance(last, training.Stopped):
        before = last.step
        last = resume(tmp_path / "cut", stop=after(1 if stops % 2 else 2))
        stops += 1
        if isinstance(last, training.Stopped) and last.step == before:  # in a look: it needs more than one question
            last = resume(tmp_path / "cut", stop=after(40))
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


def test_more_steps_are_those_of_the_longer_schedule_and_repeat(text_file: Path, tmp_path: Path) -> None:
    for name in "ab":
        train(text_file, tmp_path / name)
    shutil.copytree(tmp_path / "b", tmp_path / "before")
    resume(tmp_path / "a", 70)
    assert isinstance(resume(tmp_path / "b", 70, stop=after(9)), training.Stopped)
    finished = resume(tmp_path / "b")
    assert isinstance(finished, training.Finished)
    assert (finished.step, finished.stopped_early) == (70, False)
    assert state_of(tmp_path / "a") == state_of(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    config = TrainConfig(**DEEP)
    assert rates[40] == updates.learning_rate(config, 39, 40)
    assert rates[41] == updates.learning_rate(config, 40, 70)
    assert rates[70] == pytest.approx(config.lr * config.final_lr)
    assert checkpoint.open_run(tmp_path / "a").config()["legs"] == [[0, 40], [40, 70]]
    # Where the later checkpoints are lost, the first part's end repeats too, with the rates that it had.
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    shutil.copytree(tmp_path / "before" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000040")
    with pytest.warns(UserWarning, match=r"step-000070 is damaged: it is missing.*goes on from .*step-000036"):
        resume(tmp_path / "b")
    assert state_of(tmp_path / "a") == state_of(tmp_path / "b")


def test_a_run_can_end_earlier_and_not_before_where_it_is(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "run", after(20))
    done = json.loads((tmp_path / "run" / "latest.json").read_text())["step"]
    with pytest.raises(UsageError, match=f"has made {done} steps already"):
        resume(tmp_path / "run", done - 1)
    finished = resume(tmp_path / "run", done + 1)
    assert isinstance(finished, training.Finished)
    assert finished.step == done + 1
    assert finished.heldout is not None


def test_a_finished_run_says_its_figure_again(text_file: Path, tmp_path: Path) -> None:
    finished = train(text_file, tmp_path / "run")
    assert isinstance(finished, training.Finished)
    before = state_of(tmp_path / "run")
    again = resume(tmp_path / "run")
    assert isinstance(again, training.Finished)
    assert (again.heldout, again.best_step, again.step) == (finished.heldout, finished.best_step, finished.step)
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed before the last figure
    resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == before


def test_who_looks_at_events_does_not_disturb_the_random_numbers(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "whole")
    config = TrainConfig(**(DEEP | {"texts": (str(text_file),), "out": str(tmp_path / "looked-at")}))
    for event in training.train(config):
        torch.rand(17)
        if isinstance(event, training.Looked):
            event.model.eval()
    assert state_of(tmp_path / "looked-at") == state_of(tmp_path / "whole")


def test_logs_are_cut_to_the_checkpoint(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "whole")
    train(text_file, tmp_path / "run", after(15))
    left = tmp_path / "run" / ".latest.json.0123456789abcdef.tmp"
    left.touch()
    for name in ("metrics.jsonl", "timing.jsonl"):
        path = tmp_path / "run" / name
        kept = path.read_bytes()
        path.write_bytes(kept + b'{"step": 39, "nats_per_token": 1.0}\n{"step": 4')  # killed later, in a line
        next(events := training.resume(tmp_path / "run"))
        events.close()
        assert path.read_bytes() == kept
        assert not left.exists()
    resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")


def test_saves_between_looks_change_nothing_but_what_is_there(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text_file, tmp_path / "whole")
    saved: list[int] = []
    real = checkpoint.Run.save

    def save(run: checkpoint.Run, step: int, *given: Any, **named: Any) -> Path:
        saved.append(step)
        return real(run, step, *given, **named)

    monkeypatch.setattr(checkpoint.Run, "save", save)
    train(text_file, tmp_path / "often", save_every=3)
    assert saved == [step for step in range(1, 41) if step % 3 == 0 or step % 4 == 0]
    saved.clear()
    monkeypatch.setattr("longshort.loop.SECONDS_BETWEEN_SAVES", 0.0)
    train(text_file, tmp_path / "always")
    assert saved == list(range(1, 41))
    for name in ("often", "always"):
        assert state_of(tmp_path / name) == state_of(tmp_path / "whole")


# ----------------------------------------------------------------------------------------- damage and changes


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json", "MANIFEST.json"])
def test_a_damaged_newest_checkpoint_falls_back_loudly(text_file: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    train(text_file, out)
    whole = state_of(out)
    flip(out / "checkpoints" / "step-000040" / name)
    # A bit of the manifest shows in the file that it is about.
    damaged = r"\w+" if name == "MANIFEST.json" else name
    with pytest.warns(UserWarning, match=f"step-000040/{damaged}.*Training goes on from .*step-000036"):
        events = list(training.resume(out))
    assert isinstance(events[0], training.Started)
    assert events[0].resumed_at == 36
    assert state_of(out) == whole


def test_what_is_damaged_beside_the_newest_checkpoint_is_told(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "run")
    for name in ("latest.json", "best.json", "result.json", "tokenizer.json", "metrics.jsonl", "timing.jsonl"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        flip(tmp_path / "copy" / name, 0.8)
        with pytest.warns(UserWarning, match=name):
            assert isinstance(resume(tmp_path / "copy"), training.Finished)
        if name != "metrics.jsonl" and name != "timing.jsonl":
            assert state_of(tmp_path / "copy") == state_of(tmp_path / "run")
        shutil.rmtree(tmp_path / "copy")
    flip(tmp_path / "run" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        resume(tmp_path / "run")


def test_no_whole_checkpoint_is_an_error(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        flip(path / "training.safetensors")
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* can be resumed"):
        resume(tmp_path / "run")


def test_a_changed_text_is_refused_and_a_moved_one_found(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "whole")
    train(text_file, tmp_path / "run", after(9))
    moved = text_file.rename(tmp_path / "moved.txt")
    with pytest.raises(UsageError, match=r"english\.txt"):
        resume(tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text(moved.read_text() + "x")
    with pytest.raises(UsageError, match=r"The text of .* has changed"):
        resume(tmp_path / "run", texts=[str(other)])
    resume(tmp_path / "run", texts=[str(moved)])
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
    assert isinstance(resume(tmp_path / "run"), training.Finished)  # the new place is remembered


def test_a_changed_environment_is_named(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(text_file, tmp_path / "run", after(9))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(precision, "allowed", lambda: "tf32")
    changes = "torch .* is now 9.9.9, forced auto is now torch, precision of products ieee is now tf32"
    with (
        pytest.warns(UserWarning, match=f"The environment has changed: {changes}"),
        kernels.use("torch"),
    ):
        resume(tmp_path / "run")


@pytest.mark.parametrize("trained", [1, 2])
def test_another_process_has_the_threads_of_the_run(text_file: Path, tmp_path: Path, trained: int) -> None:
    train(text_file, tmp_path / "run", after(9), threads=trained)
    environment = os.environ | {"OMP_NUM_THREADS": str(3 - trained)}
    command = [sys.executable, "-m", "longshort", "resume", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "has changed" not in done.stderr
    assert "warning" not in done.stderr


def a_builtin_text(monkeypatch: pytest.MonkeyPatch, seed: int) -> corpus.Text:
    """Let Python come with another built-in text, and return it."""
    text = corpus.Text.of(grammar.generate(3_000, seed=seed), "builtin")
    monkeypatch.setattr(builtin, "builtin", lambda: text)
    return text


def test_the_built_in_text_of_another_python(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHORT_CACHE", str(tmp_path / "cache"))
    made = a_builtin_text(monkeypatch, 1)
    of_builtin: dict[str, Any] = {"texts": (), "corpus": "builtin"}
    train(text_file, tmp_path / "whole", **of_builtin)
    train(text_file, tmp_path / "run", after(9), **of_builtin)
    version = platform.python_version()
    monkeypatch.setattr(platform, "python_version", lambda: "9.9.9")
    now = a_builtin_text(monkeypatch, 2)
    tokenizer = train_tokenizer("char", made.content)
    with pytest.raises(UsageError, match=r"that of Python 9\.9\.9 is not the one of .*run: it was") as caught:
        training.heldout_part(tmp_path / "run", tokenizer)
    assert made.sha256[:12] in caught.value.what
    assert now.sha256[:12] in caught.value.what
    assert f"Use the Python {version} that the run was trained with" in caught.value.hint
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.warns(UserWarning, match="has changed"), pytest.raises(UsageError, match=re.escape(str(caught.value))):
        resume(tmp_path / "run")
    builtin._keep(tmp_path / "cache" / "builtin-0123.txt", grammar.generate(2_000, seed=3))
    builtin._keep(tmp_path / "cache" / "builtin-4567.txt", made.content)  # the other Python's own cache
    assert training.heldout_part(tmp_path / "run", tokenizer).characters == 299
    with pytest.warns(UserWarning, match=rf"The environment has changed: python {version} is now 9\.9\.9\."):
        resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
    for path in (tmp_path / "run" / "checkpoints").glob("*/training.json"):
        path.unlink()
    (tmp_path / "cache" / "builtin-4567.txt").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="Use the Python that the run was trained with"):
        training.heldout_part(tmp_path / "run", tokenizer)


def test_who_does_not_get_a_new_run_deletes_nothing(text_file: Path, tmp_path: Path) -> None:
    run = checkpoint.create_run(tmp_path / "run", {}, "{}")
    with run.lock():
        with pytest.raises(OutputError, match="Another process is training"), loop.keeping(run, 0):
            raise AssertionError("it has the run")
        assert checkpoint.open_run(run.path).config() == {}
    with pytest.raises(ZeroDivisionError), loop.keeping(run, 0):
        raise ZeroDivisionError
    assert not run.path.exists()


def test_two_processes_do_not_train_one_run(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "run", after(9))
    first = training.resume(tmp_path / "run")
    next(first)
    with pytest.raises(OutputError, match="Another process is training"):
        next(training.resume(tmp_path / "run"))
    first.close()
    assert isinstance(resume(tmp_path / "run"), training.Finished)


@pytest.mark.parametrize(
    "change",
    [
        {"position": None},
        {"position": {"step": 40}},
        {"position.step": -1},
        {"position.best_nats": "low"},
        {"position.window_tokens": 1.5},
    ],
)
def test_a_position_that_makes_no_sense_is_refused(text_file: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    train(text_file, tmp_path / "run")
    _, kept = load_training(tmp_path / "run" / "checkpoints" / "step-000040")
    for name, value in change.items():
        if "." in name:
            kept.values["position"][name.split(".")[1]] = value
        else:
            kept.values[name] = value
    with pytest.raises(CheckpointError, match=r"training\.json"):
        snapshot.position_of(kept)


def test_arrays_of_another_model_are_refused(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "run")
    config = TrainConfig(**DEEP, texts=(str(text_file),))
    prepared = training.Prepared(config)
    _, kept = load_training(tmp_path / "run" / "checkpoints" / "step-000040")

    def put_back(arrays: dict[str, Any]) -> None:
        stepper = training.TextStepper(training.make_model(config, prepared.tokenizer), config, 1)
        like = stepper.model.zero_state(8)
        taken = model_files.Training(arrays, kept.values)
        snapshot.put_back(taken, stepper.named_parameters, stepper.optimizer, like, stepper.device)

    put_back(kept.arrays)
    bias = "optimizer.output.bias.exp_avg"
    for name, array in {
        bias: np.zeros(3, np.float32),
        "state.0": np.zeros((1, 2, 3), np.float32),
        "random.cpu": np.zeros(7, np.uint8),
        "more": np.zeros(7, np.uint8),
        "optimizer.output.bias.other": kept.arrays[bias],
    }.items():
        with pytest.raises(CheckpointError):
            put_back(kept.arrays | {name: array})
    for name in (bias, "random.cpu"):
        with pytest.raises(CheckpointError):
            put_back({key: array for key, array in kept.arrays.items() if key != name})


# -------------------------------------------------------------------------------------------- what is not finite


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Let the loss of these steps (1, 2, ...) be `value`."""
    real, calls = head.cross_entropy, itertools.count(1)

    def cross_entropy(*given: Any, **named: Any) -> Any:
        loss = real(*given, **named)
        return loss * value if next(calls) in steps else loss

    monkeypatch.setattr(head, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil(monkeypatch, {5, 21}, value)
    config = TrainConfig(**(DEEP | {"texts": (str(text_file),), "out": str(tmp_path / "run")}))
    events = list(training.train(config))
    skipped = [event for event in events if isinstance(event, training.Skipped)]
    assert [(event.step, event.skipped_steps) for event in skipped] == [(5, 1), (21, 2)]
    assert not any(math.isfinite(event.nats_per_token) for event in skipped)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 21]
    assert {line["step"]: line["skipped_steps"] for line in lines if "nats_per_token" in line}[40] == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 2
    assert_finite(tmp_path / "run")


def assert_finite(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        saved, kept = load_training(path)
        assert all(np.isfinite(array).all() for array in (*saved.weights.values(), *kept.arrays.values()))
    for path in run.glob("*.json*"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()


def test_a_skipped_step_changes_no_weight(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**DEEP, texts=(str(text_file),))
    prepared = training.Prepared(config)
    stepper = training.TextStepper(training.make_model(config, prepared.tokenizer), config, 40)
    sampler = prepared.sampler(config)
    stepper.step(0, sampler.batch(0))
    before = {name: p.detach().clone() for name, p in stepper.named_parameters.items()}
    spoil(monkeypatch, {1}, math.nan)
    nats, norm, _ = stepper.step(1, sampler.batch(1))
    assert math.isnan(nats)
    assert math.isnan(norm)
    assert all(torch.equal(before[name], p) for name, p in stepper.named_parameters.items())
    nats, _, _ = stepper.step(2, sampler.batch(2))
    assert math.isfinite(nats)


def test_after_three_the_run_stops_and_names_the_last_good_step(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {5, *range(14, 99)}, math.nan)
    with pytest.raises(TrainingError, match=r"The last good step was 13; step 12 is saved in .*run") as caught:
        train(text_file, tmp_path / "run")
    assert "diverged at step 15" in caught.value.what
    assert "--from" in caught.value.hint
    assert len(str(caught.value).splitlines()) <= 3
    assert load_model(tmp_path / "run").step == 12
    assert_finite(tmp_path / "run")


def test_weights_that_an_update_broke_are_not_saved(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "learning_rate", lambda config, step, steps: 1e-3 if step < 5 else 1e300)
    with pytest.raises(TrainingError, match="The last good step was 5; step 4 is saved"):
        train(text_file, tmp_path / "run", heldout=0.0, validate_every=2)
    assert_finite(tmp_path / "run")


# ------------------------------------------------------------------------------------------- starting from a model


def test_training_starts_from_a_model(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(text_file, tmp_path / "old", steps=20)
    new_text = tmp_path / "new.txt"
    new_text.write_text(grammar.generate(2_000, seed=2) + "\N{SNOWMAN}~" * 100 + grammar.generate(900, seed=3))
    out = tmp_path / "new"
    arguments = ["train", str(new_text), "--from", str(tmp_path / "old"), "--steps", "5", "--out", str(out)]
    assert main([*arguments, "--batch-size", "4", "--seq-len", "9", "--lr", "1e-30", "--threads", "1"]) == 0
    said = capsys.readouterr().err
    assert f"starts from {tmp_path / 'old'}; 200 tokens outside its vocabulary are read, never predicted" in said
    old, new = load_model(tmp_path / "old"), load_model(out)
    assert new.tokenizer_json == old.tokenizer_json
    assert new.model == old.model  # the sizes, and the dropout, were brought
    for name, array in old.weights.items():
        np.testing.assert_allclose(new.weights[name], array, rtol=1e-6)
    shutil.rmtree(tmp_path / "old")  # a run does not need the model that it started from
    finished = resume(out, 9)
    assert isinstance(finished, training.Finished)
    assert finished.step == 9
    assert load_language_model(out).config.layers == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cell", "gru"], "has cell lstm, so cell gru does not go with --from"),
        (["--hidden", "13"], "has hidden 12, so hidden 13"),
        (["--layers", "1"], "has layers 2, so layers 1"),
        (["--embedding", "0"], "has embedding 8"),
        (["--tied"], "does not go with --from"),
        (["--tokenizer", "byte"], "has tokenizer char, so tokenizer byte"),
        (["--init", "normal"], "init makes new weights"),
        (["--single-bias"], "single_bias makes new weights"),
        (["--min-freq", "3"], "min_freq makes a new tokenizer"),
        (["--vocab-size", "300"], "vocab_size makes a new tokenizer"),
        (["--from", "nowhere"], "run or model directory"),
    ],
)
def test_flags_that_ask_for_another_model_are_refused_by_name(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    train(text_file, tmp_path / "old", steps=2)
    given = [] if "--from" in flags else ["--from", str(tmp_path / "old")]
    assert main(["train", str(text_file), *given, *flags, "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) <= 3
    assert not (tmp_path / "new").exists()


def test_python_is_told_of_another_model_too(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "old", steps=2)
    with pytest.raises(UsageError, match="has hidden 12, not 14"):
        train(text_file, tmp_path / "new", hidden=14, from_model=str(tmp_path / "old"))
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("\N{SNOWMAN}\N{UMBRELLA}" * 500)
    with pytest.raises(TextError, match="shares no symbol with the vocabulary"):
        train(foreign, tmp_path / "new", from_model=str(tmp_path / "old"))
    single = tmp_path / "single.txt"
    single.write_text("a" * 1000)
    with pytest.raises(TextError, match="symbols of the tokenizer word, the text to train on has none after the first"):
        train(single, tmp_path / "new", tokenizer="word")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ space on the disk


def full(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, free()))


def test_a_full_disk_is_told_before_training(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, lambda: 150_000)
    with pytest.raises(OutputError, match=r"No space for the checkpoints of a run: need \d\.\d MB, have 0\.1 MB at "):
        train(text_file, tmp_path / "run", steps=10**9)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_costs_the_spare_checkpoint_then_stops_the_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(text_file, tmp_path / "whole")
    # Room for what is kept, and one more where only two are there.
    full(monkeypatch, lambda: 10**9 if len(list(run.glob("checkpoints/*"))) < 2 else 0)
    with pytest.warns(UserWarning, match=r"The disk is nearly full: the next checkpoint needs \d\.\d MB"):
        train(text_file, run)
    assert state_of(run) == state_of(tmp_path / "whole")
    shutil.rmtree(run)
    full(monkeypatch, lambda: 10**9 if len(list(run.glob("checkpoints/step-000012"))) < 1 else 0)
    needs = r"No space for a checkpoint: need .* MB, have 0\.0 MB at .*checkpoints"
    with pytest.warns(UserWarning, match="nearly full"), pytest.raises(OutputError, match=needs):
        train(text_file, run)
    assert load_model(run).step == 12
    with pytest.raises(OutputError, match="No space"):
        resume(run)
    monkeypatch.undo()
    resume(run)
    assert state_of(run) == state_of(tmp_path / "whole")


def test_a_run_that_can_no_longer_be_written_says_so_at_once(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text_file, tmp_path / "run", after(9))

    def refuse(path: Path) -> None:
        raise OutputError("Cannot write it.")

    monkeypatch.setattr(durable, "require_writable_directory", refuse)
    with pytest.raises(LongshortError, match="Cannot write"):
        next(training.resume(tmp_path / "run"))


# ------------------------------------------------------------------------------- what a run could not be read back of


def test_more_files_than_a_run_can_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "JSON_LIMIT", 20_000)
    folder = tmp_path / ("deep" * 50)
    folder.mkdir()
    files = [folder / f"{number:03}.txt" for number in range(100)]
    for number, file in enumerate(files):
        file.write_text(grammar.generate(100, seed=number))
    sizes = ["--hidden", "4", "--embedding", "4", "--steps", "2", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *map(str, files), *sizes]) == 2
    said = capsys.readouterr().err
    assert "more than the 20000 that are read back" in said
    assert "give their folder instead" in said
    assert len(said.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()
    assert main(["train", str(folder), *sizes]) == 0
    with pytest.raises(UsageError, match="more than the 20000"):  # where they have moved to
        resume(tmp_path / "run", texts=[str(file) for file in files], steps=3)
    resume(tmp_path / "run", steps=3)


@pytest.mark.parametrize("given", [{"tokenizer": "word"}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_a_vocabulary_that_is_too_large_is_refused_before_a_step(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    def step(*given: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(updates.Stepper, "step", step)
    monkeypatch.setitem(model_files.LIMITS, "tokenizer.json", 1_000)
    with pytest.raises(TextError, match="The vocabulary of this text takes") as caught:
        train(text_file, tmp_path / "run", **given)
    assert "--min-freq" in caught.value.hint
    assert "--vocab-size" in caught.value.hint
    assert not (tmp_path / "run").exists()
