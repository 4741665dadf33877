"""The training loop: truncated backpropagation through time. It yields events and prints nothing.

    for event in train(TrainConfig(corpus="builtin", steps=500, out="my-run")):
        ...
    for event in resume("my-run", steps=1000):
        ...

A run that was stopped and resumed, wherever and however often, ends with the bits of the run that never was: what a
step reads and its rate are functions of its number, and everything else that it depends on is in `snapshot.py`.

The state is carried from window to window and cut from the graph there (`detach`), so gradients reach back `seq_len`
steps and no further; all gradients are scaled together so that their L2 norm is at most `clip` (Pascanu, Mikolov and
Bengio 2013, arXiv:1211.5063).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import longshort
from longshort import checkpoint, durable, embeddings, snapshot
from longshort.cells import State
from longshort.config import MODEL_OPTIONS, ModelConfig, TrainConfig
from longshort.errors import CheckpointError, TextError, TrainingError, UsageError
from longshort.evaluation import lanes_for
from longshort.loop import LOOK_CHARACTERS as LOOK_CHARACTERS
from longshort.loop import Event as Event
from longshort.loop import Finished as Finished
from longshort.loop import Legs, Loop, Stop
from longshort.loop import Looked as Looked
from longshort.loop import Progress as Progress
from longshort.loop import Skipped as Skipped
from longshort.loop import Started as Started
from longshort.loop import Stopped as Stopped
from longshort.model import LanguageModel
from longshort.processes import COLLECT, END, START, STEP, Team
from longshort.text import corpus, encoding
from longshort.text.batches import IGNORED, SAMPLERS, Batch, ConsecutiveLanes, Lines, Sampler
from longshort.text.encoding import Part, Survey
from longshort.text.tokenizers import Tokenizer, from_json, train_tokenizer

_CHECKPOINTS_AT_ONCE = 4
"""The best, the latest, the one before, and the one that is being written."""


class Prepared:
    """A text, its tokenizer, and its training and held-out parts as ids, as a configuration asks for them.

    Args:
        config: which text, which tokenizer, what is held out.
        tokenizer: of the model that is trained on; otherwise that of `config.from_model`, or one made of the training
            part.
        sha256: what the text was when the run began.

    Raises:
        TextError, CorpusError, UsageError: the text cannot be used, or is not the one with that hash.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None, sha256: str | None = None) -> None:
        source = corpus.find(config.texts, config.corpus, Path(config.data_dir) if config.data_dir else None)
        self.text = encoding.survey(source)
        if sha256 is not None:
            _require_same_text(self.text, sha256, str(config.out))
        if tokenizer is None and config.from_model is not None:
            tokenizer = from_json(checkpoint.load_model(config.from_model).tokenizer_json)
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
        self.unknown_tokens = self.train.tokens - self.train.known
        if not self.train.known:
            raise TextError("The text shares no symbol with the vocabulary of the model.", "Train a new model on it.")
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

    def sampler(self, config: TrainConfig, team: Team | None = None) -> Sampler:
        """Return the order in which `config` reads the training part, and of a team which rows are this process's."""
        team = team or Team()
        ids, rest = self.train.ids, (config.batch_size, config.seq_len, config.seed, team.rank, team.size)
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
        eval_lanes=None if config.lines or not heldout_tokens else config.eval_lanes or lanes_for(heldout_tokens),
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
    if config.freeze_embedding and model.embedding is not None:
        model.embedding.weight.requires_grad_(False)
    return model.to(_device(config.device))


