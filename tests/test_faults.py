"""Runs that are killed, interrupted or cut, files that are damaged or hostile: nothing is lost, nothing crashes.

Short here, long in `make campaign` (campaign.py). `python tests/test_faults.py kills|fuzz ...` is what two of the tests
run in processes of their own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import campaign
import longshort
from failing import FAILING, nth_call_fails
from longshort import checkpoint, model_files, snapshot, training
from longshort.config import TrainConfig
from longshort.errors import LongshortError, OutputError
from longshort.text import grammar

TINY: dict[str, Any] = {"hidden": 8, "embedding": 4, "seq_len": 8, "batch_size": 4, "threads": 1, "layers": 2}
TINY |= {"dropout": 0.3}


def flags(**given: Any) -> list[str]:
    return [word for name, value in (TINY | given).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def write_text(path: Path, size: int = 2_000) -> Path:
    path.write_text(grammar.generate(size, seed=4), encoding="utf-8")
    return path


def train(text: Path, out: Path, **given: Any) -> list[training.Event]:
    return list(training.train(TrainConfig(**(TINY | {"texts": (str(text),), "out": str(out)} | given))))


def fingerprint(run: Path) -> str:
    """Return a hash of weights, optimizer, random numbers, position, metrics and last figure of a finished run."""
    step = json.loads((run / "latest.json").read_text())["checkpoint"]
    files = [run / "checkpoints" / step / name for name in ("model.safetensors", "training.safetensors")]
    files += [run / name for name in ("metrics.jsonl", "result.json", "best.json")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "longshort", *map(str, arguments)]


# ------------------------------------------------------------------------------------------------------------ kills


@campaign.long
def test_a_kill_costs_no_checkpoint(tmp_path: Path) -> None:
    """kill -9 at a random moment after the first save of a run that saves after every step."""
    with campaign.trials("kill -9 of a run that saves back to back", short=6, long=200) as trials:
        arguments = [sys.executable, __file__, "kills", str(tmp_path), str(trials.count)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for line, _ in zip(done.stdout.splitlines(), trials, strict=True):
            if not line.startswith("whole"):
                trials.failed(line)


def kills(place: Path, count: int) -> None:
    """Kill `count` runs; print a line for each."""
    text, run = write_text(place / "text.txt"), place / "run"
    pick = random.Random(0)
    for number in range(count):
        if number % 5 == 0:
            shutil.rmtree(run, ignore_errors=True)
        fresh = not run.exists()
        before = time.monotonic()
        child = os.fork()
        if child == 0:
            events = (
                training.train(TrainConfig(**TINY, texts=(str(text),), out=str(run), steps=10**6, save_every=1))
                if fresh
                else training.resume(run)
            )
            for _ in events:
                pass
        while not (run / "latest.json").exists():
            time.sleep(0.001)
            assert time.monotonic() - before < 60
        time.sleep(pick.uniform(0, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(verdict(run), flush=True)


def verdict(run: Path) -> str:
    """Return whether what is on the disk can be loaded and resumed without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            saved = checkpoint.load_model(run)
            latest, kept = checkpoint.open_run(run).recover()
            position = snapshot.position_of(kept)
            assert position.step == latest.step
            assert (saved.step or 0) <= position.step
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace("\n", " ")
    return f"whole at step {latest.step}"


# ---------------------------------------------------------------------------------------------- failing system calls


