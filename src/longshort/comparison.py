"""Cells and implementations side by side on one text: the lecture's comparison, with what it left out.

Every row trains the same model on the same windows in the same order: the lecture's hyperparameters, the first
10,000 characters, several seeds. Beside the lecture's training perplexity stand the perplexity of the 5,000
characters that follow, which no model has seen, and models that only count n-grams.

    scratch       the textbook, `scratch.py`
    torch         `LanguageModel` on PyTorch's kernels
    native        `LanguageModel` on our own kernels
    reference     `LanguageModel` on the equations of `cells.py`
    FILE.py       a reader's own copy of the textbook
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from longshort import kernels, machine, native, scratch, training
from longshort.config import TrainConfig
from longshort.errors import LongshortError, TextError, UsageError
from longshort.evaluation import evaluate
from longshort.generation import Sampling, generate
from longshort.ngram import NGram, counted_perplexity
from longshort.recipes import RECIPES
from longshort.text.batches import ConsecutiveLanes
from longshort.text.corpus import Text
from longshort.text.tokenizers import CharTokenizer

TRAIN_CHARACTERS = 10_000
HELDOUT_CHARACTERS = 5_000
PREFIXES = ("traveller", "time traveller")
SAMPLE_CHARACTERS = 50
CHECKPOINTS = (40, 80, 120, 160)
"""Epochs whose training perplexity the lecture prints."""
HELDOUT_EVERY = 20
"""Epochs between looks at the held-out characters."""
IMPLEMENTATIONS = ("scratch", "torch", *([kernels.NATIVE] if native.targets() else []))
"""What is compared where nothing is chosen: `native` where there are native kernels."""
LECTURE_TEXT_SHA256 = "a825e700ad7753c931b4766105c6a33c472a81f78de7f6bc73dfe2cebf4821dc"
LECTURE_PERPLEXITY = {"gru": ["7.74", "3.35", "1.35", "1.15"], "lstm": ["7.95", "3.83", "1.92", "1.32"]}
"""What the lecture's notebooks printed for their own cells at epochs 40, 80, 120, 160 (one run each)."""


@dataclass
class Row:
    """One training run."""

    cell: str
    implementation: str
    seed: int
    parameters: int = 0
    seconds_per_epoch: float = 0.0
    """Median over the epochs, without sampling, as the lecture takes its time."""
    tokens_per_second: float = 0.0
    train_perplexity: dict[int, float] = field(default_factory=dict)
    """At the epochs that the lecture prints, and the last."""
    heldout_perplexity: float | None = None
    """At the end."""
    heldout_curve: dict[int, float] = field(default_factory=dict)
    """Every 20 epochs, and at the end."""
    curve: list[float] = field(default_factory=list)
    """Training perplexity of every epoch."""
    samples: list[str] = field(default_factory=list)
    """Greedy continuations of the lecture's prefixes."""


def result(text: Text, *, threads: int, **chosen: Any) -> dict[str, Any]:
    """Return everything that `compare --json` prints: rows, baselines, and where and with what they were made.

    Args:
        text: at least 10,000 characters.
        threads: of PyTorch, to be named.
        chosen: arguments of `run`.
    """
    train_text, heldout = lecture_text(text.content)
    rows = [asdict(row) for row in run(text.content, **chosen)]
    train_sha256 = hashlib.sha256(train_text.encode("utf-8")).hexdigest()
    found = {
        "recipe": "lecture",
        "text": {
            "name": text.name,
            "sha256": text.sha256,
            "train_characters": len(train_text),
            "train_sha256": train_sha256,
            "heldout_characters": len(heldout),
            "symbols": len(set(train_text)),
        },
        "seeds": chosen.get("seeds", 1),
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.description(),
        "rows": rows,
        "baselines": baselines(train_text, heldout),
    }
    if train_sha256 == LECTURE_TEXT_SHA256 and chosen.get("epochs") is None:
        found["lecture"] = LECTURE_PERPLEXITY
    return found


