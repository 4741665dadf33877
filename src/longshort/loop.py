"""The loop of a run that has been settled and started: steps, reports, looks, checkpoints. It yields events.

What is trained is a `Task`: a language model on a text (`training.py`), or labels of examples (`supervision.py`).

A look at what is held out is made between two steps, and whether it has been made is part of the position: a run
that is stopped between a step and its look makes the look when it is resumed.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from longshort import checkpoint, durable, model_files, snapshot
from longshort.config import Schedule
from longshort.errors import CheckpointError, TrainingError, UsageError
from longshort.snapshot import Position
from longshort.updates import Stepper, Stop, Trainable

S = TypeVar("S", bound=Schedule)

SECONDS_BETWEEN_SAVES = 300.0
_CHECKPOINTS_AT_ONCE = 4
"""The best, the latest, the one before, and the one that is being written."""
MOST_SKIPPED = 3
"""A run stops when the loss or a gradient was not finite in this many steps."""

Legs = Sequence[Sequence[int]]
"""(first step, number of steps planned from there on) of each part of a run: one, and one more a `resume --steps`."""


class Figures(Protocol):
    """How well a model does on what was held out."""

    @property
    def loss(self) -> float:
        """In nats a token; the best checkpoint is the one with the least."""

    def metrics(self) -> dict[str, Any]:
        """Return what the run's log says of it."""

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""


