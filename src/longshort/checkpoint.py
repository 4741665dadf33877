"""Run and model directories: written whole or not at all, verified when read, never pickle, no PyTorch.

    RUN/
      config.json, tokenizer.json         what training was asked to do, every value resolved; sealed (documents.py)
      metrics.jsonl, timing.jsonl         values that repeat exactly, and values of the clock
      result.json                         the last figure; sealed
      best.json, latest.json              {"format_version": 1, "checkpoint": "step-000500", "step": 500}
      checkpoints/step-000500/            a model directory:
          model.safetensors               weights by name, float32 or float16
          config.json, tokenizer.json     the model's sizes and figures; text to ids
          training.safetensors, .json     what only `resume` reads: optimizer, random numbers, position, logs' lengths
          MANIFEST.json                   size and SHA-256 of these

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from longshort import __version__
from longshort.documents import FORMAT_VERSION as FORMAT_VERSION
from longshort.documents import HINT, JSON_LIMIT, json_bytes, parse, read, read_json, read_sealed, refuse, seal, sha256
from longshort.durable import (
    append_line,
    cut_file,
    delete_file,
    has_space,
    require_space,
    require_writable_directory,
    set_aside,
    sync_file,
    write_directory,
    write_file,
)
from longshort.errors import CheckpointError, OutputError, UsageError

_BEST, _LATEST, _CHECKPOINTS, _RESULT = "best.json", "latest.json", "checkpoints", "result.json"
_LOGS = _METRICS, _TIMING = "metrics.jsonl", "timing.jsonl"
_WEIGHTS, _CONFIG, _TOKENIZER, _MANIFEST = "model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json"
_STATE, _POSITION = "training.safetensors", "training.json"
_OF_MODELS = (_WEIGHTS, _CONFIG, _TOKENIZER)
_LIMITS = {_WEIGHTS: 1 << 40, _CONFIG: JSON_LIMIT, _TOKENIZER: 64 << 20, _STATE: 1 << 40, _POSITION: JSON_LIMIT}
"""The files that a manifest names (the last two in a run's checkpoints), each with the most bytes read of it."""
_OURS = re.compile(r"step-\d{6,}|\.step-\d{6,}\..*")  # a checkpoint, or what a killed save left of one
_LEFT = re.compile(r"\.\w+\.jsonl?\.[0-9a-f]{16}\.tmp")  # what a killed write of a file of the run left

Json = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a model directory holds, verified. Whether the weights are finite is not looked at."""

    path: Path
    weights: dict[str, NDArray[np.float32]]
    model: dict[str, Any]
    tokenizer_json: str
    step: int | None
    extra: dict[str, Any]
    """Further keys of the configuration, such as a held-out figure."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a checkpoint holds beside the model, so that training can go on from it. Nothing else reads it."""

    arrays: dict[str, NDArray[Any]]
    """By name, float32 or uint8: the optimizer's, the random generator's, the carried state."""
    values: dict[str, Any]
    """JSON values."""


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
        files = _pack(weights, model, tokenizer_json, extra, step)
        if training is not None:
            files = _with_training(files, step, training, self._log_marks())
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
                if (self.path / pointer).exists() and not _is_directory(path := _present(_pointed(self.path, pointer))):
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
            if read(self.path / _TOKENIZER, _LIMITS[_TOKENIZER]) != found[0].tokenizer_json.encode():
                refuse(self.path / _TOKENIZER, "it is not the one of the checkpoints")
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
        write_file(self.path / _TOKENIZER, saved.tokenizer_json.encode())
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
        """Replace the configuration that `create_run` was given."""
        write_file(self.path / _CONFIG, seal(config))

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
        append_line(self.path / _METRICS, json.dumps(values, allow_nan=False))

    def log_timing(self, values: Json) -> None:
        """Append a line to timing.jsonl; ValueError where a number is not finite."""
        append_line(self.path / _TIMING, json.dumps(values, allow_nan=False))

    def config(self) -> dict[str, Any]:
        """Return the configuration that `create_run` was given; CheckpointError where it is damaged."""
        content = read_sealed(self.path / _CONFIG)
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
            kept = {_present(path).name for path in named.values()}
            if spare and _LATEST in named:
                latest = _step_of(named[_LATEST])
                kept |= {_step_name(step) for step in [s for s in self._steps() if s < latest][-1:]}
            for entry in (self.path / _CHECKPOINTS).iterdir():
                if _OURS.fullmatch(entry.name) and entry.name not in kept:
                    _delete(entry)

    def _log_marks(self) -> dict[str, Any]:
        """Return size and hash of the logs as they are on the disk now."""
        marks = {}
        for name in _LOGS:
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
    checkpoints = Path(path) / _CHECKPOINTS
    made = [directory for directory in (checkpoints, *checkpoints.parents) if not directory.exists()]
    require_writable_directory(checkpoints)
    for directory in made:
        directory.rmdir()


def _refuse_existing(path: str | Path) -> None:
    with suppress(OSError):  # nothing there; or it may not be looked at, and then not be written either
        if Path(path).is_file() or any(Path(path).iterdir()):
            found = "is a run already" if is_run(path) else "exists and is not an empty directory"
            raise UsageError(f"{path} {found}.", "Choose another --out: nothing is overwritten.")


def create_run(path: str | Path, config: Json, tokenizer_json: str) -> Run:
    """Start a run in the directory `path`, made if missing.

    Raises:
        UsageError: something is there already.
        OutputError: it cannot be written.
    """
    run, config_bytes = Run(Path(path)), seal(config)
    _refuse_existing(path)
    try:
        require_writable_directory(run.path / _CHECKPOINTS)
        write_file(run.path / _TOKENIZER, tokenizer_json.encode())
        write_file(run.path / _CONFIG, config_bytes)  # last, as it makes the directory a run
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)  # nothing was in it
        raise
    return run