@campaign.long
def test_a_run_survives_the_failure_of_any_call(tmp_path: Path) -> None:
    """A fault at the Nth open, write, fsync, rename ... of a whole run: it stops, and is resumed bit for bit."""
    text = write_text(tmp_path / "text.txt", 600)
    given: dict[str, Any] = {"steps": 4, "validate_every": 2, "save_every": 1}
    names = (*FAILING, "truncate", "unlink")
    with nth_call_fails(0, 0, names) as calls:
        train(text, tmp_path / "whole", **given)
    whole, total = fingerprint(tmp_path / "whole"), len(calls)
    assert total > 100
    with campaign.trials("a fault at the Nth call of a whole run", short=15, long=3 * total) as trials:
        for trial in trials:
            number = 1 + (trial % total if campaign.SHARE else trial * total // trials.count)
            code = (errno.EIO, errno.ENOSPC, errno.EINTR)[trial // total % 3]
            run = tmp_path / "run"
            with nth_call_fails(number, code, names):
                try:
                    train(text, run, **given)
                except OutputError:
                    pass
                except BaseException as error:
                    trials.failed(f"call {number}: {error!r}")
            try:
                left = [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old", ".gone"))]
                assert not left, left
                if run.exists():
                    assert verdict(run).startswith("whole"), verdict(run)
                    list(training.resume(run))
                    assert fingerprint(run) == whole, "another run"
            except Exception as error:
                trials.failed(f"call {number} ({code}): {error!r}")
            shutil.rmtree(run, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- cuts


@campaign.long
@pytest.mark.parametrize(("threads", "lines"), [(1, False), (2, False), (1, True)])
def test_runs_that_are_cut_end_as_those_that_are_not(tmp_path: Path, threads: int, lines: bool) -> None:
    """SIGTERM or SIGKILL at a random moment, in the campaign twice, each time resumed in a new process."""
    text, pick = write_text(tmp_path / "text.txt", 20_000), random.Random(threads)
    long, short = (200, 80) if lines else (500, 150)  # a step of lines reads more
    steps = long if campaign.SHARE else short
    options = flags(threads=threads, hidden=48, steps=steps, save_every=9, batch_size=8, seq_len=24)
    options += ["--lines"] if lines else []
    subprocess.run(command("train", text, "--out", tmp_path / "whole", *options), check=True, capture_output=True)
    whole, run = fingerprint(tmp_path / "whole"), tmp_path / "cut"
    latest = 2 * steps // 5
    name = f"random cuts, resumed twice, {threads} thread(s){', lines' if lines else ''}"
    with campaign.trials(name, short=1, long=20) as trials:
        for _ in trials:
            reached_so_far: list[int] = []
            cuts = 2 if campaign.SHARE else 1
            for verb in [("train", text, "--out", run, *options)] + cuts * [("resume", run)]:
                process = subprocess.Popen(command(*verb), stderr=subprocess.DEVNULL)
                if len(reached_so_far) < cuts:
                    wait_for(run, pick.randrange(1, latest) + sum(reached_so_far[-1:]), process)
                    process.send_signal(pick.choice([signal.SIGKILL, signal.SIGTERM]))
                process.wait(timeout=120)
                reached_so_far.append(reached(run))
            if process.returncode or fingerprint(run) != whole:
                trials.failed(f"cut at {reached_so_far}: exit {process.returncode}, another run")
            shutil.rmtree(run)


def reached(run: Path) -> int:
    """Return the step of the latest checkpoint; 0 before the first."""
    with suppress(OSError, ValueError):
        return int(json.loads((run / "latest.json").read_text())["step"])
    return 0


def wait_for(run: Path, step: int, process: subprocess.Popen[Any]) -> None:
    """Wait until `process` has saved this step, or has ended."""
    deadline = time.monotonic() + 120
    while reached(run) < step and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------- signals


@campaign.long
def test_signals_save_and_end(tmp_path: Path) -> None:
    """SIGINT or SIGTERM at a random moment, every third time a second one right after."""
    text, pick = write_text(tmp_path / "text.txt", 20_000), random.Random(5)
    with campaign.trials("SIGINT and SIGTERM, every third time twice", short=2, long=50) as trials:
        for trial in trials:
            run, sent = tmp_path / "run", pick.choice([signal.SIGINT, signal.SIGTERM])
            arguments = command("train", text, "--out", run, *flags(steps=10**7, save_every=20))
            process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
            wait_for(run, 1, process)
            time.sleep(pick.uniform(0, 0.5))
            twice = trial % 3 == 1
            begin = time.monotonic()
            process.send_signal(sent)
            if twice:
                time.sleep(pick.uniform(0, 0.02))
                process.send_signal(sent)
            _, said = process.communicate(timeout=60)
            seconds = time.monotonic() - begin
            allowed = {128 + sent, -sent} if twice else {128 + sent}  # the second may find Python on its way out
            if process.returncode not in allowed or seconds > 10 or not verdict(run).startswith("whole"):
                trials.failed(
                    f"{sent.name}: exit {process.returncode} after {seconds:.1f} s; {verdict(run)}; {said[-200:]}"
                )
            elif not twice and f"step {reached(run):,} of" not in said:
                trials.failed(f"it did not say what it saved: {said[-200:]}")
            shutil.rmtree(run)


# ------------------------------------------------------------------------------------------------------ bit flips


@campaign.long
def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """A random bit of a random file of a run: refused, or a warning, and never other weights."""
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    train(text, run, steps=20, validate_every=4, save_every=3)
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    whole = {path.name: checkpoint.load_model(path).weights for path in (run / "checkpoints").iterdir()}
    pick = random.Random(6)
    with campaign.trials("a flipped bit in a run directory", short=60, long=1000) as trials:
        for _ in trials:
            name, copy = pick.choice(files), tmp_path / "copy"
            shutil.copytree(run, copy)
            content = bytearray((copy / name).read_bytes())
            bit = pick.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            (copy / name).write_bytes(content)
            noticed = look_at(copy, whole)
            if noticed is not None:
                trials.failed(f"bit {bit} of {name}: {noticed}")
            shutil.rmtree(copy)


def look_at(run: Path, whole: dict[str, Any]) -> str | None:
    """Load and resume a run as the verbs do; return None if something was refused or warned of, else what happened."""
    heard = []
    for use in (checkpoint.load_model, lambda run: next(training.resume(run))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found: Any = use(run)
                heard += [str(warning.message) for warning in caught]
                if isinstance(found, training.Started):
                    step, weights = found.resumed_at, found.model.weights()
                else:
                    step, weights = found.step, found.weights
                wanted = whole[f"step-{step:06d}"]
                if any(weights[name].tobytes() != array.tobytes() for name, array in wanted.items()):
                    return "other weights"
            except LongshortError as error:
                heard.append(str(error))
    return None if heard else "nobody noticed"


# ---------------------------------------------------------------------------------------------------- hostile files


@campaign.long
def test_mutated_files_are_refused_or_harmless(tmp_path: Path) -> None:
    """Files of a model and of its tokenizer, changed at random, the manifest made to agree: no signal, no hang."""
    with campaign.trials("a mutated model or tokenizer file", short=1_000, long=100_000) as trials:
        while trials.done < trials.count:
            count = min(10_000, trials.count - trials.done)
            place = tmp_path / str(trials.done)
            place.mkdir()
            arguments = [sys.executable, __file__, "fuzz", str(place), str(count), str(trials.done)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            trials.done += count
            if done.returncode:
                last = (place / "last").read_text() if (place / "last").exists() else ""
                trials.failed(f"exit {done.returncode} at {last}: {done.stderr[-300:]}")
            for line in done.stdout.splitlines():
                if line.startswith("failed"):
                    trials.failed(line)
                elif line.startswith("taken"):
                    taken = int(line.split()[1])
                    assert 0.005 * count < taken < 0.9 * count, line  # both ends of the promise were tried


SECONDS = 1.0
"""The longest that a mutated file may keep its reader."""


def fuzz(place: Path, count: int, seed: int) -> None:
    """Load `count` mutated models; print those that failed, and how many were taken."""
    torch.set_num_threads(1)
    models = [make_model(place / name, name) for name in ("char", "byte")]
    taken = 0

    def late(number: int, frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for number in range(seed, seed + count):
        pick = random.Random(number)
        model, files = pick.choice(models)
        # The small files more often than the large ones: that is where meaning is.
        name = pick.choice(["config.json"] * 3 + ["tokenizer.json"] * 3 + ["training.json", "MANIFEST.json"] + [*files])
        data = mutate(files[name], pick)
        (place / "last").write_text(f"{number} {name}")
        (model / name).write_bytes(data)
        if name != "MANIFEST.json" and pick.random() < 0.9:
            agree(model, files, name, data)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            use(model)
            taken += 1
        except LongshortError:
            pass
        except BaseException as error:
            print(f"failed {number} {name}: {type(error).__name__} {error!s:.200}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for each in {name, "MANIFEST.json", "config.json"}:
                (model / each).write_bytes(files[each])
    print(f"taken {taken}")


def use(model: Path) -> None:
    """Do with a checkpoint what the verbs do: run it, and make ready to train on."""
    decoder = longshort.load(model)
    ids = decoder.tokenizer.encode("the café")
    decoder.tokenizer.decode(ids.tolist())
    decoder.logits(ids.astype("int64"), None)
    _, kept = model_files.load_training(model)
    snapshot.position_of(kept)
    torch_model = longshort.load(model, train=True)
    config = TrainConfig(**TINY, cell=torch_model.config.cell)
    stepper = training.TextStepper(torch_model, config, 1)
    like = torch_model.zero_state(TINY["batch_size"])
    snapshot.put_back(kept, stepper.named_parameters, stepper.optimizer, like, stepper.device)
    snapshot.changes(kept)


def make_model(run: Path, tokenizer: str) -> tuple[Path, dict[str, bytes]]:
    """Train a model and return its checkpoint and the content of its files."""
    train(write_text(run.with_suffix(".txt")), run, tokenizer=tokenizer, steps=2)
    path = checkpoint.open_run(run).latest()
    assert path is not None
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


def agree(model: Path, files: dict[str, bytes], name: str, data: bytes) -> None:
    """Make manifest and configuration agree with the new content `data` of `name`, as a hostile hand would."""
    entries = json.loads(files["MANIFEST.json"])
    changed = {name: data}
    if name == "tokenizer.json":
        config = json.loads(files["config.json"]) | {"tokenizer_sha256": hashlib.sha256(data).hexdigest()}
        changed["config.json"] = json.dumps(config).encode()
        (model / "config.json").write_bytes(changed["config.json"])
    for each, content in changed.items():
        entries["files"][each] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (model / "MANIFEST.json").write_text(json.dumps(entries))


NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"1.5", b"65536", b"10000000", b"9223372036854775808", b"null", b'"x"', b"[]")


def mutate(data: bytes, pick: random.Random) -> bytes:
    """Return `data` with one to three random changes."""
    out = bytearray(data)
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        where, kind = pick.randrange(len(out) + 1), pick.randrange(7)
        if kind == 0 and out:  # a bit
            where = min(where, len(out) - 1)
            out[where] ^= 1 << pick.randrange(8)
        elif kind == 1:  # the end is lost
            del out[where:]
        elif kind == 2:  # a part is lost
            del out[where : where + pick.randrange(1, 40)]
        elif kind == 3:  # something is put in
            out[where:where] = pick.randbytes(pick.randrange(1, 20))
        elif kind == 4:  # a part is there twice
            out[where:where] = out[where : where + pick.randrange(1, 200)]
        else:  # a number becomes another one, or something else
            places = [i for i in range(min(len(out), 1 << 14)) if 48 <= out[i] <= 57]
            if places:
                start = end = pick.choice(places)
                while end < len(out) and 48 <= out[end] <= 57:
                    end += 1
                out[start:end] = pick.choice(NUMBERS)
    return bytes(out)


# ------------------------------------------------------------------------------------------------------------ pickle


def test_no_verb_reads_a_pickle(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", 12_000)
    program = """
import os, sys
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
from longshort.bench import grids, peers, workloads
from longshort.cli import main
small = ["--hidden", "8", "--embedding", "4", "--threads", "1"]
grids.GRIDS["quick"] = grids.Grid(((1, 1, 8),))
peers.GEMM_SIZE, workloads.BLOCKS, workloads.BLOCK_SECONDS = 64, 2, 0.0
workloads._lines = lambda number, made=workloads._lines: made(64)
workloads.KINDS = {what: builders[:1] for what, builders in workloads.KINDS.items()}
for arguments in (
    ["train", "text.txt", "--steps", "3", "--out", "run", *small],
    ["resume", "run", "--steps", "5"],
    ["train", "text.txt", "--from", "run", "--steps", "2", "--out", "tuned"],
    ["eval", "run", "--split", "valid"],
    ["eval", "run", "text.txt", "--json"],
    ["generate", "run", "--length", "9"],
    ["generate", "run", "--length", "9", "--weights", "int8", "--samples", "2"],
    ["generate", "run", "--length", "9", "--state", "talk"],
    ["generate", "run", "--length", "9", "--state", "talk"],
    ["eval", "run", "--split", "valid", "--dynamic"],
    ["score", "run", "text.txt", "--top", "2"],
    ["compare", "text.txt", "--cells", "rnn", "--epochs", "1", "--json"],
    ["demo", "--minutes", "0.005", "--out", "demo"],
    ["doctor"],
    ["bench", "layers", "--cells", "rnn", "--modes", "infer", "--json"],
    *([["bench", what, "--threads", "1"] for what in workloads.KINDS]),
):
    status = main(arguments)
    assert status == 0, (arguments, status)
    assert not found, (arguments, found)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        kills(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        fuzz(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
