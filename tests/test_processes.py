"""Several processes that train one model do what one process does, and lose as little.

`python tests/test_processes.py PLACE PORT ...` is one of the two processes in which the cases below are made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import campaign
from longshort import processes, training
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.errors import LongshortError, UsageError
from longshort.model_files import load_training
from longshort.text import encoding, grammar
from test_faults import fingerprint, flags, reached, verdict, wait_for, write_text
from test_resume import state_of

SMALL: dict[str, Any] = {"hidden": 12, "embedding": 8, "seq_len": 12, "batch_size": 8, "threads": 1, "steps": 200}
LINES: dict[str, Any] = SMALL | {"lines": True, "steps": 60, "layers": 2}
WORDS: dict[str, Any] = SMALL | {"tokenizer": "word", "adaptive_softmax": True, "hidden": 16, "batch_size": 4}
WORDS |= {"seq_len": 4, "steps": 60}  # so few symbols that often one process alone has rare ones
DEEP: dict[str, Any] = SMALL | {"layers": 2, "dropout": 0.3, "steps": 40}


def after(steps: int) -> Callable[[], bool]:
    asked = itertools.count()
    return lambda: next(asked) >= steps


def never() -> bool:
    return False


# ------------------------------------------------------------------------------ what happens in the two processes


def in_both(rank: int, place: Path, ports: list[str]) -> None:
    """Make every case, and as process 0 write down what each ended with."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    pickled: list[Any] = []
    sys.addaudithook(lambda event, arguments: pickled.append(arguments) if event == "pickle.find_class" else None)

    def case(name: str, lead: Callable[[processes.Team], Any], stop: Callable[[], bool] = never) -> None:
        os.environ["MASTER_PORT"] = ports.pop(0)
        try:
            with warnings.catch_warnings(), processes.join() as team:
                warnings.simplefilter("ignore")
                if team.leads:
                    *_, last = lead(team)
                    found[name] = type(last).__name__
                else:
                    found[name] = f"exit {training.follow(team, stop)}"
        except LongshortError as error:
            found[name] = f"{type(error).__name__}: {error}"
        (place / f"{name}.{rank}").write_text(found[name])

    def train(out: str, given: dict[str, Any], stop: Callable[[], bool] = never) -> Callable[[processes.Team], Any]:
        config = TrainConfig(**given, texts=(text_for(place, given),), out=str(place / out))
        return lambda team: training.train(config, stop=stop, team=team)

    def resume(out: str, stop: Callable[[], bool] = never) -> Callable[[processes.Team], Any]:
        return lambda team: training.resume(place / out, stop=stop, team=team)

    case("plain", train("plain", SMALL))
    case("lines", train("lines", LINES))
    case("words", train("words", WORDS))
    case("whole", train("whole", DEEP))
    case("first cut", train("cut", DEEP, after(11)))
    case("second cut", resume("cut"), after(5))  # it is process 1 that is asked to stop
    case("last part", resume("cut"))
    case("two, then one", train("two-one", SMALL, after(50)))
    case("one, then two", resume("one-two"))
    real = training.TextStepper.collect

    def stray(stepper: training.TextStepper, state: bool) -> Any:
        with torch.no_grad():
            stepper.parameters[0].view(-1)[0] += 1e-6 * rank
        return real(stepper, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.TextStepper, "collect", stray)
        case("stray", train("stray", SMALL))
    case("bad size", train("bad-size", SMALL | {"batch_size": 3}))
    with pytest.MonkeyPatch.context() as patch:
        survey = encoding.survey
        if rank:
            patch.setattr(encoding, "survey", lambda source: dataclasses.replace(survey(source), sha256="0" * 64))
        case("other text", train("other-text", SMALL))
    assert not pickled, pickled


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where both processes have made every case."""
    place = tmp_path_factory.mktemp("pair")
    (place / "text.txt").write_text(grammar.generate(3_000, seed=1), encoding="utf-8")
    p = 1 / np.arange(1, 1501)
    drawn = np.random.default_rng(0).choice(1500, 6000, p=p / p.sum())
    (place / "words.txt").write_text(" ".join(f"w{number}" for number in (*drawn, *range(1500), *drawn)))
    train_alone(place, "one-two", SMALL, after(50))
    ports = free_ports(13)
    pair = launched([sys.executable, __file__, str(place), *ports[1:]], ports[0])
    for process in pair:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
    return place


def launched(command: list[str], port: str) -> list[subprocess.Popen[str]]:
    """Start a command twice, as torchrun does."""
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = port
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def text_for(place: Path, given: dict[str, Any]) -> str:
    return str(place / ("words.txt" if given is WORDS else "text.txt"))


def train_alone(place: Path, out: str, given: dict[str, Any], stop: Callable[[], bool] = never) -> None:
    config = TrainConfig(**given, texts=(text_for(place, given),), out=str(place / out))
    for _ in training.train(config, stop=stop):
        pass


def ended(place: Path, name: str) -> list[str]:
    """Return what both processes ended with."""
    return [(place / f"{name}.{rank}").read_text() for rank in range(2)]


def assert_same_losses(one: Path, other: Path) -> None:
    """Every figure of the logs to 1e-4, which rounding alone stays far below, and the weights."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) > 10
    for mine, theirs in zip(*lines, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value == theirs[name] or abs(value - theirs[name]) < 1e-4, (name, mine, theirs)
    steps = json.loads((one / "latest.json").read_text())["checkpoint"]
    saved = [load_training(run / "checkpoints" / steps)[0] for run in (one, other)]
    for name, array in saved[0].weights.items():
        np.testing.assert_allclose(saved[1].weights[name], array, atol=2e-3)


@pytest.mark.parametrize(("name", "given"), [("plain", SMALL), ("lines", LINES), ("words", WORDS)])
def test_two_processes_train_what_one_trains(place: Path, name: str, given: dict[str, Any]) -> None:
    assert ended(place, name) == ["Finished", "exit 0"]
    train_alone(place, f"{name}-alone", given)
    assert_same_losses(place / f"{name}-alone", place / name)


def test_a_run_of_two_that_is_cut_ends_as_one_that_is_not(place: Path) -> None:
    assert ended(place, "whole") == ["Finished", "exit 0"]
    assert ended(place, "first cut") == ["Stopped", "exit 0"]
    assert ended(place, "second cut") == ["Stopped", "exit 0"]  # one process was asked, all stopped
    assert ended(place, "last part") == ["Finished", "exit 0"]
    assert state_of(place / "cut") == state_of(place / "whole")


def test_processes_drop_other_units(place: Path) -> None:
    _, kept = load_training(place / "whole" / "checkpoints" / "step-000040")
    assert not np.array_equal(kept.arrays["random.cpu"], kept.arrays["random.cpu.1"])
    assert kept.arrays["state.0"].shape == (2, 8, 12)  # all rows, whoever read them


def test_another_number_of_processes_goes_on_and_says_so(place: Path) -> None:
    assert ended(place, "two, then one") == ["Stopped", "exit 0"]
    assert ended(place, "one, then two") == ["Finished", "exit 0"]
    with pytest.warns(UserWarning, match="The environment has changed: processes 2 is now 1"):
        list(training.resume(place / "two-one"))
    for name in ("two-one", "one-two"):
        assert_same_losses(place / "plain", place / name)


def test_a_process_that_strays_is_noticed_before_anything_is_saved(place: Path) -> None:
    first, second = ended(place, "stray")
    assert first.startswith("TrainingError: Process 1 has other weights than process 0.")
    assert second == "exit 1"
    assert not (place / "stray").exists()


def test_what_process_0_refuses_ends_all(place: Path) -> None:
    first, second = ended(place, "bad size")
    assert first == "ConfigError: batch_size 3 cannot be divided over 2 processes."
    assert second == "exit 2"


def test_another_text_is_noticed(place: Path) -> None:
    first, second = ended(place, "other text")
    assert first.startswith("TrainingError: The connection to another of the 2 processes was lost")
    assert second.startswith("UsageError: The text of ")
    assert not (place / "other-text").exists()


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x"}])
def test_an_environment_that_is_not_torchruns_is_refused(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node"):
        processes.join()
    text = write_text(tmp_path / "text.txt")
    assert main(["train", str(text), "--out", str(tmp_path / "run")]) == 2
    assert "not as torchrun does" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_ends_both(tmp_path: Path) -> None:
    text, run = write_text(tmp_path / "text.txt", 20_000), tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "longshort",
        "train",
        str(text),
        "--out",
        str(run),
        *flags(steps=10**7, save_every=20),
    ]
    (port,) = free_ports(1)
    pair = launched(command, port)
    wait_for(run, 1, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[1] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], said
    assert f"step {reached(run):,} of 10,000,000 is saved. Go on with: torchrun --nproc-per-node 2 -m" in said[0]
    assert not said[1]
    assert verdict(run).startswith("whole")


@campaign.long
@pytest.mark.skipif(not campaign.SHARE, reason="three starts of torchrun; the cases above are the short version")
def test_two_processes_that_are_killed_or_stopped_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """torchrun gets SIGTERM or SIGINT, or one of its two processes SIGKILL, at a random moment."""
    text, pick = write_text(tmp_path / "text.txt", 20_000), random.Random(7)
    options = flags(hidden=48, steps=400, save_every=9, batch_size=8, seq_len=24)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longshort"]
    subprocess.run([*launch, "train", text, "--out", tmp_path / "whole", *options], check=True, capture_output=True)
    whole, run = fingerprint(tmp_path / "whole"), tmp_path / "cut"
    with campaign.trials("two processes, cut and resumed", short=1, long=20) as trials:
        for _ in trials:
            command = [*launch, "train", str(text), "--out", str(run), *options]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            wait_for(run, pick.randrange(1, 300), process)
            how = pick.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            if how == signal.SIGKILL:
                os.kill(pick.choice(children(process.pid)), how)
            else:
                process.send_signal(how)
            _, said = process.communicate(timeout=60)
            cut = reached(run)
            if how != signal.SIGKILL and f"step {cut:,} of 400 is saved. Go on with: torchrun" not in said:
                trials.failed(f"{how.name} at {cut}: it did not say what it saved: {said[-500:]}")
            done = subprocess.run([*launch, "resume", run], capture_output=True, text=True, check=False)
            if done.returncode or fingerprint(run) != whole:
                trials.failed(f"{how.name} at {cut}: exit {done.returncode}, another run: {done.stderr[-1500:]}")
            shutil.rmtree(run)


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


if __name__ == "__main__":
    in_both(int(os.environ["RANK"]), Path(sys.argv[1]), [os.environ["MASTER_PORT"], *sys.argv[2:]])