class Stepper:
    """One training step after the other: forward, loss, gradients, clipping, optimizer.

    Args:
        model: to be trained.
        config: how.
        steps: planned in all, which the learning rate goes by.
        team: the processes that train it; each makes every step with rows of its own.
        stop: whether this process was asked to stop.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        steps: int,
        team: Team | None = None,
        stop: Stop = lambda: False,
    ) -> None:
        self.model, self.config, self.steps = model, config, steps
        self.team, self.stop = team or Team(), stop
        self.stopping = False
        """Whether any process was asked to stop, when the last step was made."""
        self.named_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named_parameters.values())
        self.device = model.output.bias.device
        self.state: Any = None
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
            )

    def put_back(self, training: checkpoint.Training) -> None:
        """Go on from what a checkpoint holds beside the weights; CheckpointError where it is another model's."""
        rank, rows = self.team.rank, self.config.batch_size // self.team.size
        like = self.model.zero_state(self.config.batch_size)
        state = snapshot.put_back(training, self.named_parameters, self.optimizer, like, rank)
        self.state = state and tuple(tensor[:, rank * rows : (rank + 1) * rows].contiguous() for tensor in state)

    def step(self, number: int, batch: Batch) -> tuple[float, float, float]:
        """Make step `number` (0, 1, ...) on `batch`.

        Returns:
            The loss in nats a token, the norm of the gradients before clipping, the learning rate. Where loss or
            norm is not finite, the weights are as they were, and the next step starts from a zero state.
        """
        self.model.train()
        if batch.starts_fresh or self.state is None:
            self.state = self.model.zero_state(batch.inputs_TB.shape[1])
        with self.team.order(STEP, number, self.steps):
            self.optimizer.zero_grad(set_to_none=True)
            nats = self._read(batch)
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            nats, stopping = self.team.add(gradients, [nats, float(self.stop())])
        self.stopping = stopping > 0
        total = torch.nn.utils.get_total_norm(gradients, foreach=True)
        norm, clip = total.item(), self.config.clip
        if clip is not None and clip < norm < math.inf:  # a pass over all gradients, which most steps can do without
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, total, foreach=True)
        rate = learning_rate(self.config, number, self.steps)
        if not math.isfinite(nats) or not math.isfinite(norm):
            self.state = None  # it may hold what is not finite
            return nats, norm, rate
        for group in self.optimizer.param_groups:
            group["lr"] = min(rate, float(np.finfo(np.float32).max))  # what is larger, PyTorch cannot read
        self.optimizer.step()
        return nats, norm, rate

    def collect(self, state: bool) -> tuple[State | None, dict[str, list[Tensor]]]:
        """Return the carried state of all rows, if `state`, and the random numbers of every process, to process 0.

        Raises:
            TrainingError: the processes no longer have the same weights.
        """
        team = self.team
        with team.order(COLLECT, int(state)):
            digests = team.collect(self._digest()) if team.size > 1 else []
            rows = [team.collect(tensor) for tensor in self.state or ()] if state else []
            random = {kind: team.collect(kept) for kind, kept in snapshot.random_numbers(self.device).items()}
        if strayed := [rank for rank, found in enumerate(digests) if not torch.equal(found, digests[0])]:
            raise TrainingError(
                f"Process {strayed[0]} has other weights than process 0.",
                "Processors of different kinds may compute differently: train on one kind.",
            )
        return tuple(torch.cat(tensors, dim=1) for tensors in rows if tensors) or None, random

    def _digest(self) -> Tensor:
        content = b"".join(array.tobytes() for array in self.model.weights().values())
        return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)

    def _read(self, batch: Batch) -> float:
        """Add the gradients of what these rows are of the mean loss of the batch and return it, in nats a token.

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
            loss, self.state = self.model.loss(inputs, targets, state, tokens)
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


def train(
    config: TrainConfig,
    prepared: Prepared | None = None,
    stop: Stop = lambda: False,
    team: Team | None = None,
) -> Generator[Event, None, None]:
    """Train a model as `config` says and keep it in a run directory.

    Args:
        config: what to read, the model, the training.
        prepared: the text, where it has been read already.
        stop: asked after each step whether to stop there; `resume` goes on later.
        team: the processes that train together, of which this is process 0; the others call `follow`.

    Yields:
        `Started`, then `Progress`, `Skipped` and `Looked` as they come, then `Finished` or `Stopped`.

    Raises:
        LongshortError: a text, a value or a place that cannot be used; nothing is left behind then.
        TrainingError: the loss is no longer finite.
    """
    team = team or Team()
    prepared = prepared or Prepared(config)
    sampler = prepared.sampler(config, team)
    config = settle(config, sampler.steps_per_epoch, prepared.heldout_tokens)
    torch.set_num_threads(config.threads or 1)
    tokenizer = prepared.tokenizer
    model = make_model(config, tokenizer)
    if config.from_model is not None:
        _start_from(config.from_model, model)
    found = None
    if config.vectors is not None and model.embedding is not None:
        with torch.no_grad():
            filled = model.embedding.weight.detach().cpu().numpy().copy()
            found = embeddings.fill(filled, tokenizer, config.vectors)
            model.embedding.weight.copy_(torch.from_numpy(filled))
    path = Path(config.out) if config.out else free_directory(f"{Path(prepared.text.name).stem}-run")
    # Absolute, so that the run finds its text again from wherever it is looked at.
    config = _with_absolute_paths(dataclasses.replace(config, out=str(path)))
    legs = [[0, config.steps or 1]]
    run = checkpoint.create_run(path, _run_config(config, prepared.text, legs), tokenizer.to_json())
    try:
        with run.lock():
            durable.require_space(
                path, _CHECKPOINTS_AT_ONCE * _checkpoint_size(model, config), "the checkpoints of a run"
            )
            stepper = Stepper(model, config, config.steps or 1, team, stop)
            _lead(team, config, prepared, model)
            yield from Loop(config, legs, prepared, sampler, stepper, run, stop, vectors=found).events()
    finally:
        if run.latest() is None:  # whatever ended it, there is nothing in it that anyone could use
            shutil.rmtree(path, ignore_errors=True)


def resume(
    path: str | Path,
    steps: int | None = None,
    texts: Sequence[str] = (),
    data_dir: str | None = None,
    stop: Stop = lambda: False,
    team: Team | None = None,
) -> Generator[Event, None, None]:
    """Go on with a run from its newest whole checkpoint, bit for bit as if it had never stopped.

    Args:
        path: the run directory.
        steps: another number of steps in all than was planned. From the step that the run has reached, the learning
            rate is then the one that a run of that many steps has there, and `patience` counts anew.
        texts: where the text is now, if it has moved.
        data_dir: where a named corpus is now.
        stop: as in `train`.
        team: as in `train`.

    Yields:
        As `train`.

    Raises:
        UsageError: there is no run, its text has changed, or it has made more steps than `steps` already.
        CheckpointError: no checkpoint of it is whole.
        OutputError: it cannot be written, or another process trains it.
        TrainingError: the loss is no longer finite.
    """
    team, config, run = team or Team(), run_config(Path(path)), checkpoint.open_run(path)
    saved_config = run.config()
    legs = [list(leg) for leg in saved_config["legs"]]
    durable.require_writable_directory(run.path / "checkpoints")
    with run.lock():
        saved, training = run.recover()
        position = snapshot.position_of(training)
        if steps is not None and steps < position.step:
            raise UsageError(f"{path} has made {position.step:,} steps already.", "Give --steps the number in all.")
        config = dataclasses.replace(config, out=str(path))
        if texts:
            config = dataclasses.replace(config, texts=tuple(texts), corpus=None)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        prepared = Prepared(config, from_json(saved.tokenizer_json), saved_config["text_sha256"])
        config = _with_absolute_paths(config)
        torch.set_num_threads(config.threads or 1)
        if changed := snapshot.changes(training):
            words = f"The environment has changed: {', '.join(changed)}."
            warnings.warn(f"{words} Training goes on, but not with the bits it would have had.", stacklevel=2)
        model = make_model(config, prepared.tokenizer)
        model.load_weights(saved.weights)
        durable.require_space(run.path / "checkpoints", _checkpoint_size(model, config))
        run.rewind(saved, training, position.best_step)
        if steps is not None and steps != legs[-1][1]:
            legs = [leg for leg in legs if leg[0] < position.step] + [[position.step, steps]]
        config = dataclasses.replace(config, steps=legs[-1][1])
        content = _run_config(config, prepared.text, legs)
        if content != {**saved_config, "longshort_version": longshort.__version__}:
            run.write_config(content)
        sampler, stepper = prepared.sampler(config, team), Stepper(model, config, legs[-1][1], team, stop)
        stepper.put_back(training)
        _lead(team, config, prepared, model, training)
        yield from Loop(config, legs, prepared, sampler, stepper, run, stop, position).events()


_WEIGHT = "weight."


def _lead(
    team: Team,
    config: TrainConfig,
    prepared: Prepared,
    model: LanguageModel,
    training: checkpoint.Training | None = None,
) -> None:
    """Let the others of a team make ready to train the same model."""
    if team.size == 1:
        return
    brief = {"config": config.to_dict(), "sha256": prepared.text.sha256, "tokenizer": prepared.tokenizer.to_json()}
    weights = {_WEIGHT + name: array for name, array in model.weights().items()}
    with team.order(START):
        team.tell({**brief, "training": training and training.values}, weights | (training.arrays if training else {}))


def follow(team: Team, stop: Stop = lambda: False) -> int:
    """Train under the lead of process 0, which calls `train` or `resume`; return the exit status that it ends with.

    Args:
        team: the processes, of which this is not the first. It learns everything from process 0 but the text, which
            it reads under the same path.
        stop: whether this process was asked to stop; all stop then.

    Raises:
        UsageError, TextError: the text is not here, or another one.
        TrainingError: another process is gone.
    """
    what, number, second = team.next_order()
    if what == END:
        team.part()
        return number
    brief, arrays = team.tell(None)
    config, tokenizer = TrainConfig.from_dict(brief["config"]), from_json(brief["tokenizer"])
    prepared = Prepared(config, tokenizer, brief["sha256"])
    torch.set_num_threads(config.threads or 1)
    model, sampler = make_model(config, tokenizer), prepared.sampler(config, team)
    model.load_weights({name.removeprefix(_WEIGHT): arrays.pop(name) for name in list(arrays) if _WEIGHT in name[:7]})
    stepper = Stepper(model, config, 1, team, stop)
    # Other rows must not lose the same units by dropout.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, team.rank]).generate_state(1, np.uint64)[0]))
    if brief["training"] is not None:
        stepper.put_back(checkpoint.Training(arrays, brief["training"]))
    while True:
        what, number, second = team.next_order()
        if what == STEP:
            stepper.steps = second
            stepper.step(number, sampler.batch(number))
        elif what == COLLECT:
            stepper.collect(bool(number))
        else:
            team.part()
            return number


def _start_from(source: str, model: LanguageModel) -> None:
    """Give `model` the weights of the run or model `source`.

    Raises:
        UsageError: that is another model.
    """
    saved = checkpoint.load_model(source)
    theirs, ours = ModelConfig.from_dict(saved.model, f"{saved.path}/config.json"), model.config
    for name in MODEL_OPTIONS:
        if getattr(theirs, name) != getattr(ours, name):
            found, wanted = getattr(theirs, name), getattr(ours, name)
            raise UsageError(f"{source} has {name} {found}, not {wanted}.", f"Leave out {name}: --from brings it.")
    model.load_weights(saved.weights)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return `config` with paths that hold wherever the run is looked at from."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path else None

    texts = tuple(text if text in corpus.STDIN else str(Path(text).absolute()) for text in config.texts)
    paths: dict[str, Any] = {name: absolute(getattr(config, name)) for name in ("data_dir", "from_model", "vectors")}
    return dataclasses.replace(config, texts=texts, **paths)


def _run_config(config: TrainConfig, text: Survey, legs: Legs) -> dict[str, Any]:
    """Return what a run's config.json holds."""
    content = {"longshort_version": longshort.__version__, "text_name": text.name, "text_sha256": text.sha256}
    return {**content, "legs": [list(leg) for leg in legs], "train": config.to_dict()}