class Task(Protocol):
    """What is trained: what each step reads, and what the model is measured by."""

    def batch(self, step: int) -> Any:
        """Return what training step `step` (0, 1, ...) reads."""

    def starts_fresh(self, step: int) -> bool:
        """Return whether the state is zero before training step `step`."""

    def look(self, pause: Callable[[], None]) -> Figures | None:
        """Look at a part of what is held out, if anything is; `pause` is called often, and may raise."""

    def measure(self, pause: Callable[[], None]) -> Figures | None:
        """Take the last figure, of all that is held out."""

    def figures(self, values: dict[str, Any]) -> Figures:
        """Return what `Figures.to_dict` gave."""

    def description(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return what a checkpoint holds beside weights: the model's configuration, `tokenizer.json`, other values."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A number of steps were made."""

    step: int
    steps: int
    nats_per_token: float
    """Mean over the steps since the last such event."""
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step changed nothing, as its loss or its gradients were not finite."""

    step: int
    nats_per_token: float
    gradient_norm: float
    skipped_steps: int
    """Of the run so far."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What is held out was looked at and a checkpoint saved."""

    step: int
    heldout: Any
    """An `Evaluation`, or of a model that labels a `Labelling`."""
    best: bool
    model: Any
    """The model in training."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Training has ended; the best weights were measured once more, on all that is held out."""

    step: int
    best_step: int
    heldout: Any
    """As of `Looked`; None where nothing was held out."""
    seconds: float
    stopped_early: bool


@dataclass(frozen=True, slots=True)
class Stopped:
    """Training was asked to stop and has saved where it is, if it had made a step; `resume` goes on from there."""

    step: int
    steps: int
    run: Path


Event = Progress | Skipped | Looked | Finished | Stopped


class Loop:
    """All steps of a run.

    Args:
        config: every value settled.
        legs: what was planned, and from which step on.
        task: what each step reads, and what the model is measured by.
        stepper: model and optimizer, in the state of `position`.
        run: where checkpoints and logs go.
        stop: asked after each step, and in long evaluations, whether to stop.
        position: of the latest checkpoint; None in a new run.
    """

    def __init__(
        self,
        config: Schedule,
        legs: Legs,
        task: Task,
        stepper: Stepper[Any, Any],
        run: checkpoint.Run,
        stop: Stop,
        position: Position | None = None,
    ) -> None:
        self.config, self.legs, self.task = config, legs, task
        self.stepper, self.run, self.stop = stepper, run, stop
        self.model: Trainable = stepper.model
        self.position = position or Position()
        self.saved = position.step if position else None
        """The step of the latest checkpoint."""
        self.saved_at = self.window_start = time.perf_counter()

    def events(self, started: Any) -> Iterator[Any]:
        """Train to the end. Who looks at an event may draw random numbers without changing those of the training.

        Args:
            started: the first event.
        """
        for event in itertools.chain([started], self._events()):
            state = torch.get_rng_state()
            yield event
            torch.set_rng_state(state)

    def _events(self) -> Iterator[Event]:
        begin, at = time.perf_counter(), self.position
        steps = self.legs[-1][1]
        if at.step < steps:
            self.run.write_result(None)
        try:
            while True:
                if at.looked < at.step and self._is_look(at.step):
                    looked = self._look()
                    if looked is not None:
                        yield looked
                if any(at.step == first for first, _ in self.legs[1:]):
                    at.looks_without_gain = 0
                if at.step >= steps or (self.config.patience and at.looks_without_gain >= self.config.patience):
                    break
                if self.stepper.stopping:
                    raise _StopHere
                self._stop_here()
                yield from self._step()
            yield self._finish(begin)
        except _StopHere:
            if at.step and self.saved != at.step:
                self._save()
            yield Stopped(at.step, steps, self.run.path)

    def _planned(self, step: int) -> int:
        """Return the number of steps that was planned when step `step` (0, 1, ...) was made."""
        return next(steps for first, steps in reversed(self.legs) if first <= step)

    def _is_look(self, done: int) -> bool:
        every = self.config.validate_every or 1
        return done % every == 0 or done in (self._planned(done - 1), self.legs[-1][1])

    def _step(self) -> Iterator[Event]:
        """Make a step; report and save where it is time to."""
        at, stepper = self.position, self.stepper
        stepper.steps = planned = self._planned(at.step)
        batch = self.task.batch(at.step)
        nats, norm, rate = stepper.step(at.step, batch)
        at.step += 1
        if math.isfinite(nats) and math.isfinite(norm):
            at.good_step = at.step
            at.window_steps += 1
            at.window_nats += nats * batch.tokens
            at.window_tokens += batch.tokens
        else:
            at.skipped_steps += 1
            # JSON has no such numbers, so they are written as words.
            words = {"skipped_steps": at.skipped_steps, "loss": str(nats), "norm": str(norm)}
            self.run.log_metrics({"step": at.step, **words})
            yield Skipped(at.step, nats, norm, at.skipped_steps)
            if at.skipped_steps >= MOST_SKIPPED:
                raise self._diverged(
                    f"{at.skipped_steps} steps had no finite loss (the last: {nats}, gradients {norm})"
                )
        every = max(1, min(planned // 100, 50))
        if at.window_tokens and (at.step % every == 0 or at.step == planned):
            yield self._report(norm, rate)
        if self.config.save_every:
            due = at.step % self.config.save_every == 0
        else:
            due = time.perf_counter() - self.saved_at > SECONDS_BETWEEN_SAVES
        if due and not self._is_look(at.step):
            self._save()

    def _report(self, norm: float, rate: float) -> Progress:
        at, steps = self.position, self.legs[-1][1]
        seconds = max(time.perf_counter() - self.window_start, 1e-9)
        speed, mean = at.window_tokens / seconds, at.window_nats / at.window_tokens
        progress = Progress(at.step, steps, mean, speed, seconds / at.window_steps * (steps - at.step))
        figures = {"nats_per_token": mean, "learning_rate": rate, "gradient_norm": norm}
        self.run.log_metrics({"step": at.step, **figures, "skipped_steps": at.skipped_steps})
        self.run.log_timing({"step": at.step, "tokens_per_second": speed})
        at.window_steps, at.window_nats, at.window_tokens = 0, 0.0, 0
        self.window_start = time.perf_counter()
        return progress

    def _look(self) -> Looked | None:
        """Look at what is held out, if anything is, and save."""
        at, paused = self.position, time.perf_counter()
        heldout = self._checked(self.task.look(self._stop_here))
        is_best = heldout is None or at.best_nats is None or heldout.loss < at.best_nats
        if heldout is not None:
            self.run.log_metrics({"step": at.step, **heldout.metrics()})
            at.best_nats = heldout.loss if is_best else at.best_nats
        at.best_step = at.step if is_best else at.best_step
        at.looks_without_gain = 0 if is_best else at.looks_without_gain + 1
        at.looked = at.step
        self._save()
        self.window_start += time.perf_counter() - paused
        return Looked(at.step, heldout, is_best, self.model) if heldout is not None else None

    def _save(self) -> None:
        """Publish a checkpoint of where training is; what is not finite never gets there."""
        at = self.position
        weights = self.model.weights()
        state, random = self.stepper.collect(state=not self.task.starts_fresh(at.step))
        taken = snapshot.take(at, self.stepper.named_parameters, self.stepper.optimizer, state, random)
        for name, array in {**weights, **taken.arrays}.items():
            if not np.isfinite(array).all():
                raise self._diverged(f"{name} holds numbers that are not finite at step {at.step}")
        config, tokenizer, extra = self.task.description()
        self.run.save(at.step, weights, config, tokenizer, extra, best=at.best_step == at.step, training=taken)
        self.saved, self.saved_at = at.step, time.perf_counter()

    def _finish(self, begin: float) -> Finished:
        """Measure the best weights on all that is held out, unless that has been done already."""
        at, early = self.position, self.position.step < self.legs[-1][1]
        with suppress(CheckpointError):  # `resume` has told it
            found = self.run.result()
            if found is not None and found.get("steps") == at.step:
                heldout = self.task.figures(found["heldout"]) if found["heldout"] else None
                return Finished(at.step, found["best_step"], heldout, time.perf_counter() - begin, early)
        best_step = at.best_step
        if at.best_nats is not None:
            best = checkpoint.load_model(self.run.path)
            best_step = best.step or at.best_step
            self.model.load_weights(best.weights)
        final = self._checked(self.task.measure(self._stop_here))
        result = {"steps": at.step, "best_step": best_step, "skipped_steps": at.skipped_steps}
        self.run.write_result({**result, "heldout": final.to_dict() if final else None})
        return Finished(at.step, best_step, final, time.perf_counter() - begin, early)

    def _checked(self, heldout: Figures | None) -> Figures | None:
        """Refuse a figure that is not finite before anything is saved with it."""
        if heldout is not None and not math.isfinite(heldout.loss):
            raise self._diverged(f"the held-out part has {heldout.loss} nats a token")
        return heldout

    def _stop_here(self) -> None:
        if self.stop():
            raise _StopHere

    def _diverged(self, what: str) -> TrainingError:
        at = self.position
        # A step can be good and its update break the weights all the same.
        whole = all(bool(parameter.isfinite().all()) for parameter in self.stepper.parameters)
        good = at.good_step if whole and at.skipped_steps else max(at.good_step - 1, 0)
        saved = "nothing has been saved" if self.saved is None else f"step {self.saved} is saved in {self.run.path}"
        hint = f"Try a lower --lr (it is {self.config.lr:g})"
        return TrainingError(
            f"Training diverged at step {at.step}: {what}. The last good step was {good}; {saved}.",
            f"{hint}." if self.saved is None else f"{hint}, from there: longshort train TEXT --from {self.run.path}",
        )


@contextmanager
def keeping(run: checkpoint.Run, size: int) -> Iterator[None]:
    """Have a new run to oneself while it is trained; it is deleted where nothing was saved.

    Args:
        run: from `checkpoint.create_run`.
        size: about how many bytes a checkpoint takes.

    Raises:
        OutputError: there is no room for it, or another process has it.
    """
    with run.lock():  # who does not get it deletes nothing: it is another's run
        try:
            durable.require_space(run.path, _CHECKPOINTS_AT_ONCE * size, "the checkpoints of a run")
            yield
        finally:
            if run.latest() is None:  # whatever ended it, there is nothing in it that anyone could use
                shutil.rmtree(run.path, ignore_errors=True)


def recover(run: checkpoint.Run, steps: int | None) -> tuple[model_files.Saved, model_files.Training, Position]:
    """Return the newest whole checkpoint of a run, and how far it had come.

    Args:
        run: from `checkpoint.open_run`, locked.
        steps: another number of steps in all, if it is to have one.

    Raises:
        UsageError: it has made more steps already.
        CheckpointError: no checkpoint is whole.
        OutputError: there is no writing to it.
    """
    durable.require_writable_directory(run.path / "checkpoints")
    saved, training = run.recover()
    position = snapshot.position_of(training)
    if steps is not None and steps < position.step:
        raise UsageError(f"{run.path} has made {position.step:,} steps already.", "Give --steps the number in all.")
    if changed := snapshot.changes(training):
        words = f"The environment has changed: {', '.join(changed)}."
        warnings.warn(f"{words} Training goes on, but not with the bits it would have had.", stacklevel=3)
    return saved, training, position


def further_legs(legs: Legs, position: Position, steps: int | None) -> list[list[int]]:
    """Return the legs of a run that goes on from `position`, to `steps` in all; None leaves them as planned."""
    kept = [list(leg) for leg in legs]
    if steps is None or steps == kept[-1][1]:
        return kept
    return [leg for leg in kept if leg[0] < position.step] + [[position.step, steps]]


def settled(config: S, steps_per_epoch: float) -> S:
    """Return `config` with the number of steps, of looks and of threads that it leaves open.

    Raises:
        UsageError: it asks for steps and epochs.
    """
    if config.steps is not None and config.epochs is not None:
        raise UsageError("Give steps or epochs, not both.")
    steps = config.steps or max(1, round((config.epochs or 10.0) * steps_per_epoch))
    return replace(
        config,
        steps=steps,
        epochs=None,
        validate_every=config.validate_every or max(1, -(-steps // 10)),
        threads=config.threads or torch.get_num_threads(),
    )


def are_legs(legs: Any) -> bool:
    """Return whether a value that was read from a file is `Legs`."""
    try:
        return legs[0][0] == 0 and all(
            type(number) is int and number >= 0 for first, steps in legs for number in (first, steps)
        )
    except (TypeError, ValueError, LookupError):
        return False


def free_directory(name: str) -> Path:
    """Return `name`, or the first of name-2, name-3, ... that does not exist; odd characters become hyphens."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in name[-60:]).strip("-") or "run"
    path, number = Path(stem), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}"), number + 1
    return path


class _StopHere(Exception):  # noqa: N818
    """Training was asked to stop."""
