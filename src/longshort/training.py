"""The training loop: truncated backpropagation through time. It yields events and prints nothing.

    for event in train(TrainConfig(corpus="builtin", steps=500, out="my-run")):
        ...

The state is carried from window to window and cut from the graph there (`detach`), so gradients reach back `seq_len`
steps and no further; all gradients are scaled together so that their L2 norm is at most `clip` (Pascanu, Mikolov and
Bengio 2013, arXiv:1211.5063).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import longshort
from longshort import checkpoint
from longshort.config import TrainConfig
from longshort.errors import CheckpointError, TextError, TrainingError, UsageError
from longshort.evaluation import Evaluation, evaluate
from longshort.model import LanguageModel
from longshort.text import corpus, encoding
from longshort.text.batches import IGNORED, SAMPLERS, Batch, ConsecutiveLanes, Lines, Sampler
from longshort.text.encoding import Part, Survey
from longshort.text.tokenizers import Tokenizer, train_tokenizer

_LOOK_LANES = 32
TOKENS_A_LANE = 65_536
"""The last figure is taken in one lane, and in more where each has this many tokens: what a lane's first tokens lose
from the zero state is then below 0.001 nats a token (docs/log.md has the measurement)."""
LOOK_CHARACTERS = 131_072
"""Looks during training read this much of the held-out text, in lanes; the last figure is of all of it."""


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


Event = Started | Progress | Looked | Finished


class Prepared:
    """A text, its tokenizer, and its training and held-out parts as ids, as a configuration asks for them.

    Args:
        config: which text, which tokenizer, what is held out.
        tokenizer: of a model that is there already; a new one is made of the training part if None.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> None:
        source = corpus.find(config.texts, config.corpus, Path(config.data_dir) if config.data_dir else None)
        self.text = encoding.survey(source)
        cut = encoding.place_of_cut(source, self.text, config.heldout, config.lines)
        if tokenizer is None:
            pieces = encoding.head(source.pieces(), cut)
            tokenizer = train_tokenizer(
                config.tokenizer,
                encoding.closed(pieces) if config.lines else pieces,
                min_freq=config.min_freq,
                vocab_size=config.vocab_size,
            )
        self.tokenizer = tokenizer
        self.train, self.heldout = encoding.encode(source, self.text, tokenizer, cut, config.lines)
        self.heldout_tokens = len(self.heldout.ids) if self.heldout.breaks is None else self.heldout.tokens
        self.look = self.heldout
        """What looks during training read of the held-out part."""
        if self.text.characters - cut > LOOK_CHARACTERS:
            text = encoding.beginning(encoding.tail(source.pieces(), cut), LOOK_CHARACTERS, config.lines)
            self.look = encoding.encode_text(tokenizer, text, config.lines)
        if self.heldout_tokens and not (self.heldout.known and self.look.known):
            raise TextError(
                "The held-out part, the end of the text, shares no symbol with the part that is trained on.",
                "Put the texts in another order, or hold nothing out: --heldout 0",
            )

    def sampler(self, config: TrainConfig) -> Sampler:
        """Return the order in which `config` reads the training part."""
        ids, rest = self.train.ids, (config.batch_size, config.seq_len, config.seed)
        unknown = self.tokenizer.size
        if self.train.breaks is not None:
            return Lines(ids, *rest, breaks=self.train.breaks, unknown=unknown)
        if config.drop_incomplete:
            if config.sampler != "consecutive":
                raise UsageError("drop_incomplete goes with the consecutive sampler.", "Leave out one of the two.")
            return ConsecutiveLanes(ids, *rest, drop_incomplete=True, unknown=unknown)
        return SAMPLERS[config.sampler](ids, *rest, unknown=unknown)


