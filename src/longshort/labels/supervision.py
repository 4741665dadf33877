"""Training of models that label sequences: the loop, the run directories and the resuming of every other training.

    for event in train_labels(LabelTrainConfig(epochs=5, out="languages-run"), examples, heldout):
        ...
    model = longshort.load("languages-run")

An epoch reads every sequence once, in a new order, those of similar length side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import longshort
from longshort import checkpoint, durable
from longshort.config import LabelTrainConfig
from longshort.errors import CheckpointError, UsageError
from longshort.labels.examples import NO_TOKENIZER, Batch, Encoded, Examples
from longshort.labels.labellers import Labeller, from_saved, make_labeller
from longshort.labels.labelling import Labelling, encode, evaluate_labels
from longshort.loop import (
    Event,
    Legs,
    Loop,
    are_legs,
    free_directory,
    further_legs,
    keeping,
    recover,
    settled,
)
from longshort.text.batches import of_similar_length
from longshort.updates import Stepper, Stop, checkpoint_size, device


@dataclass(frozen=True, slots=True)
class LabelsStarted:
    """Everything is settled and the run directory exists."""

    config: LabelTrainConfig
    run: Path
    model: Labeller
    sequences: int
    heldout_sequences: int
    steps_per_epoch: int
    resumed_at: int | None = None
    """The step that training goes on from; None in a new run."""


class LabelStepper(Stepper[Labeller, Batch]):
    """Steps of a model that labels: every sequence is read whole, from a zero state."""

    def __init__(self, model: Labeller, config: LabelTrainConfig, steps: int, stop: Stop) -> None:
        super().__init__(model, config, steps, stop=stop)
        weights = config.class_weights
        self.class_weights: Tensor | None = torch.tensor(weights, device=self.device) if weights else None

    def read(self, batch: Batch) -> float:
        """As of every stepper."""
        loss = self.model.loss(batch, self.class_weights)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


class LabelTask:
    """What the loop trains: a model that labels, on examples.

    Args:
        config: every value settled.
        model: to be looked at.
        examples: what it learns from.
        heldout: what it is measured by.
    """

    def __init__(self, config: LabelTrainConfig, model: Labeller, examples: Encoded, heldout: Encoded | None) -> None:
        self.config, self.model, self.examples, self.heldout = config, model, examples, heldout
        self.steps_per_epoch = -(-len(examples) // config.batch_size)

    def batch(self, step: int) -> Batch:
        """Return what training step `step` reads: a function of it and the seed alone."""
        epoch, number = divmod(step, self.steps_per_epoch)
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
        count, lengths = len(self.examples), self.examples.lengths_of
        return self.examples.batch(of_similar_length(count, self.config.batch_size, number, lengths, generator))

    def starts_fresh(self, step: int) -> bool:
        """Return True: no state is carried."""
        return True

    def measure(self, pause: Callable[[], None]) -> Labelling | None:
        """Return how well the model labels what is held out; None where nothing is."""
        if self.heldout is None:
            return None
        return evaluate_labels(self.model, self.heldout, self.config.class_weights, pause)

    look = measure

    def figures(self, values: dict[str, Any]) -> Labelling:
        """Return what `Labelling.to_dict` gave."""
        return Labelling(**values)

    def description(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return what a checkpoint holds beside weights."""
        tokenizer = self.model.tokenizer
        return self.model.config.to_dict(), tokenizer.to_json() if tokenizer else NO_TOKENIZER, {}

    def started(self, run: Path, resumed_at: int | None) -> LabelsStarted:
        """Return the first event of training."""
        heldout = len(self.heldout) if self.heldout else 0
        return LabelsStarted(
            self.config, run, self.model, len(self.examples), heldout, self.steps_per_epoch, resumed_at
        )