def open_run(path: str | Path) -> Run:
    """Return the run at `path`: UsageError where there is none, CheckpointError where it is damaged."""
    if not is_run(path):
        raise UsageError(f"Wanted a run directory, but {path} is none.", HINT)
    run = Run(Path(path))
    run.config()
    return run


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run directory."""
    return _is_directory(Path(path) / _CHECKPOINTS) and (Path(path) / _CONFIG).exists()


def save_model(
    path: str | Path, weights: Arrays, model: Json, tokenizer_json: str, extra: Json, step: int | None = None
) -> None:
    """Write a model directory atomically, also in place of another one; arguments as in `Run.save`.

    Raises:
        ValueError: an argument that could not be loaded again.
        OutputError: it cannot be written, or `path` holds files that are not a model's.
    """
    path = Path(path)
    files = _pack(weights, model, tokenizer_json, extra, step)
    require_writable_directory(path.parent)
    if _is_directory(path) and (others := {entry.name for entry in path.iterdir()} - files.keys()):
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
    if not _is_directory(_present(path)):
        problem = "is not a directory"
        try:
            path.stat()
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})".lower()
        raise UsageError(f"Wanted a run or model directory, but {path} {problem}.", HINT)
    return _load_directory(path)


def load_training(path: Path) -> tuple[Saved, Training]:
    """Load the checkpoint `path` of a run with all that training needs, every file verified.

    Raises:
        CheckpointError: it is damaged, or holds a model alone.
    """
    path = _present(path)
    saved, entries = _load_directory(path), read_json(path / _MANIFEST)["files"]
    if _STATE not in entries:
        raise CheckpointError(f"{path} holds a model alone.", "To train on from it: longshort train TEXT --from MODEL")
    values = parse(_read_verified(path / _POSITION, entries[_POSITION]), path / _POSITION)
    if values.get("step") != saved.step or not _are_marks(values.get("logs")):
        refuse(path / _POSITION, "it does not belong to the model")
    data = _read_verified(path / _STATE, entries[_STATE])
    return saved, Training(decode_arrays(data, path / _STATE, (np.float32, np.uint8)), values)


def _are_marks(logs: Any) -> bool:
    return (
        isinstance(logs, dict)
        and logs.keys() == {*_LOGS}
        and all(
            isinstance(mark, dict)
            and type(mark.get("bytes")) is int
            and mark["bytes"] >= 0
            and isinstance(mark.get("sha256"), str)
            for mark in logs.values()
        )
    )


def _load_run(path: Path) -> Saved:
    run, saved = Run(path), None
    problems: list[str] = []
    pointers = [name for name in (_BEST, _LATEST) if (path / name).exists()]
    for pointer in pointers:
        with _noting(problems):
            saved = saved or _follow(path, pointer)
    for number in reversed(run._steps()) if saved is None else ():
        with _noting(problems):
            saved = saved or _load_directory(path / _CHECKPOINTS / _step_name(number))
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
            return _load_directory(checkpoint)
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


def _present(path: Path) -> Path:
    """Return `path`, or where the old directory lies if a save was killed while it replaced it."""
    return set_aside(path) if not _is_directory(path) and _is_directory(set_aside(path)) else path


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as a parent that may not be entered
        return False


def _pack(weights: Arrays, model: Json, tokenizer_json: str, extra: Json, step: int | None) -> dict[str, bytes]:
    """Return the files of a model directory, the manifest last."""
    for name, array in weights.items():
        if name == "__metadata__" or array.dtype not in (np.float32, np.float16):
            raise ValueError(f"weights are named float32 or float16 arrays, but {name!r} is {array.dtype}")
    tokenizer = tokenizer_json.encode()
    config = {
        "format_version": FORMAT_VERSION,
        "model_type": "longshort",
        "longshort_version": __version__,
        "model": dict(model),
        "vocab_size": model.get("vocab_size"),
        "tokenizer_sha256": sha256(tokenizer),
        "step": step,
    }
    if taken := config.keys() & extra.keys():
        raise ValueError(f"extra may not hold {', '.join(sorted(taken))}")
    files = {
        _WEIGHTS: encode_arrays(weights),
        _CONFIG: json_bytes({**config, **extra}),
        _TOKENIZER: tokenizer,
    }
    if len(tokenizer) > _LIMITS[_TOKENIZER]:
        raise ValueError(f"tokenizer_json has {len(tokenizer)} bytes, more than {_LIMITS[_TOKENIZER]}")
    try:  # by the reader's rules, as what cannot be loaded again must fail now
        _check_config(parse(files[_CONFIG], Path(_CONFIG)), tokenizer, Path())
    except CheckpointError as error:
        raise ValueError(f"this could not be loaded again: {error.what}") from error
    return _with_manifest(files)


def _with_training(files: Mapping[str, bytes], step: int, training: Training, logs: Json) -> dict[str, bytes]:
    """Return the files of a checkpoint that training can go on from."""
    position = json_bytes({"step": step, "logs": logs, **training.values})
    more = {_STATE: encode_arrays(training.arrays), _POSITION: position}
    return _with_manifest({name: files[name] for name in _OF_MODELS} | more)


def _with_manifest(files: Mapping[str, bytes]) -> dict[str, bytes]:
    entries = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    return {**files, _MANIFEST: json_bytes({"files": entries})}


def _load_directory(directory: Path) -> Saved:
    directory = _present(directory)
    entries = read_json(directory / _MANIFEST).get("files")
    if not isinstance(entries, dict) or entries.keys() not in ({*_OF_MODELS}, _LIMITS.keys()):
        refuse(directory / _MANIFEST, f"it does not name exactly {', '.join(_OF_MODELS)}, or these and training's")
    files = {name: _read_verified(directory / name, entries[name]) for name in (_CONFIG, _TOKENIZER, _WEIGHTS)}
    config = parse(files[_CONFIG], directory / _CONFIG)
    try:
        tokenizer_json = files[_TOKENIZER].decode()
    except UnicodeDecodeError as error:
        refuse(directory / _TOKENIZER, "it is not UTF-8", error)
    _check_config(config, files[_TOKENIZER], directory)
    model, step = config.pop("model"), config.pop("step")
    for key in ("format_version", "model_type", "longshort_version", "vocab_size", "tokenizer_sha256"):
        config.pop(key, None)
    weights = _decode_weights(files.pop(_WEIGHTS), directory / _WEIGHTS)
    return Saved(directory, weights, model, tokenizer_json, step, config)


def _check_config(config: dict[str, Any], tokenizer: bytes, directory: Path) -> None:
    model, size, step = config.get("model"), config.get("vocab_size"), config.get("step", -1)
    if config.get("model_type") != "longshort" or not isinstance(model, dict):
        refuse(directory / _CONFIG, "it describes no longshort model")
    fewest = 0 if "labels" in model else 1  # what labels sequences may read vectors
    if type(size) is not int or size < fewest or model.get("vocab_size") != size:
        refuse(directory / _CONFIG, "vocab_size is missing, or not the one inside model")
    if step is not None and (type(step) is not int or step < 0):
        refuse(directory / _CONFIG, "step is not a number of steps")
    if config.get("tokenizer_sha256") != sha256(tokenizer):
        refuse(directory / _TOKENIZER, "it is not the tokenizer that the model was trained with")


def encode_arrays(arrays: Arrays) -> bytes:
    """Return arrays by name as the bytes of a safetensors file."""
    # safetensors reads an array's memory from its start on: a transposed view must be copied first.
    return safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})


def _decode_weights(data: bytes, source: Path) -> dict[str, NDArray[np.float32]]:
    arrays = decode_arrays(data, source, (np.float32, np.float16))
    return {name: np.require(array, np.float32, ["C", "A", "W"]) for name, array in arrays.items()}


def decode_arrays(data: bytes, source: Path, allowed: tuple[Any, ...]) -> dict[str, NDArray[Any]]:
    """Return the arrays in the bytes of a safetensors file; CheckpointError where they hold others than `allowed`."""
    try:
        arrays = safetensors.numpy.load(data)
    except Exception as error:  # whatever the parser says of bytes that anyone may have made
        refuse(source, f"{error!s:.200}", error)
    for name, array in arrays.items():
        if array.dtype not in allowed:
            names = " or ".join(np.dtype(each).name for each in allowed)
            refuse(source, f"{name!r:.80} is {array.dtype}, not {names}")
    return arrays


def _read_verified(path: Path, entry: Any) -> bytes:
    """Return the content of a file if its size and hash are those of `entry`, its part of the manifest."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if type(size) is not int:
        refuse(path.with_name(_MANIFEST), f"it has no size for {path.name}")
    data = read(path, min(size, _LIMITS[path.name]))
    if len(data) != size or sha256(data) != entry.get("sha256"):
        refuse(path, f"it is not the file that {_MANIFEST} describes")
    return data
