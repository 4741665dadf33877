"""What a training takes of memory is foretold, and what cannot fit is refused before it begins."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longshort import calls, machine, memory, native, recipes, training
from longshort.config import TrainConfig
from longshort.errors import TrainingError

SMALL: dict[str, Any] = {"hidden": 16, "embedding": 16, "seq_len": 16, "batch_size": 8, "steps": 12, "threads": 1}


def run(text_file: Path, out: Path, **changes: Any) -> None:
    config = TrainConfig(**(SMALL | {"texts": (str(text_file),), "out": str(out)} | changes))
    list(training.train(config))


# Trains, and prints by how many bytes the resident memory rose at most, and how many were foretold.
TRAINS = """
import json, sys
from pathlib import Path
from longshort import memory, training
from longshort.config import TrainConfig

def status(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def train(options, out):
    config = TrainConfig(**options, texts=(sys.argv[2],), out=out, steps=2, threads=1)
    prepared = training.Prepared(config)
    for event in training.train(config, prepared):
        pass
    return memory.training_needs(config, prepared.tokenizer.size, config.seq_len * config.batch_size)

train({"hidden": 8, "embedding": 8, "seq_len": 4, "batch_size": 2}, "small")  # what all training needs
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # so that the peak is a new one
needed = train(json.loads(sys.argv[1]), "large")
print(status("VmHWM") - before, needed)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured by /proc")
@pytest.mark.skipif(not native.ready(), reason="what the native kernels keep is foretold")
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 256, "seq_len": 512, "batch_size": 64},  # what a step keeps
        {"hidden": 512, "seq_len": 128, "batch_size": 64, "layers": 2, "layer_norm": True},
        {"hidden": 1536, "seq_len": 4, "batch_size": 4},  # what a checkpoint takes
        {"hidden": 1536, "seq_len": 4, "batch_size": 4, "optimizer": "sgd", "lr": 0.1},
    ],
)
def test_the_memory_of_a_training_is_foretold_to_a_fifth(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=100_000)), encoding="utf-8")
    command = [sys.executable, "-c", TRAINS, json.dumps(options), "text.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rise, needed = map(int, done.stdout.split())
    assert 0.8 < needed / rise < 1.2


@pytest.mark.skipif(not native.ready(), reason="there are no native kernels")
def test_what_is_foretold_to_be_saved_is_what_the_kernels_save() -> None:
    for cell in ("lstm", "gru", "rnn", "rnn_relu"):
        for layer_norm in (False, True):
            saved = memory.SAVED.get(cell, (1, 3))[layer_norm]
            assert calls.saved_floats_a_row(cell, 1024, 0, layer_norm) == pytest.approx(1024 * saved, rel=0.01)


def test_a_training_that_cannot_fit_is_refused_before_it_begins(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(text_file, tmp_path / "run", steps=2)
    needed = memory.training_needs(TrainConfig(**SMALL), 60, 16 * 8)
    monkeypatch.setattr(machine, "memory", lambda: needed)
    run(text_file, tmp_path / "just", steps=2)
    monkeypatch.setattr(machine, "memory", lambda: 20_000_000)
    # Of windows of a million steps the text fills 18,000.
    run(text_file, tmp_path / "short", seq_len=1_000_000, batch_size=1, steps=1, hidden=2, embedding=2)
    monkeypatch.setattr(machine, "memory", lambda: needed // 2)

    def make_model(*given: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(training, "make_model", make_model)
    words = rf"needs about {needed / 1e9:.1f} GB of memory; there are {needed / 2e9:.1f} GB"
    with pytest.raises(TrainingError, match=words) as caught:
        run(text_file, tmp_path / "other")
    assert "--batch-size" in caught.value.hint
    with pytest.raises(TrainingError, match=words):
        list(training.resume(tmp_path / "run", 4))
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(machine, "memory", lambda: 0)  # not known
    with pytest.raises(AssertionError, match="a model was made"):
        run(text_file, tmp_path / "other")


def test_the_dial_takes_no_model_that_does_not_fit(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"texts": (str(text_file),), "threads": 1, "seq_len": 4, "batch_size": 2}
    prepared = training.Prepared(TrainConfig(**settings))
    monkeypatch.setattr(recipes, "FEWEST_STEPS", 0)  # so that the time given is enough for every size
    config = TrainConfig(**settings, hidden=128, embedding=128)
    monkeypatch.setattr(machine, "memory", lambda: memory.training_needs(config, prepared.tokenizer.size, 8))
    assert recipes.plan(0.1, settings, prepared, since=time.perf_counter()).config.hidden == 128
    with pytest.raises(TrainingError, match="memory"):
        recipes.plan(0.1, settings | {"hidden": 256}, prepared, since=time.perf_counter())


def test_the_memory_that_is_there_is_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.memory()
    assert whole > 1_000_000_000
    for word, expected in (("max\n", whole), ("1000000000\n", 1_000_000_000), (f"{whole + 1}\n", whole)):
        (tmp_path / "memory.max").write_text(word, encoding="ascii")
        assert machine.memory() == expected
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("500000000\n", encoding="ascii")
    assert machine.memory() == 500_000_000
    monkeypatch.delattr(os, "sysconf")
    assert machine.memory() == 500_000_000
    (tmp_path / "memory" / "memory.limit_in_bytes").unlink()
    assert machine.memory() == 0