def _checkpoint_size(model: LanguageModel, config: TrainConfig) -> int:
    """Return about how many bytes a checkpoint takes: weights, what the optimizer keeps of each, and small files."""
    copies = 3 if config.optimizer == "adamw" else 1
    state = sum(tensor.numel() for tensor in model.zero_state(config.batch_size))
    return 4 * (copies * sum(p.numel() for p in model.parameters()) + state) + (1 << 17)


def run_config(run: Path) -> TrainConfig:
    """Return the configuration that `run` was trained with.

    Raises:
        UsageError, CheckpointError: there is no run, or its configuration is not one of ours.
    """
    saved = checkpoint.open_run(run).config()
    train, sha256, legs = saved.get("train"), saved.get("text_sha256"), saved.get("legs")
    if not isinstance(train, dict) or not isinstance(sha256, str) or not _are_legs(legs):
        raise CheckpointError(f"{run}/config.json is not the configuration of a training run.", "Restore the run.")
    return TrainConfig.from_dict(train, f"{run}/config.json")


def _are_legs(legs: Any) -> bool:
    try:
        return legs[0][0] == 0 and all(
            type(number) is int and number >= 0 for first, steps in legs for number in (first, steps)
        )
    except (TypeError, ValueError, LookupError):
        return False


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
    _require_same_text(found, sha256, str(run))
    if not config.heldout:
        raise UsageError(f"{run} held nothing out.", "Evaluate it on a text: longshort eval MODEL TEXT")
    cut = encoding.place_of_cut(source, found, config.heldout, config.lines)
    return encoding.encode(source, found, tokenizer, cut, config.lines)[1]


def _require_same_text(text: Survey, sha256: str, run: str) -> None:
    if text.sha256 != sha256:
        raise UsageError(
            f"The text of {run} has changed: it was {sha256[:12]}, it is {text.sha256[:12]} (SHA-256).",
            "Restore the text. The model itself can be used on another: longshort eval, or train --from",
        )


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
