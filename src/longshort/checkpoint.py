"""Run directories, and which model of a directory is loaded: written whole or not at all, no PyTorch.

    RUN/
      config.json, tokenizer.json         what training was asked to do, every value resolved; sealed (documents.py)
      metrics.jsonl, timing.jsonl         values that repeat exactly, and values of the clock
      result.json                         the last figure; sealed
      best.json, latest.json              {"format_version": 1, "checkpoint": "step-000500", "step": 500}
      checkpoints/step-000500/            a model directory: `model_files.py` says what it holds

Kept are the best checkpoint, the latest, and the one before the latest, to which `resume` falls back. A checkpoint is
published before a pointer names it and deleted after none does, so the pointers always name complete ones. One process
at a time writes to a run (`Run.lock`); any number may read it meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshort.documents import HINT, json_bytes, read, read_json, read_sealed, refuse, seal, sha256
from longshort.durable import (
    append_line,
    cut_file,
    delete_file,
    has_space,
    make_directory,
    require_place,
    require_space,
    require_writable_directory,
    sync_file,
    write_directory,
    write_file,
)
from longshort.errors import CheckpointError, ConfigError, OutputError, TextError, UsageError
from longshort.model_files import (
    CONFIG,
    LIMITS,
    LOGS,
    METRICS,
    TIMING,
    TOKENIZER,
    Arrays,
    Json,
    Saved,
    Training,
    is_directory,
    load_directory,
    load_training,
    pack,
    present,
    with_training,
)

_BEST, _LATEST, _CHECKPOINTS, _RESULT = "best.json", "latest.json", "checkpoints", "result.json"
_OURS = re.compile(r"step-\d{6,}|\.step-\d{6,}\..*")  # a checkpoint, or what a killed save left of one
_LEFT = re.compile(r"\.\w+\.jsonl?\.[0-9a-f]{16}\.tmp")  # what a killed write of a file of the run left


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, from `create_run` or `open_run`. Whatever writes may raise OutputError."""

    path: Path

    def save(
        self,
        step: int,
        weights: Arrays,
        model: Json,
        tokenizer_json: str,
        extra: Json,
        *,
        best: bool,
        training: Training | None = None,
    ) -> Path:
        """Publish a checkpoint and return its directory; delete those that are no longer kept.

        A warning tells when there would be no room for another one.

        Args:
            step: number of training steps done.
            weights: float32 or float16 arrays by name.
            model: the model's configuration in JSON values, with `vocab_size`.
            tokenizer_json: content of `tokenizer.json`.
            extra: further JSON values to keep with it, under names of their own.
            best: whether it is the best so far, the one that `load_model` loads.
            training: what is needed to go on from it. How long the logs are now is kept with it.

        Raises:
            ValueError: an argument that could not be loaded again; nothing was written.
            OutputError: it cannot be written; the checkpoints that were there stay.
        """
        path = self.path / _CHECKPOINTS / _step_name(step)
        files = pack(weights, model, tokenizer_json, extra, step)
        if training is not None:
            files = with_training(files, step, training, self._log_marks())
        size = sum(len(data) for data in files.values())
        if not has_space(path.parent, size):
            self._delete_superseded(spare=False)
            require_space(path.parent, size)
        write_directory(path, files)
        for pointer in (_LATEST, _BEST) if best else (_LATEST,):
            self._point(pointer, step)
        self._delete_superseded()
        if not has_space(path.parent, size):
            needs = f"the next checkpoint needs {size / 1e6:.1f} MB"
            warnings.warn(f"The disk is nearly full: {needs}, more than is free at {path.parent}.", stacklevel=3)
        return path

    def recover(self) -> tuple[Saved, Training]:
        """Return the newest checkpoint that is whole, having verified every file of the run.

        What is damaged is named in a warning, with the checkpoint that is taken.

        Raises:
            CheckpointError: there is none, or none that is whole.
        """
        found: tuple[Saved, Training] | None = None
        problems: list[str] = []
        for pointer in (_LATEST, _BEST):
            with _noting(problems):
                if (self.path / pointer).exists() and not is_directory(path := present(_pointed(self.path, pointer))):
                    refuse(path, "it is missing")
        with _noting(problems):
            self.result()
        for number in reversed(self._steps()):
            with _noting(problems):
                whole = load_training(self.path / _CHECKPOINTS / _step_name(number))
                found = found or whole
        if found is None:
            what = (
                f"No checkpoint of {self.path} can be resumed." if problems else f"{self.path} has no checkpoint yet."
            )
            raise CheckpointError(" ".join([what, *problems]), "Start anew: longshort train")
        with _noting(problems):
            if read(self.path / TOKENIZER, LIMITS[TOKENIZER]) != found[0].tokenizer_json.encode():
                refuse(self.path / TOKENIZER, "it is not the one of the checkpoints")
        if problems:
            warnings.warn(f"{' '.join(problems)} Training goes on from {found[0].path}.", stacklevel=3)
        return found

    def rewind(self, saved: Saved, training: Training, best_step: int) -> None:
        """Bring the run back to what it was when `saved` was its latest checkpoint: pointers, logs, tokenizer.

        What a killed process was writing beside them is deleted.

        Args:
            saved: from `recover`.
            training: the same.
            best_step: the best checkpoint at that time. Where it is gone, the latest is taken for it.
        """
        step = saved.step or 0
        for entry in self.path.iterdir():
            if _LEFT.fullmatch(entry.name):
                delete_file(entry)
        self._point(_LATEST, step)
        if best_step in self._steps():
            self._point(_BEST, best_step)
        else:
            delete_file(self.path / _BEST)
        write_file(self.path / TOKENIZER, saved.tokenizer_json.encode())
        for name, mark in training.values["logs"].items():
            self._cut_log(name, mark, step)

    def result(self) -> dict[str, Any] | None:
        """Return the last figure; None where the run has none yet; CheckpointError where it is damaged."""
        return read_sealed(self.path / _RESULT) if (self.path / _RESULT).exists() else None

    def write_result(self, values: Json | None) -> None:
        """Write the last figure atomically; with None delete it, as training goes on."""
        if values is None:
            delete_file(self.path / _RESULT)
        else:
            write_file(self.path / _RESULT, seal(values))

    def write_config(self, config: Json) -> None:
        """Replace the configuration that `create_run` was given; ConfigError as there."""
        write_file(self.path / CONFIG, _sealed_config(config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run; OutputError where one does already."""
        try:
            import fcntl
        except ImportError:  # a system without
            yield
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise OutputError(f"Cannot open {self.path}: {error.strerror}.", "Look at the disk.") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "Wait for it, or stop it: it saves before it ends."
                raise OutputError(f"Another process is training {self.path}.", hint) from error
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)

    def latest(self) -> Path | None:
        """Return the checkpoint to resume from, for `load_model`, or None before the first one."""
        return _pointed(self.path, _LATEST) if (self.path / _LATEST).exists() else None

    def log_metrics(self, values: Json) -> None:
        """Append a line to metrics.jsonl; ValueError where a number is not finite."""
        append_line(self.path / METRICS, json.dumps(values, allow_nan=False))

    def log_timing(self, values: Json) -> None:
        """Append a line to timing.jsonl; ValueError where a number is not finite."""
        append_line(self.path / TIMING, json.dumps(values, allow_nan=False))

    def config(self) -> dict[str, Any]:
        """Return the configuration that `create_run` was given; CheckpointError where it is damaged."""
        content = read_sealed(self.path / CONFIG)
        del content["format_version"]
        return content

    def write_json(self, name: str, obj: Json) -> None:
        """Write the file `name` of the run atomically, with `format_version` before the values of `obj`."""
        write_file(self.path / name, json_bytes(obj))

    def _point(self, pointer: str, step: int) -> None:
        self.write_json(pointer, {"checkpoint": _step_name(step), "step": step})

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending, also of one that a killed save has set aside."""
        try:
            names = {
                entry.name.removeprefix(".").removesuffix(".old") for entry in (self.path / _CHECKPOINTS).iterdir()
            }
        except OSError:
            return []
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,18}", name))

    def _delete_superseded(self, spare: bool = True) -> None:
        """Delete what is neither best nor latest nor, with `spare`, the newest before the latest."""
        with suppress(CheckpointError, OSError):  # a pointer that cannot be read may name the best there is
            named = {name: _pointed(self.path, name) for name in (_BEST, _LATEST) if (self.path / name).exists()}
            kept = {present(path).name for path in named.values()}
            if spare and _LATEST in named:
                latest = _step_of(named[_LATEST])
                kept |= {_step_name(step) for step in [s for s in self._steps() if s < latest][-1:]}
            for entry in (self.path / _CHECKPOINTS).iterdir():
                if _OURS.fullmatch(entry.name) and entry.name not in kept:
                    _delete(entry)

    def _log_marks(self) -> dict[str, Any]:
        """Return size and hash of the logs as they are on the disk now."""
        marks = {}
        for name in LOGS:
            path, data = self.path / name, b""
            if path.exists():
                sync_file(path)
                data = path.read_bytes()
            marks[name] = {"bytes": len(data), "sha256": sha256(data)}
        return marks

    def _cut_log(self, name: str, mark: Any, step: int) -> None:
        """Leave in a log what it held when it was marked; where that is damaged, what can be read up to `step`."""
        path = self.path / name
        data = path.read_bytes() if path.exists() else b""
        if sha256(data[: mark["bytes"]]) == mark["sha256"]:
            if len(data) > mark["bytes"]:
                cut_file(path, mark["bytes"])
            return
        lines = [line for line in data.splitlines(keepends=True) if _is_of(line, step)]
        write_file(path, b"".join(lines))
        warnings.warn(f"{path} has changed since it was written; {len(lines)} of its lines were kept.", stacklevel=4)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Note what a CheckpointError says, once, and go on."""
    try:
        yield
    except CheckpointError as error:
        if error.what not in problems:
            problems.append(error.what)


def _is_of(line: bytes, step: int) -> bool:
    """Return whether `line` is a whole line of a log, of at most `step`."""
    try:
        return line.endswith(b"\n") and 0 < json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def require_new_run(path: str | Path) -> None:
    """Prove that a run can be started at `path`, before anything takes time. Leaves nothing behind.

    Raises:
        UsageError: something is there already.
        OutputError: it cannot be written.
    """
    _refuse_existing(path)
    require_place(Path(path))


def _refuse_existing(path: str | Path) -> None:
    with suppress(OSError):  # nothing there; or it may not be looked at, and then not be written either
        if Path(path).is_file() or any(Path(path).iterdir()):
            found = "is a run already" if is_run(path) else "exists and is not an empty directory"
            raise UsageError(f"{path} {found}.", "Choose another --out: nothing is overwritten.")


def create_run(path: str | Path, config: Json, tokenizer_json: str) -> Run:
    """Start a run in the directory `path`, made if missing.

    Raises:
        UsageError: something is there already.
        ConfigError: a configuration that could not be read back, such as one that names too many files.
        TextError: a vocabulary that could not be read back.
        OutputError: it cannot be written.
    """
    run, config_bytes, tokenizer = Run(Path(path)), _sealed_config(config), tokenizer_json.encode()
    if len(tokenizer) > LIMITS[TOKENIZER]:  # found now, and not when the first checkpoint is saved
        size, most = len(tokenizer) / 1e6, LIMITS[TOKENIZER] / 1e6
        raise TextError(
            f"The vocabulary of this text takes {size:,.1f} MB; at most {most:,.1f} MB are read back.",
            "Leave out rare words with a higher --min-freq, or give a lower --vocab-size.",
        )
    _refuse_existing(path)
    ours = False
    try:
        # Of several processes that start a run here at the same moment, one alone makes this directory.
        ours = make_directory(run.path / _CHECKPOINTS)
        if ours:
            write_file(run.path / TOKENIZER, tokenizer)
            write_file(run.path / CONFIG, config_bytes)  # last, as it makes the directory a run
    except BaseException:
        if ours:
            shutil.rmtree(run.path, ignore_errors=True)  # nothing was in it
        else:
            with suppress(OSError):  # it stays where something is in it
                run.path.rmdir()
        raise
    if not ours:
        raise UsageError(f"Another process has just started a run at {path}.", "Choose another --out.")
    return run


def _sealed_config(config: Json) -> bytes:
    """Return the content of a run's config.json; ConfigError where it could not be read back."""
    try:
        return seal(config)
    except ValueError as error:
        raise ConfigError(
            f"The run's config.json cannot be written: {error}.",
            "If it names very many text files, give their folder instead, or join them: cat FILES > TEXT.txt",
        ) from error


def open_run(path: str | Path) -> Run:
    """Return the run at `path`: UsageError where there is none, CheckpointError where it is damaged."""
    if not is_run(path):
        raise UsageError(f"Wanted a run directory, but {path} is none.", HINT)
    run = Run(Path(path))
    run.config()
    return run


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run directory."""
    return is_directory(Path(path) / _CHECKPOINTS) and (Path(path) / CONFIG).exists()


def save_model(
    path: str | Path, weights: Arrays, model: Json, tokenizer_json: str, extra: Json, step: int | None = None
) -> None:
    """Write a model directory atomically, also in place of another one; arguments as in `Run.save`.

    Raises:
        ValueError: an argument that could not be loaded again.
        OutputError: it cannot be written, or `path` holds files that are not a model's.
    """
    path = Path(path)
    files = pack(weights, model, tokenizer_json, extra, step)
    require_writable_directory(path.parent)
    if is_directory(path) and (others := {entry.name for entry in path.iterdir()} - files.keys()):
        raise OutputError(f"{path} holds other files too, such as {min(others)}.", "Choose another directory.")
    write_directory(path, files)


def load_model(path: str | Path) -> Saved:
    """Load a model directory, or a run's best checkpoint, else its latest.

    Every file is verified: kind, size, SHA-256, format, and that the tokenizer is the model's own. Where the
    best checkpoint of a run is damaged, the latest one is loaded and a warning says so.

    Raises:
        UsageError: `path` is not a directory.
        CheckpointError: there is no model in it, or none that is whole, or a newer longshort made it.
    """
    path = Path(path)
    if is_run(path):
        return _load_run(path)
    if not is_directory(present(path)):
        problem = "is not a directory"
        try:
            path.stat()
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})".lower()
        raise UsageError(f"Wanted a run or model directory, but {path} {problem}.", HINT)
    return load_directory(path)


def _load_run(path: Path) -> Saved:
    run, saved = Run(path), None
    problems: list[str] = []
    pointers = [name for name in (_BEST, _LATEST) if (path / name).exists()]
    for pointer in pointers:
        with _noting(problems):
            saved = saved or _follow(path, pointer)
    for number in reversed(run._steps()) if saved is None else ():
        with _noting(problems):
            saved = saved or load_directory(path / _CHECKPOINTS / _step_name(number))
    if saved is None and not problems:
        raise CheckpointError(f"{path} has no checkpoint yet.", "Train until the first one is saved.")
    if saved is None:
        raise CheckpointError(f"No checkpoint of {path} can be loaded. {' '.join(problems)}", HINT)
    if problems:
        warnings.warn(f"{' '.join(problems)} Loaded {saved.path} instead.", stacklevel=3)
    return saved


def _follow(run: Path, pointer: str) -> Saved:
    while True:
        checkpoint = _pointed(run, pointer)
        try:
            return load_directory(checkpoint)
        except CheckpointError:  # where training goes on meanwhile, it may have moved the pointer and deleted it
            if _pointed(run, pointer) == checkpoint:
                raise


def _pointed(run: Path, pointer: str) -> Path:
    """Return the checkpoint that `pointer` names, and names twice, so that a flipped bit shows."""
    content = read_json(run / pointer)
    step = content.get("step")
    if type(step) is not int or content.get("checkpoint") != _step_name(step):
        refuse(run / pointer, "it names no checkpoint")
    return run / _CHECKPOINTS / _step_name(step)


def _delete(directory: Path) -> None:
    """Delete a checkpoint under a name that nobody takes for one, should a part of it stay."""
    gone = directory if directory.name.startswith(".") else directory.with_name(f".{directory.name}.gone")
    if gone != directory:
        directory.rename(gone)
    for _ in range(2):  # what fails once may not fail again; what stays goes with the next checkpoint
        shutil.rmtree(gone, ignore_errors=True)


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
