"""A trained model as a directory to hand on: weights, tokenizer and checksums, and a card that says what it is."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort import checkpoint, durable
from longshort.config import LabelModelConfig, ModelConfig, is_own_cell
from longshort.errors import ConfigError, OutputError, UsageError
from longshort.model_files import CARD, Saved, pack
from longshort.text import tokenizers

_KNOWN = "card"
"""The key of the configuration that keeps what a card says beside what the files tell."""
_SYMBOLS = {"char": "characters", "byte": "bytes", "word": "words", "bpe": "pieces of words"}
_READS = {"text": "texts", "words": "lists of words", "ids": "sequences of symbols", "vectors": "series of vectors"}


def publish(path: str | Path, out: str | Path, *, weights: str = "float32") -> Path:
    """Write the model of a run, or of a model directory, as a directory of its own with a card, `README.md`.

    Args:
        path: a run, whose best checkpoint is taken, or a model directory.
        out: the directory, which must not be there yet.
        weights: as they are written: float32, or float16, half as large. A model computes with float32 after either.

    Returns:
        `out`.

    Raises:
        UsageError: there is nothing at `path`, or a weight is too large for float16.
        CheckpointError: it is damaged.
        OutputError: there is something at `out`, or it cannot be written.
    """
    if weights not in ("float32", "float16"):
        raise ConfigError(f"weights must be float32 or float16, not {weights!r}.")
    saved, out = checkpoint.load_model(path), Path(out)
    if os.path.lexists(out):  # whose card somebody may have changed
        raise OutputError(f"{out} is there already.", "Choose another directory, or delete it.")
    durable.require_writable_directory(out.parent)
    arrays: dict[str, NDArray[Any]] = {**saved.weights}
    if weights == "float16":
        for name, array in saved.weights.items():
            if (np.abs(array) > np.finfo(np.float16).max).any():
                raise UsageError(f"A weight of {name} is beyond 65,504, the largest of float16.", "Write float32.")
            arrays[name] = array.astype(np.float16)
    run = checkpoint.open_run(path) if checkpoint.is_run(Path(path)) else None
    known = _known(saved) if run is None else _training(saved, run)
    if weights == "float16":
        known["rounded"] = "to float16"
    text = card(saved, out.resolve().name, known, weights)
    files = pack(arrays, saved.model, saved.tokenizer_json, {**saved.extra, _KNOWN: known}, saved.step)
    durable.write_directory(out, {CARD: text.encode(), **files})
    return out


def card(saved: Saved, name: str, known: Mapping[str, str], weights: str = "float32") -> str:
    """Return the card of a model: Markdown below the few lines of YAML that model hubs read.

    Args:
        saved: the model.
        name: of the directory that the card lies in.
        known: what its files do not tell: how it was trained, how well it does.
        weights: the type in which they are written.
    """
    labels = "labels" in saved.model
    config: ModelConfig | LabelModelConfig = (LabelModelConfig if labels else ModelConfig).from_dict(saved.model)
    facts = {**_facts(saved, config, weights), **known}
    table = "\n".join(f"| {fact} | {_cell(value)} |" for fact, value in facts.items())
    task = "text-classification" if labels else "text-generation"
    return f"""---
library_name: longshort
pipeline_tag: {task}
---

# {_cell(name)}

{_sentence(config)}

| | |
|---|---|
{table}

## Use

{_use(config, name)}

## Limits

