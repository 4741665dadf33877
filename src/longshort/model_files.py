"""The files of a model directory: packed, sealed by a manifest, verified when read. Never pickle, no PyTorch.

model.safetensors               weights by name, float32 or float16
config.json, tokenizer.json     the model's sizes and figures; text to ids
training.safetensors, .json     what only `resume` reads: optimizer, random numbers, position, logs' lengths
MANIFEST.json                   size and SHA-256 of these
README.md                       the card of a model that is handed on; for people, who may change it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from longshort import __version__
from longshort.documents import FORMAT_VERSION, JSON_LIMIT, json_bytes, parse, read, read_json, refuse, sha256
from longshort.durable import set_aside
from longshort.errors import CheckpointError

LOGS = METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
WEIGHTS, CONFIG, TOKENIZER, MANIFEST = "model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json"
CARD = "README.md"
STATE, POSITION = "training.safetensors", "training.json"
OF_MODELS = (WEIGHTS, CONFIG, TOKENIZER)
LIMITS = {WEIGHTS: 1 << 40, CONFIG: JSON_LIMIT, TOKENIZER: 256 << 20, STATE: 1 << 40, POSITION: JSON_LIMIT}
"""The files that a manifest names (the last two in a run's checkpoints), each with the most bytes read of it.

A million words, the most that a vocabulary has, fit with 40 letters each, a letter that is not ASCII in 6 bytes.
"""

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


def pack(weights: Arrays, model: Json, tokenizer_json: str, extra: Json, step: int | None) -> dict[str, bytes]:
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
        WEIGHTS: encode_arrays(weights),
        CONFIG: json_bytes({**config, **extra}),
        TOKENIZER: tokenizer,
    }
    if len(tokenizer) > LIMITS[TOKENIZER]:
        raise ValueError(f"tokenizer_json has {len(tokenizer)} bytes, more than {LIMITS[TOKENIZER]}")
    try:  # by the reader's rules, as what cannot be loaded again must fail now
        _check_config(parse(files[CONFIG], Path(CONFIG)), tokenizer, Path())
    except CheckpointError as error:
        raise ValueError(f"this could not be loaded again: {error.what}") from error
    return _with_manifest(files)


def with_training(files: Mapping[str, bytes], step: int, training: Training, logs: Json) -> dict[str, bytes]:
    """Return the files of a checkpoint that training can go on from."""
    position = json_bytes({"step": step, "logs": logs, **training.values})
    more = {STATE: encode_arrays(training.arrays), POSITION: position}
    return _with_manifest({name: files[name] for name in OF_MODELS} | more)


def _with_manifest(files: Mapping[str, bytes]) -> dict[str, bytes]:
    entries = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    return {**files, MANIFEST: json_bytes({"files": entries})}


def load_directory(directory: Path) -> Saved:
    """Load the model directory `directory`, every file verified; CheckpointError where it is damaged."""
    directory = present(directory)
    entries = read_json(directory / MANIFEST).get("files")
    if not isinstance(entries, dict) or entries.keys() not in ({*OF_MODELS}, LIMITS.keys()):
        refuse(directory / MANIFEST, f"it does not name exactly {', '.join(OF_MODELS)}, or these and training's")
    files = {name: _read_verified(directory / name, entries[name]) for name in (CONFIG, TOKENIZER, WEIGHTS)}
    config = parse(files[CONFIG], directory / CONFIG)
    try:
        tokenizer_json = files[TOKENIZER].decode()
    except UnicodeDecodeError as error:
        refuse(directory / TOKENIZER, "it is not UTF-8", error)
    _check_config(config, files[TOKENIZER], directory)
    model, step = config.pop("model"), config.pop("step")
    for key in ("format_version", "model_type", "longshort_version", "vocab_size", "tokenizer_sha256"):
        config.pop(key, None)
    weights = _decode_weights(files.pop(WEIGHTS), directory / WEIGHTS)
    return Saved(directory, weights, model, tokenizer_json, step, config)


def load_training(path: Path) -> tuple[Saved, Training]:
    """Load the checkpoint `path` of a run with all that training needs, every file verified.

    Raises:
        CheckpointError: it is damaged, or holds a model alone.
    """
    path = present(path)
    saved, entries = load_directory(path), read_json(path / MANIFEST)["files"]
    if STATE not in entries:
        raise CheckpointError(f"{path} holds a model alone.", "To train on from it: longshort train TEXT --from MODEL")
    values = parse(_read_verified(path / POSITION, entries[POSITION]), path / POSITION)
    if values.get("step") != saved.step or not _are_marks(values.get("logs")):
        refuse(path / POSITION, "it does not belong to the model")
    data = _read_verified(path / STATE, entries[STATE])
    return saved, Training(decode_arrays(data, path / STATE, (np.float32, np.uint8)), values)


def _are_marks(logs: Any) -> bool:
    return (
        isinstance(logs, dict)
        and logs.keys() == {*LOGS}
        and all(
            isinstance(mark, dict)
            and type(mark.get("bytes")) is int
            and mark["bytes"] >= 0
            and isinstance(mark.get("sha256"), str)
            for mark in logs.values()
        )
    )


def _check_config(config: dict[str, Any], tokenizer: bytes, directory: Path) -> None:
    model, size, step = config.get("model"), config.get("vocab_size"), config.get("step", -1)
    if config.get("model_type") != "longshort" or not isinstance(model, dict):
        refuse(directory / CONFIG, "it describes no longshort model")
    fewest = 0 if "labels" in model else 1  # what labels sequences may read vectors
    if type(size) is not int or size < fewest or model.get("vocab_size") != size:
        refuse(directory / CONFIG, "vocab_size is missing, or not the one inside model")
    if step is not None and (type(step) is not int or step < 0):
        refuse(directory / CONFIG, "step is not a number of steps")
    if config.get("tokenizer_sha256") != sha256(tokenizer):
        refuse(directory / TOKENIZER, "it is not the tokenizer that the model was trained with")


def _read_verified(path: Path, entry: Any) -> bytes:
    """Return the content of a file if its size and hash are those of `entry`, its part of the manifest."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if type(size) is not int:
        refuse(path.with_name(MANIFEST), f"it has no size for {path.name}")
    data = read(path, min(size, LIMITS[path.name]))
    if len(data) != size or sha256(data) != entry.get("sha256"):
        refuse(path, f"it is not the file that {MANIFEST} describes")
    return data


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


def present(path: Path) -> Path:
    """Return `path`, or where the old directory lies if a save was killed while it replaced it."""
    return set_aside(path) if not is_directory(path) and is_directory(set_aside(path)) else path


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory that may be looked at."""
    try:
        return path.is_dir()
    except OSError:  # such as a parent that may not be entered
        return False
