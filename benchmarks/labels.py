"""Classifiers and taggers: against the best possible accuracy on made-up sequences, and who wrote a line.

python benchmarks/labels.py [--picture PICTURE.png] FILE FILE ... > RESULT.json

Each FILE is an author: its lines of 20 characters and more, the last tenth held out, the classes weighed equally.
The examples' own programs (`examples/classify_lines.py`, `examples/tag_words.py`) make the texts and the grammar.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longshort
from longshort import machine, plots
from longshort.text.hidden_markov import HiddenMarkov

EXAMPLES = Path(__file__).parent.parent / "examples"
SEEDS, SENTENCES = range(3), (250, 500, 1000, 2000, 4000)


def example(name: str) -> Any:
    """Return an example's program as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(examples: Any, heldout: Any, **given: Any) -> Any:
    """Train in a directory that is deleted afterwards; return the last event."""
    with tempfile.TemporaryDirectory() as folder:
        config = longshort.LabelTrainConfig(out=f"{folder}/run", **given)
        *_, finished = longshort.train_labels(config, examples, heldout)
    return finished


def languages(program: Any) -> list[dict[str, Any]]:
    """Return what classifiers of made-up languages reach, and what can be reached."""
    known = {name: HiddenMarkov.drawn(3, 8, seed, sharpness=0.6) for seed, name in enumerate(("ar", "bo", "cu"))}
    rows = []
    for cell, pooling in (("gru", "mean"), ("gru", "ends"), ("lstm", "mean"), ("lstm", "ends"), ("rnn", "mean")):
        found, best = [], []
        for seed in SEEDS:
            generator = np.random.default_rng(seed)
            learn, heldout = (program.made_up(known, count, generator) for count in (8000, 4000))
            parts = (longshort.Examples(*zip(*part, strict=True)) for part in (learn, heldout))
            found.append(trained(*parts, cell=cell, pooling=pooling, epochs=4, seed=seed).heldout.accuracy)
            best.append(program.best_possible(known, heldout))
        medians = {"accuracy": statistics.median(found), "best_possible": statistics.median(best)}
        rows.append({"task": "made-up languages", "cell": cell, "pooling": pooling, **medians})
    return rows


def tags(program: Any) -> list[dict[str, Any]]:
    """Return what taggers reach after so many sentences, and what can be reached."""
    rows = []
    for bidirectional in (True, False):
        for count in SENTENCES:
            found, best = [], []
            for seed in SEEDS:
                generator = np.random.default_rng(seed)
                examples, heldout = program.sentences(count, generator), program.sentences(2000, generator)
                given = {"hidden": 32, "lr": 1e-2, "steps": 500, "bidirectional": bidirectional, "seed": seed}
                found.append(trained(examples, heldout, **given).heldout.accuracy)
                ids = [np.array([program.WORDS.index(word) for word in words]) for words in heldout.sequences]
                p = [program.GRAMMAR.posterior(each, forward_only=not bidirectional).max(1) for each in ids]
                best.append(float(np.concatenate(p).mean()))
            medians = {"accuracy": statistics.median(found), "best_possible": statistics.median(best)}
            rows.append({"task": "tags", "bidirectional": bidirectional, "sentences": count, **medians})
    return rows


def authors(program: Any, files: list[str]) -> list[dict[str, Any]]:
    """Return how well a line's author is told."""
    learn, heldout = program.from_files(files)
    examples, rest = (longshort.Examples(*zip(*part, strict=True)) for part in (learn, heldout))
    rows = []
    for name, given in (
        ("GRU, 1 x 64, both directions", {"cell": "gru"}),
        ("GRU, 1 x 64, forward", {"cell": "gru", "bidirectional": False}),
        ("LSTM, 1 x 64, both directions", {"cell": "lstm"}),
        ("LSTM, 2 x 64, both directions", {"cell": "lstm", "layers": 2}),
        ("RNN, 1 x 64, both directions", {"cell": "rnn"}),
    ):
        runs = [
            trained(examples, rest, **given, epochs=4, class_weights=examples.balanced_weights(), seed=seed)
            for seed in SEEDS
        ]
        run = sorted(runs, key=lambda run: run.heldout.macro_f1)[len(runs) // 2]
        figures = {key: run.heldout.to_dict()[key] for key in ("accuracy", "macro_f1", "f1", "confusion")}
        rows.append(
            {"task": "authors", "model": name, "seconds": statistics.median(r.seconds for r in runs), **figures}
        )
    counts = {name: (examples.counts[name], rest.counts[name]) for name in examples.names}
    return [{"task": "authors", "lines": counts}, *rows]


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="+")
    parser.add_argument("--picture")
    args = parser.parse_args()
    classify, tag = example("classify_lines"), example("tag_words")
    rows = [*languages(classify), *tags(tag), *authors(classify, args.file)]
    command = f"python benchmarks/labels.py {' '.join(Path(file).name for file in args.file)}"
    head = {"format_version": 1, "benchmark": "classifiers and taggers", "command": command}
    head |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description(), "seeds": len(SEEDS)}
    result = {**head, "threads": torch.get_num_threads(), "rows": rows}
    if args.picture:
        plots.labels(result, args.picture)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