{_limits(config)}
"""


def _cell(value: str) -> str:
    """Return a value as it may stand in a table, whatever a text was called."""
    return re.sub(r"[\x00-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", value).replace("|", "\\|")


def _sentence(config: ModelConfig | LabelModelConfig) -> str:
    kind = "recurrent net" if is_own_cell(config.cell) else config.cell.upper().removesuffix("_RELU")
    if isinstance(config, ModelConfig):
        return f"A small {kind} that predicts the next symbol of a text, made with longshort."
    each = "each step of " if config.per_step else ""
    return f"A small {kind} that labels {each}{_READS[config.reads]}, made with longshort."


def _facts(saved: Saved, config: ModelConfig | LabelModelConfig, weights: str) -> dict[str, str]:
    """Return what is known of a model by itself."""
    layers = [f"{config.layers} x {config.hidden} units of the cell {config.cell}"]
    layers += [f"embedding {config.embedding}"] if config.embedding else []
    layers += [name.replace("_", " ") for name in ("bidirectional", "residual", "layer_norm") if getattr(config, name)]
    facts = {"layers": ", ".join(layers), "weights": f"{sum(w.size for w in saved.weights.values()):,}, {weights}"}
    if isinstance(config, ModelConfig):
        tokenizer = tokenizers.from_json(saved.tokenizer_json)
        facts["symbols"] = f"{config.vocab_size:,} {_SYMBOLS[tokenizer.name]}"
        facts |= {"reads": "lines, each from a zero state"} if config.lines else {}
    else:
        facts["labels"] = ", ".join(config.labels)
    if "text_name" in saved.extra:
        facts["learned from"] = f"{saved.extra['text_name']}, SHA-256 {saved.extra.get('text_sha256')}"
    return facts


def _known(saved: Saved) -> dict[str, str]:
    """Return what was known of a model when it was published before."""
    known = saved.extra.get(_KNOWN)
    return {str(fact): str(value) for fact, value in known.items()} if isinstance(known, dict) else {}


def _training(saved: Saved, run: checkpoint.Run) -> dict[str, str]:
    """Return how a model was trained, and how well it does, if the run's figures are of these weights."""
    content = run.config()
    how: dict[str, Any] = content.get("train") or content.get("train_labels") or {}
    steps = f"{saved.step or 0:,} steps of {how.get('batch_size')} rows"
    steps += f" x {how['seq_len']} symbols" if "seq_len" in how else ""
    settings = ["optimizer", "lr", "dropout", "weight_decay", "clip", "precision"]
    settings += [] if how.get("lines") else ["sampler"]
    given = [*(f"{name} {how[name]}" for name in settings if how.get(name)), f"seed {how.get('seed')}"]
    facts = {"trained for": steps, "with": ", ".join(given)}
    if how.get("from_model"):  # a path of who trained it, and of no use to others
        facts["begun from"] = "the weights of another model"
    result = run.result() or {}
    found: dict[str, Any] = result.get("heldout") or {}
    if not found or result.get("best_step") != saved.step:
        return facts
    if "accuracy" in found:
        figures = f"accuracy {found['accuracy']:.4f}, macro F1 {found['macro_f1']:.4f}"
        facts["held out"] = f"{figures}, of {found['labels']:,} labels that it was not trained on"
        return facts
    bits, nats = found["bits_per_character"], found["nats_per_token"]
    figures = f"{bits:.4f} bits a character, {nats:.4f} nats a symbol, perplexity {found['perplexity']:.4f}"
    where = f"of {found['characters']:,} characters that it was not trained on: {found['protocol']}"
    where += f"; {found['skipped']:,} symbols outside its vocabulary are left out" if found.get("skipped") else ""
    return {**facts, "held out": f"{figures}, {where}"}


def _use(config: ModelConfig | LabelModelConfig, name: str) -> str:
    place, quoted = json.dumps(name, ensure_ascii=False), shlex.quote(name)
    if isinstance(config, LabelModelConfig):
        return f"""```python
import longshort

model = longshort.load({place})  # needs no PyTorch
print(model.config.labels, model.config.reads)  # model.predict([...]) takes a list of these
```"""
    own = is_own_cell(config.cell)
    flag = f" --cell {shlex.quote(config.cell)}" if own else ""
    shell = f"""```sh
longshort generate{flag} {quoted} --prompt "..."    # writes
longshort score{flag} {quoted} FILE                 # how odd each line of a file is
```"""
    if own:
        return f"{shell}\n\nIt needs PyTorch, and the file of its cell, `{config.cell}`, which goes with it."
    if config.adaptive_softmax:
        return f"{shell}\n\nIt needs PyTorch."
    return f"""{shell}

```python
import longshort

model = longshort.load({place})  # needs no PyTorch
print("".join(longshort.generate(model, model.tokenizer, length=200)))
```"""


def _limits(config: ModelConfig | LabelModelConfig) -> str:
    if isinstance(config, LabelModelConfig):
        return (
            "It gives one of its labels to whatever it reads, also to what is unlike all that it was trained on. Its "
            "figures are of\nsequences like those it has learned from."
        )
    return (
        "It writes in the manner of the text that it has learned from, and may repeat passages of it word for word; "
        "what it says\nis not meant. What binds that text, such as a licence, may bind what the model writes: add it "
        "here before you hand it on."
    )
