"""Run and model directories: written whole or not at all, verified when read, never pickle, no PyTorch.

    RUN/
      config.json, tokenizer.json         what training was asked to do, every value resolved
      metrics.jsonl, timing.jsonl         values that repeat exactly, and values of the clock
      best.json, latest.json              {"format_version": 1, "checkpoint": "step-000500", "step": 500}
      checkpoints/step-000500/            a model directory:
          model.safetensors               weights by name, float32 or float16
          config.json, tokenizer.json     the model's sizes and figures; text to ids
          MANIFEST.json                   size and SHA-256 of these three

A checkpoint is published before a pointer names it and deleted after none does, so the pointers always name
complete ones. One process at a time writes to a run; any number may read it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from longshort import __version__
from longshort.durable import append_line, require_writable_directory, set_aside, write_directory, write_file
from longshort.errors import CheckpointError, OutputError, UsageError

FORMAT_VERSION = 1
_BEST, _LATEST, _CHECKPOINTS = "best.json", "latest.json", "checkpoints"
_WEIGHTS, _CONFIG, _TOKENIZER, _MANIFEST = "model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json"
_JSON_LIMIT = 1 << 20
_LIMITS = {_WEIGHTS: 1 << 40, _CONFIG: _JSON_LIMIT, _TOKENIZER: 64 << 20}
"""The files that a manifest names, each with the most bytes that are read of it."""
_OURS = re.compile(r"step-\d{6,}|\.step-\d{6,}\..*")  # a checkpoint, or what a killed save left of one
_HINT = "Give another checkpoint, or the directory that `longshort train --out` wrote."

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
class Run:
    """A run directory, from `create_run` or `open_run`. Whatever writes may raise OutputError."""

    path: Path

    def save(self, step: int, weights: Arrays, model: Json, tokenizer_json: str, extra: Json, *, best: bool) -> Path:
        """Publish a checkpoint and return its directory; delete those that are neither best nor latest.

        Args:
            step: number of training steps done.
            weights: float32 or float16 arrays by name.
            model: the model's configuration in JSON values, with `vocab_size`.
            tokenizer_json: content of `tokenizer.json`.
            extra: further JSON values to keep with it, under names of their own.
            best: whether it is the best so far, the one that `load_model` loads.

        Raises:
            ValueError: an argument that could not be loaded again; nothing was written.
        """
        name = _step_name(step)
        path = self.path / _CHECKPOINTS / name
        write_directory(path, _pack(weights, model, tokenizer_json, extra, step))
        for pointer in (_LATEST, _BEST) if best else (_LATEST,):
            self.write_json(pointer, {"checkpoint": name, "step": step})
        self._delete_superseded()
        return path

    def latest(self) -> Path | None:
        """Return the checkpoint to resume from, for `load_model`, or None before the first one."""
        return _pointed(self.path, _LATEST) if (self.path / _LATEST).exists() else None

    def log_metrics(self, values: Json) -> None:
        """Append a line to metrics.jsonl; ValueError where a number is not finite."""
        append_line(self.path / "metrics.jsonl", json.dumps(values, allow_nan=False))

    def log_timing(self, values: Json) -> None:
        """Append a line to timing.jsonl; ValueError where a number is not finite."""
        append_line(self.path / "timing.jsonl", json.dumps(values, allow_nan=False))

    def config(self) -> dict[str, Any]:
        """Return the configuration that `create_run` was given; CheckpointError where it is damaged."""
        content = _read_json(self.path / _CONFIG)
        del content["format_version"]
        return content

    def write_json(self, name: str, obj: Json) -> None:
        """Write the file `name` of the run atomically, with `format_version` before the values of `obj`."""
        write_file(self.path / name, _json_bytes(obj))

    def _delete_superseded(self) -> None:
        with suppress(CheckpointError, OSError):  # a pointer that cannot be read may name the best there is
            pointers = [name for name in (_BEST, _LATEST) if (self.path / name).exists()]
            kept = {_present(_pointed(self.path, name)).name for name in pointers}
            for entry in (self.path / _CHECKPOINTS).iterdir():
                if _OURS.fullmatch(entry.name) and entry.name not in kept:
                    shutil.rmtree(entry, ignore_errors=True)


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
    run, config_bytes = Run(Path(path)), _json_bytes(config)
    _refuse_existing(path)
    require_writable_directory(run.path / _CHECKPOINTS)
    write_file(run.path / _TOKENIZER, tokenizer_json.encode())
    write_file(run.path / _CONFIG, config_bytes)  # last, as it makes the directory a run
    return run


def open_run(path: str | Path) -> Run:
    """Return the run at `path`: UsageError where there is none, CheckpointError where it is damaged."""
    if not is_run(path):
        raise UsageError(f"Wanted a run directory, but {path} is none.", _HINT)
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
        raise UsageError(f"Wanted a run or model directory, but {path} {problem}.", _HINT)
    return _load_directory(path)


def _load_run(run: Path) -> Saved:
    pointers = [name for name in (_BEST, _LATEST) if (run / name).exists()]
    if not pointers:
        raise CheckpointError(f"{run} has no checkpoint yet.", "Train until the first one is saved.")
    problems: dict[str, None] = {}  # each once, in order: both pointers may name the same checkpoint
    for pointer in pointers:
        try:
            saved = _follow(run, pointer)
        except CheckpointError as error:
            problems[error.what] = None
            continue
        if problems:
            warnings.warn(f"{' '.join(problems)} Loaded {saved.path} instead.", stacklevel=3)
        return saved
    raise CheckpointError(f"No checkpoint of {run} can be loaded. {' '.join(problems)}", _HINT)


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
    content = _read_json(run / pointer)
    step = content.get("step")
    if type(step) is not int or content.get("checkpoint") != _step_name(step):
        _refuse(run / pointer, "it names no checkpoint")
    return run / _CHECKPOINTS / _step_name(step)


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


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
        "tokenizer_sha256": _sha256(tokenizer),
        "step": step,
    }
    if taken := config.keys() & extra.keys():
        raise ValueError(f"extra may not hold {', '.join(sorted(taken))}")
    files = {
        # safetensors reads an array's memory from its start on: a transposed view must be copied first.
        _WEIGHTS: safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in weights.items()}),
        _CONFIG: _json_bytes({**config, **extra}),
        _TOKENIZER: tokenizer,
    }
    if len(tokenizer) > _LIMITS[_TOKENIZER]:
        raise ValueError(f"tokenizer_json has {len(tokenizer)} bytes, more than {_LIMITS[_TOKENIZER]}")
    try:  # by the reader's rules, as what cannot be loaded again must fail now
        _check_config(_parse(files[_CONFIG], Path(_CONFIG)), tokenizer, Path())
    except CheckpointError as error:
        raise ValueError(f"this could not be loaded again: {error.what}") from error
    entries = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()}
    return {**files, _MANIFEST: _json_bytes({"files": entries})}


def _load_directory(directory: Path) -> Saved:
    directory = _present(directory)
    entries = _read_json(directory / _MANIFEST).get("files")
    if not isinstance(entries, dict) or entries.keys() != _LIMITS.keys():
        _refuse(directory / _MANIFEST, f"it does not name exactly {', '.join(_LIMITS)}")
    files = {name: _read_verified(directory / name, entries[name]) for name in (_CONFIG, _TOKENIZER, _WEIGHTS)}
    config = _parse(files[_CONFIG], directory / _CONFIG)
    _check_config(config, files[_TOKENIZER], directory)
    model, step = config.pop("model"), config.pop("step")
    for key in ("format_version", "model_type", "longshort_version", "vocab_size", "tokenizer_sha256"):
        config.pop(key, None)
    weights = _decode_weights(files.pop(_WEIGHTS), directory / _WEIGHTS)
    return Saved(directory, weights, model, files[_TOKENIZER].decode(), step, config)


def _check_config(config: dict[str, Any], tokenizer: bytes, directory: Path) -> None:
    model, size, step = config.get("model"), config.get("vocab_size"), config.get("step", -1)
    if config.get("model_type") != "longshort" or not isinstance(model, dict):
        _refuse(directory / _CONFIG, "it describes no longshort model")
    if type(size) is not int or size < 1 or model.get("vocab_size") != size:
        _refuse(directory / _CONFIG, "vocab_size is missing, or not the one inside model")
    if step is not None and (type(step) is not int or step < 0):
        _refuse(directory / _CONFIG, "step is not a number of steps")
    if config.get("tokenizer_sha256") != _sha256(tokenizer):
        _refuse(directory / _TOKENIZER, "it is not the tokenizer that the model was trained with")


def _decode_weights(data: bytes, source: Path) -> dict[str, NDArray[np.float32]]:
    try:
        arrays = safetensors.numpy.load(data)
    except Exception as error:  # whatever the parser says of bytes that anyone may have made
        _refuse(source, f"{error!s:.200}", error)
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float16):
            _refuse(source, f"{name!r:.80} is {array.dtype}, not float32 or float16")
        arrays[name] = np.require(array, np.float32, ["C", "A", "W"])
    return arrays


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_verified(path: Path, entry: Any) -> bytes:
    """Return the content of a file if its size and hash are those of `entry`, its part of the manifest."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if type(size) is not int:
        _refuse(path.with_name(_MANIFEST), f"it has no size for {path.name}")
    data = _read(path, min(size, _LIMITS[path.name]))
    if len(data) != size or _sha256(data) != entry.get("sha256"):
        _refuse(path, f"it is not the file that {_MANIFEST} describes")
    return data


