"""The loop of a run that has been settled and started: steps, reports, looks, checkpoints. It yields events.

A look at the held-out text is made between two steps, and whether it has been made is part of the position: a run
that is stopped between a step and its look makes the look when it is resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from longshort import checkpoint, snapshot
from longshort.config import TrainConfig
from longshort.errors import CheckpointError, TrainingError
from longshort.evaluation import Evaluation, evaluate
from longshort.model import LanguageModel
from longshort.snapshot import Position
from longshort.text.batches import Sampler
from longshort.text.encoding import Part, Survey
from longshort.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from longshort.training import Prepared, Stepper

LOOK_CHARACTERS = 131_072
"""Looks during training read this much of the held-out text; the last figure is of all of it."""
SECONDS_BETWEEN_SAVES = 300.0
MOST_SKIPPED = 3
"""A run stops when the loss or a gradient was not finite in this many steps."""

Stop = Callable[[], bool]
Legs = Sequence[Sequence[int]]
"""(first step, number of steps planned from there on) of each part of a run: one, and one more a `resume --steps`."""


@dataclass(frozen=True, slots=True)
class Started:
    """Everything is settled and the run directory exists."""

    config: TrainConfig
    run: Path
    model: LanguageModel
    tokenizer: Tokenizer
    text: Survey
    train_tokens: int
    steps_per_epoch: float
    unknown_tokens: int = 0
    """Training tokens outside the vocabulary of the model that training starts from: read, never predicted."""
    resumed_at: int | None = None
    """The step that training goes on from; None in a new run."""
    processes: int = 1
    vectors: int | None = None
    """How many symbols began with a vector of the file that `config.vectors` names."""


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
    """The held-out text was looked at and a checkpoint saved."""

    step: int
    heldout: Evaluation
    best: bool
    model: LanguageModel


@dataclass(frozen=True, slots=True)
class Finished:
    """Training has ended; the best weights were measured once more, on all held-out text."""

    step: int
    best_step: int
    heldout: Evaluation | None
    seconds: float
    stopped_early: bool


@dataclass(frozen=True, slots=True)
class Stopped:
    """Training was asked to stop and has saved where it is, if it had made a step; `resume` goes on from there."""

    step: int
    steps: int
    run: Path


Event = Started | Progress | Skipped | Looked | Finished | Stopped


class Loop:
    """All steps of a run.

    Args:
        config: every value settled.
        legs: what was planned, and from which step on.
        prepared: the text.
        sampler: the order in which it is read.
        stepper: model and optimizer, in the state of `position`.
        run: where checkpoints and logs go.
        stop: asked after each step, and in long evaluations, whether to stop.
        position: of the latest checkpoint; None in a new run.
        vectors: as in `Started`.
    """

    def __init__(
        self,
        config: TrainConfig,
        legs: Legs,
        prepared: Prepared,
        sampler: Sampler,
        stepper: Stepper,
        run: checkpoint.Run,
        stop: Stop,
        position: Position | None = None,
        vectors: int | None = None,
    ) -> None:
        self.vectors = vectors
        self.config, self.legs, self.prepared, self.sampler = config, legs, prepared, sampler
        self.stepper, self.model, self.run, self.stop = stepper, stepper.model, run, stop
        self.position = position or Position()
        self.saved = position.step if position else None
        """The step of the latest checkpoint."""
        self.saved_at = self.window_start = time.perf_counter()

    def events(self) -> Iterator[Event]:
        """Train to the end. Who looks at an event may draw random numbers without changing those of the training."""
        for event in self._events():
            state = torch.get_rng_state()
            yield event
            torch.set_rng_state(state)

    def _events(self) -> Iterator[Event]:
        begin, config, at, prepared = time.perf_counter(), self.config, self.position, self.prepared
        steps = self.legs[-1][1]
        yield Started(
            config,
            self.run.path,
            self.model,
            prepared.tokenizer,
            prepared.text,
            prepared.train.tokens if config.lines else len(prepared.train.ids),
            self.sampler.steps_per_epoch,
            prepared.unknown_tokens,
            self.saved,
            self.stepper.team.size,
            self.vectors,
        )
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
                if at.step >= steps or (config.patience and at.looks_without_gain >= config.patience):
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
        batch = self.sampler.batch(at.step)
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
        """Look at the held-out text, if there is any, and save."""
        at, paused = self.position, time.perf_counter()
        heldout = self._evaluate(self.prepared.look) if self.prepared.heldout_tokens else None
        is_best = heldout is None or at.best_nats is None or heldout.nats_per_token < at.best_nats
        if heldout is not None:
            look = {"heldout_nats_per_token": heldout.nats_per_token, "protocol": heldout.protocol}
            self.run.log_metrics({"step": at.step, **look})
            at.best_nats = heldout.nats_per_token if is_best else at.best_nats
        at.best_step = at.step if is_best else at.best_step
        at.looks_without_gain = 0 if is_best else at.looks_without_gain + 1
        at.looked = at.step
        self._save()
        self.window_start += time.perf_counter() - paused
        return Looked(at.step, heldout, is_best, self.model) if heldout is not None else None

    def _save(self) -> None:
        """Publish a checkpoint of where training is; what is not finite never gets there."""
        at, text = self.position, self.prepared.text
        weights = self.model.weights()
        state, random = self.stepper.collect(state=not self.sampler.starts_fresh(at.step))
        taken = snapshot.take(at, self.stepper.named_parameters, self.stepper.optimizer, state, random)
        for name, array in {**weights, **taken.arrays}.items():
            if not np.isfinite(array).all():
                raise self._diverged(f"{name} holds numbers that are not finite at step {at.step}")
        extra = {"text_name": text.name, "text_sha256": text.sha256}
        config, tokenizer = self.model.config.to_dict(), self.prepared.tokenizer.to_json()
        self.run.save(at.step, weights, config, tokenizer, extra, best=at.best_step == at.step, training=taken)
        self.saved, self.saved_at = at.step, time.perf_counter()

    def _finish(self, begin: float) -> Finished:
        """Measure the best weights on all held-out text, unless that has been done already."""
        at, early = self.position, self.position.step < self.legs[-1][1]
        with suppress(CheckpointError):  # `resume` has told it
            found = self.run.result()
            if found is not None and found.get("steps") == at.step:
                heldout = Evaluation(**found["heldout"]) if found["heldout"] else None
                return Finished(at.step, found["best_step"], heldout, time.perf_counter() - begin, early)
        final, best_step = None, at.best_step
        if self.prepared.heldout_tokens:
            best = checkpoint.load_model(self.run.path)
            best_step = best.step or at.best_step
            self.model.load_weights(best.weights)
            final = self._evaluate(self.prepared.heldout, self.config.eval_lanes)
        result = {"steps": at.step, "best_step": best_step, "skipped_steps": at.skipped_steps}
        self.run.write_result({**result, "heldout": final.to_dict() if final else None})
        return Finished(at.step, best_step, final, time.perf_counter() - begin, early)

    def _evaluate(self, part: Part, lanes: int | None = None) -> Evaluation:
        """Evaluate, and refuse a figure that is not finite before anything is saved with it."""
        found = evaluate(self.model.reader(), self.prepared.tokenizer, part, lanes=lanes, pause=self._stop_here)
        if not math.isfinite(found.nats_per_token):
            raise self._diverged(f"the held-out text has {found.nats_per_token} nats a token")
        return found

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


class _StopHere(Exception):  # noqa: N818
    """Training was asked to stop."""