def settle(config: TrainConfig, steps_per_epoch: int, heldout_tokens: int) -> TrainConfig:
    """Return `config` with the number of steps, looks, threads and lanes that it leaves open."""
    if config.steps is not None and config.epochs is not None:
        raise UsageError("Give steps or epochs, not both.")
    if not heldout_tokens and (config.patience or config.eval_lanes):
        raise UsageError("patience and eval_lanes need held-out text, but heldout is 0.", "Leave them out.")
    steps = config.steps or max(1, round((config.epochs or 10.0) * steps_per_epoch))
    return dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        validate_every=config.validate_every or max(1, -(-steps // 10)),
        threads=config.threads or torch.get_num_threads(),
        eval_lanes=None
        if config.lines or not heldout_tokens
        else config.eval_lanes or max(1, min(heldout_tokens // TOKENS_A_LANE, 64)),
    )


def make_model(config: TrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Return a new model with the weights that the configuration's seed gives."""
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model(tokenizer.size), tokenizer)
    if config.init == "normal":
        model.initialise_normal()
    if config.single_bias:
        for name, parameter in model.named_parameters():
            if name.startswith("recurrent.bias_hh"):
                torch.nn.init.zeros_(parameter).requires_grad_(False)
    return model.to(_device(config.device))


class Stepper:
    """One training step after the other: forward, loss, gradients, clipping, optimizer."""

    def __init__(self, model: LanguageModel, config: TrainConfig, steps: int) -> None:
        self.model, self.config, self.steps = model, config, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = model.output.bias.device
        self.state: Any = None
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
            )

    def step(self, number: int, batch: Batch) -> tuple[float, float, float]:
        """Make step `number` (0, 1, ...) on `batch`.

        Returns:
            The loss in nats a token, the norm of the gradients before clipping, the learning rate.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights are as they were.
        """
        model, config = self.model, self.config
        model.train()
        if batch.starts_fresh or self.state is None:
            self.state = model.zero_state(batch.inputs_TB.shape[1])
        self.optimizer.zero_grad(set_to_none=True)
        nats = self._read(batch)
        most = math.inf if config.clip is None else config.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, most, foreach=True).item()
        if not math.isfinite(nats) or not math.isfinite(norm):
            raise TrainingError(
                f"Training diverged at step {number + 1}: the loss is {nats} and the gradients' norm {norm}.",
                f"Try a lower --lr (it is {config.lr:g}); what was saved before, if anything, is intact.",
            )
        rate = learning_rate(config, number, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return nats, norm, rate

    def _read(self, batch: Batch) -> float:
        """Add the gradients of the mean loss of `batch` and return it, in nats a token.

        Lines longer than `seq_len` are read in windows of it, in which the rows that have ended, the last ones, are
        left out: the loss is that of whole lines, gradients reach back as far as in any other text.
        """
        total, tokens, seq_len = 0.0, max(batch.tokens, 1), self.config.seq_len
        counted_TB = batch.targets_TB != IGNORED
        for first in range(0, len(batch.inputs_TB), seq_len):
            going_on = np.flatnonzero(counted_TB[first:].any(axis=0))
            if first and not len(going_on):
                break
            rows = slice(int(going_on[-1]) + 1 if first else None)
            window = (slice(first, first + seq_len), rows)
            inputs = torch.from_numpy(np.ascontiguousarray(batch.inputs_TB[window])).to(self.device)
            targets = torch.from_numpy(np.ascontiguousarray(batch.targets_TB[window])).to(self.device)
            state = tuple(tensor.detach()[:, rows] for tensor in self.state)
            logits_TBV, self.state = self.model(inputs, state)
            loss = F.cross_entropy(logits_TBV.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (0, 1, ...): a linear rise, then a cosine fall to `final_lr` of the highest."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train(config: TrainConfig, prepared: Prepared | None = None) -> Iterator[Event]:
    """Train a model as `config` says and keep it in a run directory.

    Args:
        config: what to read, the model, the training.
        prepared: the text, where it has been read already.

    Yields:
        `Started`, then `Progress` and `Looked` as they come, then `Finished`.

    Raises:
        LongshortError: a text, a value or a place that cannot be used; nothing is left behind then.
        TrainingError: the loss is no longer finite.
    """
    prepared = prepared or Prepared(config)
    sampler = prepared.sampler(config)
    config = settle(config, sampler.steps_per_epoch, prepared.heldout_tokens)
    torch.set_num_threads(config.threads or 1)
    tokenizer = prepared.tokenizer
    model = make_model(config, tokenizer)
    path = Path(config.out) if config.out else free_directory(f"{Path(prepared.text.name).stem}-run")
    # Absolute, so that the run finds its text again from wherever it is looked at.
    texts = tuple(str(Path(text).absolute()) for text in config.texts)
    data_dir = str(Path(config.data_dir).absolute()) if config.data_dir else None
    config = dataclasses.replace(config, out=str(path), texts=texts, data_dir=data_dir)
    saved_config: dict[str, Any] = {"longshort_version": longshort.__version__, "text_name": prepared.text.name}
    saved_config |= {"text_sha256": prepared.text.sha256, "train": config.to_dict()}
    run = checkpoint.create_run(path, saved_config, tokenizer.to_json())
    try:
        tokens = prepared.train.tokens if config.lines else len(prepared.train.ids)
        yield Started(config, path, model, tokenizer, prepared.text, tokens, sampler.steps_per_epoch)
        yield from _train(config, prepared, sampler, model, run)
    finally:
        if run.latest() is None:  # whatever ended it, there is nothing in it that anyone could use
            shutil.rmtree(path, ignore_errors=True)


def _train(
    config: TrainConfig, prepared: Prepared, sampler: Sampler, model: LanguageModel, run: checkpoint.Run
) -> Iterator[Event]:
    """Make all steps of a run that has been settled and started."""
    start, tokenizer = time.perf_counter(), prepared.tokenizer
    steps, look_every = config.steps or 1, config.validate_every or 1
    stepper = Stepper(model, config, steps)
    extra = {"text_name": prepared.text.name, "text_sha256": prepared.text.sha256}
    look_part, look_lanes = prepared.look, 1 if config.lines else _LOOK_LANES
    best, best_step, looks_without_gain, done = math.inf, 0, 0, 0
    report_every = max(1, min(steps // 100, 50))
    window = _Window()
    while done < steps and not (config.patience and looks_without_gain >= config.patience):
        batch = sampler.batch(done)
        nats, norm, rate = stepper.step(done, batch)
        done += 1
        window.add(nats, batch.tokens)
        if done % report_every == 0 or done == steps:
            progress = window.progress(done, steps)
            metrics = {"nats_per_token": progress.nats_per_token, "learning_rate": rate, "gradient_norm": norm}
            run.log_metrics({"step": done, **metrics})
            run.log_timing({"step": done, "tokens_per_second": progress.tokens_per_second})
            yield progress
            window = _Window()
        if done % look_every == 0 or done == steps:
            paused = time.perf_counter()
            heldout = _look(model, tokenizer, look_part, look_lanes, done) if prepared.heldout_tokens else None
            is_best = heldout is None or heldout.nats_per_token < best
            if heldout is not None:
                look = {"heldout_nats_per_token": heldout.nats_per_token, "protocol": heldout.protocol}
                run.log_metrics({"step": done, **look})
                best = min(best, heldout.nats_per_token)
            best_step = done if is_best else best_step
            looks_without_gain = 0 if is_best else looks_without_gain + 1
            run.save(done, model.weights(), model.config.to_dict(), tokenizer.to_json(), extra, best=is_best)
            if heldout is not None:
                yield Looked(done, heldout, is_best, model)
            window.start += time.perf_counter() - paused
    final = None
    if prepared.heldout_tokens:
        model.load_weights(checkpoint.load_model(run.path).weights)
        final = _look(model, tokenizer, prepared.heldout, config.eval_lanes or 1, best_step)
    result = {"steps": done, "best_step": best_step, "heldout": final.to_dict() if final else None}
    run.write_json("result.json", result)
    yield Finished(done, best_step, final, time.perf_counter() - start, stopped_early=done < steps)


def _look(model: LanguageModel, tokenizer: Tokenizer, part: Part, lanes: int, step: int) -> Evaluation:
    """Evaluate, and refuse a figure that is not finite before anything is saved with it."""
    found = evaluate(model, tokenizer, part, lanes=lanes)
    if not math.isfinite(found.nats_per_token):
        raise TrainingError(
            f"Training diverged by step {step}: the held-out text has {found.nats_per_token} nats a token.",
            "Try a lower --lr; what was saved before, if anything, is intact.",
        )
    return found


class _Window:
    """What has happened since the last report."""

    def __init__(self) -> None:
        self.steps, self.nats, self.tokens, self.start = 0, 0.0, 0, time.perf_counter()

    def add(self, nats_per_token: float, tokens: int) -> None:
        self.steps += 1
        self.nats += nats_per_token * tokens
        self.tokens += tokens

    def progress(self, done: int, steps: int) -> Progress:
        seconds = time.perf_counter() - self.start
        left = seconds / self.steps * (steps - done)
        return Progress(done, steps, self.nats / max(self.tokens, 1), self.tokens / seconds, left)


def run_config(run: Path) -> TrainConfig:
    """Return the configuration that `run` was trained with.

    Raises:
        UsageError, CheckpointError: there is no run, or its configuration is not one of ours.
    """
    saved = checkpoint.open_run(run).config()
    if not isinstance(saved.get("train"), dict) or not isinstance(saved.get("text_sha256"), str):
        raise CheckpointError(f"{run}/config.json is not the configuration of a training run.", "Restore the run.")
    return TrainConfig.from_dict(saved["train"], f"{run}/config.json")


def heldout_part(run: Path, tokenizer: Tokenizer, data_dir: Path | None = None) -> Part:
    """Return the ids of the held-out part of the text that `run` was trained on.

    Args:
        run: the run directory.
        tokenizer: the run's.
        data_dir: where a named corpus is now, if no longer where it was.

    Raises:
        UsageError: the run held nothing out, or its text is no longer what it was.
    """
    config, sha256 = run_config(run), checkpoint.open_run(run).config()["text_sha256"]
    data_dir = data_dir or (Path(config.data_dir) if config.data_dir else None)
    source = corpus.find(config.texts, config.corpus, data_dir)
    found = encoding.survey(source)
    if found.sha256 != sha256:
        raise UsageError(
            f"The text of {run} has changed: it was {sha256[:12]}, it is {found.sha256[:12]} (SHA-256).",
            "Restore the text, or evaluate the model on a file: longshort eval MODEL TEXT",
        )
    if not config.heldout:
        raise UsageError(f"{run} held nothing out.", "Evaluate it on a text: longshort eval MODEL TEXT")
    cut = encoding.place_of_cut(source, found, config.heldout, config.lines)
    return encoding.encode(source, found, tokenizer, cut, config.lines)[1]


def free_directory(name: str) -> Path:
    """Return `name`, or the first of name-2, name-3, ... that does not exist; odd characters become hyphens."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in name[-60:]).strip("-") or "run"
    path, number = Path(stem), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}"), number + 1
    return path


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device that PyTorch can use here.", "Leave out --device cuda.")
    return torch.device(name)