class _Trained(Protocol):
    """A model in training, of whatever implementation, as `compare` needs it."""

    parameters: int

    def epochs(self) -> Iterator[tuple[float, float, int]]: ...

    def heldout_perplexity(self, text: str) -> float: ...

    def continue_text(self, prefix: str, length: int) -> str: ...


def baselines(train_text: str, heldout: str) -> list[dict[str, Any]]:
    """Return what counting gives: for n = 1 .. 4 the training text's own figure, and the held-out one, smoothed."""
    return [
        {
            "order": order,
            "train_perplexity": counted_perplexity(train_text, order),
            "heldout_perplexity": NGram(train_text, order).perplexity(heldout) if heldout else None,
        }
        for order in (1, 2, 3, 4)
    ]


def lecture_text(content: str) -> tuple[str, str]:
    """Prepare a text as the lecture does, and return its first 10,000 characters and the 5,000 that follow.

    Line ends become spaces and capitals small letters. The second part is empty where nothing in it can be predicted.

    Raises:
        TextError: the text is shorter than 10,000 characters.
    """
    prepared = content.replace("\n", " ").replace("\r", " ").lower()
    if len(prepared) < TRAIN_CHARACTERS:
        raise TextError(
            f"The lecture's recipe trains on {TRAIN_CHARACTERS:,} characters; this text has {len(prepared):,}.",
            "Give a longer text, or none to use the built-in one.",
        )
    train, heldout = prepared[:TRAIN_CHARACTERS], prepared[TRAIN_CHARACTERS : TRAIN_CHARACTERS + HELDOUT_CHARACTERS]
    return train, heldout if set(heldout[1:]) & set(train) else ""


def run(
    content: str,
    *,
    cells: Sequence[str] = ("rnn", "gru", "lstm"),
    implementations: Sequence[str] = IMPLEMENTATIONS,
    seeds: int = 1,
    epochs: int | None = None,
    report: Callable[[Row, int, int], None] = lambda row, epoch, epochs: None,
) -> Iterator[Row]:
    """Train every cell in every implementation with every seed, and yield a row each.

    Args:
        content: a text of at least 10,000 characters.
        cells: names of cells.
        implementations: `scratch`, `torch`, `native`, or paths of Python files made from `scratch.py`.
        seeds: how many; 0, 1, ... are used.
        epochs: other than the lecture's 160.
        report: called after each epoch with the row so far, the epoch and the number of epochs.

    Raises:
        UsageError: an unknown cell or implementation.
        TextError: the text is too short.
    """
    settings = RECIPES["lecture"]
    num_epochs = settings["epochs"] if epochs is None else epochs
    train_text, heldout = lecture_text(content)
    # All are found before the first is trained: a typing mistake must not cost an hour.
    makers = [(name, _maker(name, cells)) for name in implementations]
    for seed in range(seeds):
        for cell in cells:
            for name, make in makers:
                row = Row(cell, name, seed)
                model = make(train_text, cell, seed, num_epochs)
                row.parameters = model.parameters
                seconds, rates = [], []
                for number, (perplexity, elapsed, tokens) in enumerate(model.epochs(), start=1):
                    if not math.isfinite(perplexity):
                        raise LongshortError(f"{name} {cell}: the perplexity is {perplexity} at epoch {number}.")
                    seconds.append(elapsed)
                    rates.append(tokens / elapsed)
                    row.curve.append(perplexity)
                    if number in CHECKPOINTS or number == num_epochs:
                        row.train_perplexity[number] = perplexity
                    if heldout and (number % HELDOUT_EVERY == 0 or number == num_epochs):
                        row.heldout_perplexity = model.heldout_perplexity(heldout)
                        row.heldout_curve[number] = row.heldout_perplexity
                    report(row, number, num_epochs)
                row.seconds_per_epoch = statistics.median(seconds)
                row.tokens_per_second = statistics.median(rates)
                known = set(train_text)
                row.samples = [model.continue_text(p, SAMPLE_CHARACTERS) for p in PREFIXES if set(p) <= known]
                yield row