def train_labels(
    config: LabelTrainConfig,
    examples: Examples,
    heldout: Examples | None = None,
    stop: Stop = lambda: False,
) -> Generator[LabelsStarted | Event, None, None]:
    """Train a classifier or a tagger and keep it in a run directory; `longshort.load` brings it back.

    Args:
        config: the layers, the training.
        examples: what it learns from. Whether a sequence or each step has a label decides which of the two it is.
        heldout: what it is measured by, and its best checkpoint chosen; if None the last one counts.
        stop: asked after each step whether to stop there; `resume_labels` goes on later.

    Yields:
        `LabelsStarted`, then `Progress`, `Skipped` and `Looked` as they come, then `Finished` or `Stopped`. A token in
        these is a label.

    Raises:
        LongshortError: examples, a value or a place that cannot be used; nothing is left behind then.
        TrainingError: the loss is no longer finite.
    """
    if heldout is None and config.patience:
        raise UsageError("patience needs held-out examples, but none are given.", "Leave it out.")
    model_config, tokenizer = examples.model(config)
    torch.manual_seed(config.seed)
    model = make_labeller(model_config, tokenizer).to(device(config.device))
    task = LabelTask(config, model, encode(model, examples), encode(model, heldout) if heldout else None)
    path = Path(config.out) if config.out else free_directory("labels-run")
    config = task.config = dataclasses.replace(settled(config, task.steps_per_epoch), out=str(path))
    assert config.steps is not None
    steps = config.steps
    torch.set_num_threads(config.threads or 1)
    legs = [[0, steps]]
    content = _config_content(config, examples, heldout, legs)
    stepper = LabelStepper(model, config, steps, stop)
    run = checkpoint.create_run(path, content, task.description()[1])
    with keeping(run, checkpoint_size(stepper)):
        yield from Loop(config, legs, task, stepper, run, stop).events(task.started(run.path, None))


def resume_labels(
    path: str | Path,
    examples: Examples,
    heldout: Examples | None = None,
    steps: int | None = None,
    stop: Stop = lambda: False,
) -> Generator[LabelsStarted | Event, None, None]:
    """Go on with a run of `train_labels` from its newest whole checkpoint, bit for bit as if it had never stopped.

    Args:
        path: the run directory.
        examples: those that it was started with.
        heldout: the same.
        steps: another number of steps in all than was planned.
        stop: as of `train_labels`.

    Yields:
        As `train_labels`.

    Raises:
        UsageError: there is no such run, the examples are others, or it has made more steps than `steps` already.
        CheckpointError: no checkpoint of it is whole.
        OutputError: it cannot be written, or another process trains it.
        TrainingError: the loss is no longer finite.
    """
    run = checkpoint.open_run(path)
    config, content = _config_of(run), run.config()
    for name, given in (("examples", examples), ("heldout", heldout)):
        if content[f"{name}_sha256"] != (given.sha256 if given else None):
            raise UsageError(
                f"The {'examples' if name == 'examples' else 'held-out examples'} are not those of {path}.",
                "Give the sequences and labels that it was started with, in the same order.",
            )
    with run.lock():
        torch.set_num_threads(config.threads or 1)  # before `recover`, which compares them with the checkpoint's
        saved, training, position = recover(run, steps)
        legs = further_legs(content["legs"], position, steps)
        config = dataclasses.replace(config, out=str(path), steps=legs[-1][1])
        model = from_saved(saved).to(device(config.device))
        stepper = LabelStepper(model, config, legs[-1][1], stop)
        durable.require_space(run.path / "checkpoints", checkpoint_size(stepper))
        run.rewind(saved, training, position.best_step)
        changed = _config_content(config, examples, heldout, legs)
        if changed != {**content, "longshort_version": longshort.__version__}:
            run.write_config(changed)
        stepper.put_back(training)
        task = LabelTask(config, model, encode(model, examples), encode(model, heldout) if heldout else None)
        started = task.started(run.path, position.step)
        yield from Loop(config, legs, task, stepper, run, stop, position).events(started)


def _config_content(
    config: LabelTrainConfig, examples: Examples, heldout: Examples | None, legs: Legs
) -> dict[str, Any]:
    """Return what a run's config.json holds."""
    hashes = {"examples_sha256": examples.sha256, "heldout_sha256": heldout.sha256 if heldout else None}
    content = {"longshort_version": longshort.__version__, **hashes}
    return {**content, "legs": [list(leg) for leg in legs], "train_labels": config.to_dict()}


def _config_of(run: checkpoint.Run) -> LabelTrainConfig:
    content = run.config()
    values = content.get("train_labels")
    if "train" in content and values is None:
        raise UsageError(f"{run.path} trains a language model.", f"Resume it: longshort resume {run.path}")
    if not isinstance(values, dict) or not are_legs(content.get("legs")) or "examples_sha256" not in content:
        raise CheckpointError(f"{run.path}/config.json is not the configuration of a training run.", "Restore the run.")
    return LabelTrainConfig.from_dict(values, f"{run.path}/config.json")