def _read(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    try:
        status = path.stat()  # before opening: a FIFO would wait for a writer, a huge file fill the memory
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "it is not a regular file")
        if status.st_size > limit:
            _refuse(path, f"it has {status.st_size} bytes, more than {limit}")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except (OSError, MemoryError) as error:
        reason = (getattr(error, "strerror", None) or "it does not fit in memory").lower()
        raise CheckpointError(f"Cannot read {path}: {reason}.", _HINT) from error


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(_read(path, _JSON_LIMIT), path)


def _parse(data: bytes, source: Path) -> dict[str, Any]:
    """Return the JSON object in `data`, which anyone may have made, if it is of the format read here."""
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        _refuse(source, "it is nested too deeply", error)
    except ValueError as error:
        _refuse(source, f"{error!s:.200}", error)
    if not isinstance(content, dict):
        _refuse(source, "it is not a JSON object")
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        _refuse(source, "it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{source} was made by a newer longshort.", "Upgrade with: pip install -U longshort")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal:.40} is not a finite number")
    return value


def _json_bytes(content: Json) -> bytes:
    versioned = {"format_version": FORMAT_VERSION, **content} | {"format_version": FORMAT_VERSION}
    data = (json.dumps(versioned, indent=2, allow_nan=False) + "\n").encode()
    if len(data) > _JSON_LIMIT:
        raise ValueError(f"{len(data)} bytes of JSON, more than the {_JSON_LIMIT} that are read back")
    return data


def _refuse(source: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{source} is damaged: {reason}.", _HINT) from cause