class _ScratchModel:
    """The textbook, or a reader's copy of it."""

    def __init__(self, module: ModuleType, text: str, cell: str, seed: int, num_epochs: int) -> None:
        self._module = module
        self._epochs = module.train(text, cell=cell, num_epochs=num_epochs, seed=seed)
        self._model: Any = None
        vocabulary = len(set(text))
        self.parameters = sum(p.numel() for p in module.get_params(cell, vocabulary, RECIPES["lecture"]["hidden"]))

    def epochs(self) -> Iterator[tuple[float, float, int]]:
        for epoch in self._epochs:
            self._model = epoch.model
            yield epoch.perplexity, epoch.seconds, epoch.tokens

    def heldout_perplexity(self, text: str) -> float:
        return float(self._module.perplexity(self._model, text))

    def continue_text(self, prefix: str, length: int) -> str:
        return str(self._module.predict(self._model, prefix, length))


class _LibraryModel:
    """`LanguageModel` on the lecture's recipe."""

    def __init__(self, kernel: str, text: str, cell: str, seed: int, num_epochs: int) -> None:
        settings = {**RECIPES["lecture"], "epochs": None, "cell": cell, "seed": seed}
        self._kernel, self._num_epochs = kernel, num_epochs
        self._tokenizer = CharTokenizer.train(text)
        ids = self._tokenizer.encode(text)
        config = TrainConfig(**settings)
        self._sampler = ConsecutiveLanes(ids, config.batch_size, config.seq_len, seed, drop_incomplete=True)
        self._model = training.make_model(config, self._tokenizer)
        self._stepper = training.TextStepper(self._model, config, num_epochs * self._sampler.steps_per_epoch)
        self.parameters = self._model.num_parameters

    def epochs(self) -> Iterator[tuple[float, float, int]]:
        updates = self._sampler.steps_per_epoch
        for epoch in range(self._num_epochs):
            start, total, tokens = time.perf_counter(), 0.0, 0
            with kernels.use(self._kernel):
                for number in range(epoch * updates, (epoch + 1) * updates):
                    batch = self._sampler.batch(number)
                    nats, _, _ = self._stepper.step(number, batch)
                    total += nats * batch.tokens
                    tokens += batch.tokens
            yield math.exp(total / tokens), time.perf_counter() - start, tokens

    def heldout_perplexity(self, text: str) -> float:
        return evaluate(self._model, self._tokenizer, text).perplexity

    def continue_text(self, prefix: str, length: int) -> str:
        greedy = Sampling(temperature=0)
        return prefix + "".join(generate(self._model, self._tokenizer, prefix, length, greedy))


def _maker(implementation: str, cells: Sequence[str]) -> Callable[[str, str, int, int], _Trained]:
    """Return what makes a model of `implementation`, after checking that it has all `cells`."""
    known: tuple[str, ...]
    make: Callable[[str, str, int, int], _Trained]
    if implementation in (*kernels.available(), kernels.NATIVE, kernels.BFLOAT16):
        if implementation == kernels.BFLOAT16:
            native.need_bfloat16()
        known, make = kernels.cells_of(implementation), partial(_LibraryModel, implementation)
    else:
        module = scratch if implementation == "scratch" else _load_copy(implementation)
        known, make = tuple(module.CELLS), partial(_ScratchModel, module)
    for cell in cells:
        if cell not in known:
            raise UsageError(f"{implementation} has no cell called {cell!r}; it has {', '.join(known)}.")
    return make


def _load_copy(path: str) -> ModuleType:
    """Import a reader's copy of the textbook: their own program, run because they asked for it."""
    if not path.endswith(".py"):
        raise UsageError(
            f"There is no implementation called {path!r}; there are scratch, native, {', '.join(kernels.available())}.",
            "A program of your own is named by its file, such as ./mine.py.",
        )
    if not Path(path).is_file():
        raise UsageError(f"There is no file {path}.", f"Copy the textbook there: cp {scratch.__file__} {path}")
    name = f"longshort_copy_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    missing = [n for n in ("CELLS", "train", "predict", "perplexity", "get_params") if not hasattr(module, n)]
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing)}.", "Start from a copy of longshort's scratch.py.")
    return module
