"""Named settings, and the one dial: how a time budget becomes a model size and a number of steps.

Precedence: flag > TOML file > recipe > the dial; the dial fills only what nothing else has set.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshort import checkpoint
from longshort.config import MODEL_OPTIONS, ModelConfig, TrainConfig
from longshort.errors import ConfigError, TrainingError, UsageError
from longshort.text import vectors
from longshort.text.tokenizers import from_json

if TYPE_CHECKING:
    from longshort.training import Prepared

RECIPES: dict[str, dict[str, Any]] = {
    # The lecture's: LECTURE notebook slides/4_9/lstm.ipynb of d2l-ai/berkeley-stat-157.
    "lecture": {
        "hidden": 256,
        "embedding": 0,
        "seq_len": 35,
        "batch_size": 32,
        "epochs": 160,
        "sampler": "consecutive",
        "drop_incomplete": True,
        "optimizer": "sgd",
        "lr": 100.0,
        "clip": 0.01,
        "warmup": 0.0,
        "final_lr": 1.0,
        "init": "normal",
        "single_bias": True,
    },
    # Found on the slice from 80 to 90 % of tiny Shakespeare: docs/log.md. Five minutes on two cores.
    "shakespeare": {
        "hidden": 768,
        "embedding": 256,
        "seq_len": 64,
        "batch_size": 32,
        "steps": 1600,
        "lr": 3e-3,
    },
}

SIZES = (64, 128, 256, 384, 512, 768, 1024)
"""Hidden units that the dial chooses among."""

DROPOUT_BY_EPOCHS = ((10.0, 0.3), (6.0, 0.2))
"""A text that is read many times is learned by heart: from so many epochs on the dial drops so much (docs/log.md)."""

FEWEST_STEPS = 1500
"""The dial takes the largest model that makes this many steps in the time given; docs/log.md has the measurement."""


def load_toml(path: str | Path) -> dict[str, Any]:
    """Return the options in a TOML file.

    Raises:
        UsageError: there is no such file, or it is not TOML.
    """
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"The configuration file {path} cannot be read: {why}.") from error


def combine(
    flags: Mapping[str, Any], toml: Mapping[str, Any] | None = None, recipe: str | None = None
) -> dict[str, Any]:
    """Return every option that is set somewhere, the stronger source winning.

    Raises:
        UsageError: there is no recipe of that name.
        ConfigError: a file or a model is named by something else than a text.
        UsageError, TextError: the file of word vectors that they name cannot be read.
        UsageError, CheckpointError: as of `with_model`.
    """
    if recipe is not None and recipe not in RECIPES:
        close = difflib.get_close_matches(recipe, RECIPES, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(RECIPES)}."
        raise UsageError(f"There is no recipe called {recipe!r}.", hint)
    settings = dict(RECIPES[recipe]) if recipe else {}
    for stronger in (toml or {}, flags):
        # One length of training replaces the other: a flag --steps is not at odds with a recipe's epochs.
        if "steps" in stronger or "epochs" in stronger:
            settings.pop("steps", None)
            settings.pop("epochs", None)
        if "texts" in stronger or "corpus" in stronger:
            settings.pop("texts", None)
            settings.pop("corpus", None)
        settings |= stronger
    for name in ("vectors", "from_model"):  # read here, before there is a configuration that checks all options
        TrainConfig.check(name, settings.get(name))
    if settings.get("vectors") is not None and "embedding" not in settings:
        settings["embedding"] = vectors.width(settings["vectors"])
    if settings.get("tied"):
        # One matrix serves both sides, so one width is enough to say.
        size = settings.get("hidden", settings.get("embedding", TrainConfig().hidden))
        settings = {"hidden": size, "embedding": size, **settings}
    return with_model(settings) if settings.get("from_model") is not None else settings


def with_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with the sizes, the dropout and the tokenizer of the model that they start from.

    Raises:
        UsageError: they ask for another model than that, or there is none, or it is no language model.
        CheckpointError: it is damaged.
    """
    source = settings["from_model"]
    saved = checkpoint.load_model(source)
    ModelConfig.from_dict(saved.model, f"{saved.path}/config.json")  # or it says which other kind of model it is
    brought = {name: saved.model[name] for name in MODEL_OPTIONS if name in saved.model}
    brought["tokenizer"] = from_json(saved.tokenizer_json).name
    for name, value in brought.items():
        if settings.get(name, value) != value:
            raise UsageError(
                f"{source} has {name} {value}, so {name} {settings[name]} does not go with --from.",
                f"Leave out {name}, or train a new model.",
            )
    for name, harmless in (("init", "torch"), ("single_bias", False)):
        if settings.get(name, harmless) != harmless:
            raise UsageError(f"{name} makes new weights; --from brings its own.", f"Leave out {name}.")
    for name in ("min_freq", "vocab_size"):
        if settings.get(name) is not None:
            raise UsageError(f"{name} makes a new tokenizer; --from brings its own.", f"Leave out {name}.")
    return {"dropout": saved.model.get("dropout", 0.0), **brought, **settings}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the dial chose, and what it measured."""

    config: TrainConfig
    seconds_per_step: dict[int, float]
    """Of each size that was tried, with the threads that are fastest for it."""


def check_budget(minutes: float, settings: Mapping[str, Any]) -> None:
    """Refuse a budget that is not a positive number of minutes, or that stands beside a number of steps.

    Raises:
        ConfigError, UsageError: accordingly.
    """
    if not 0 < minutes < 1e6:
        raise ConfigError(f"minutes must be a positive number, not {minutes:g}.")
    if "steps" in settings or "epochs" in settings:
        raise UsageError("Give --minutes or a number of steps or epochs, not both.")


def dropout_for(epochs: float) -> float:
    """Return the dropout of a model that reads its text so many times, where nobody asks for another."""
    return next((share for fewest, share in DROPOUT_BY_EPOCHS if epochs > fewest), 0.0)


def plan(minutes: float, settings: Mapping[str, Any], prepared: Prepared, since: float) -> Plan:
    """Choose model size, threads and number of steps for a budget by measuring this machine.

    Args:
        minutes: the budget, to the last figure.
        settings: options that are set already; they stay.
        prepared: the text.
        since: `time.perf_counter()` when the budget began to run.

    Returns:
        A configuration with a fixed number of steps: a run of it can be repeated exactly.

    Raises:
        ConfigError, UsageError: as `check_budget`.
        TrainingError: there is too little memory for the smallest model.
    """
    import torch

    from longshort import training
    from longshort.evaluation import evaluate

    check_budget(minutes, settings)
    seconds = 60 * minutes
    base = TrainConfig.from_dict(settings)
    cores = torch.get_num_threads()

    def seconds_per_step(config: TrainConfig, threads: int) -> float:
        """Median of a few steps of a model that is then thrown away; of lines, which differ in length, their mean."""
        torch.set_num_threads(threads)
        stepper = training.TextStepper(training.make_model(config, prepared.tokenizer), config, steps=100)
        sampler = prepared.sampler(config)
        times, tokens = [], []
        for number in range(8 if config.lines else 4):
            batch = sampler.batch(number if config.lines else 0)
            begin = time.perf_counter()
            stepper.step(number, batch)
            times.append(time.perf_counter() - begin)
            tokens.append(batch.tokens)
        if config.lines:  # the first step allocates and is slower
            return sum(times[1:]) / max(sum(tokens[1:]), 1) * prepared.train.tokens / sampler.steps_per_epoch
        return sorted(times[1:])[1]

    def sized(hidden: int) -> TrainConfig:
        # A learned embedding learns much faster than one-hot input; the projected table makes it cost the same.
        embedding = settings.get("embedding", min(hidden, 256))
        return dataclasses.replace(base, hidden=hidden, embedding=embedding)

    def fastest(config: TrainConfig) -> tuple[float, int]:
        """Seconds a step, and threads. Fewer threads may be faster: for small models, beside busy neighbours."""
        if base.threads is not None:
            return seconds_per_step(config, base.threads), base.threads
        threads, best = cores, (seconds_per_step(config, cores), cores)
        while threads > 1:
            threads //= 2
            tried = (seconds_per_step(config, threads), threads)
            if tried[0] > 1.2 * best[0]:
                break
            best = min(best, tried)
        return best

    measured: dict[int, float] = {}
    chosen: TrainConfig | None = None
    for hidden in (settings["hidden"],) if "hidden" in settings else SIZES:
        candidate = sized(hidden)
        try:
            training.require_memory(candidate, prepared)
        except TrainingError:
            if chosen is None:
                raise
            break
        measured[hidden], threads = fastest(candidate)
        left = seconds - (time.perf_counter() - since)
        if chosen is not None and left / measured[hidden] < FEWEST_STEPS:
            break
        chosen = dataclasses.replace(candidate, threads=threads)
    assert chosen is not None
    torch.set_num_threads(chosen.threads or cores)

    # What the looks at held-out text and the last figure cost.
    reserve = 0.0
    if prepared.heldout_tokens:
        model = training.make_model(chosen, prepared.tokenizer)

        def seconds_to_read(tokens: int, lanes: int | None) -> float:
            sample = prepared.look.first(65_536 if lanes is None else 2000 * lanes)
            begin = time.perf_counter()
            evaluate(model, prepared.tokenizer, sample, lanes=lanes)
            return (time.perf_counter() - begin) / max(sample.tokens, 1) * tokens

        reserve = seconds_to_read(10 * prepared.look.tokens, None)
        reserve += seconds_to_read(prepared.heldout_tokens, base.eval_lanes)
    left = seconds - (time.perf_counter() - since) - reserve
    steps = max(int(left / measured[chosen.hidden]), 1)
    dropout = settings.get("dropout", dropout_for(steps / prepared.sampler(chosen).steps_per_epoch))
    return Plan(dataclasses.replace(chosen, steps=steps, dropout=dropout), measured)
