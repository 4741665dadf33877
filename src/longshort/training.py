"""A language model's run from its configuration: text, model; started or resumed. It yields events, prints nothing.

    for event in train(TrainConfig(corpus="builtin", steps=500, out="my-run")):
        ...
    for event in resume("my-run", steps=1000):
        ...

A run that was stopped and resumed, wherever and however often, ends with the bits of the run that never was: what a
step reads and its rate are functions of its number, and everything else that it depends on is in `snapshot.py`.

The state is carried from window to window and cut from the graph there (`detach`), so gradients reach back `seq_len`
steps and no further.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longshort
from longshort import checkpoint, documents, durable, embeddings, loop, machine, memory, model_files
from longshort.cells import State
from longshort.config import MODEL_OPTIONS, ModelConfig, TrainConfig
from longshort.errors import CheckpointError, TextError, TrainingError, UsageError
from longshort.evaluation import Evaluation, evaluate, lanes_for
from longshort.loop import Finished as Finished
from longshort.loop import Legs, Loop, are_legs, free_directory, further_legs, keeping, recover, settled
from longshort.loop import Looked as Looked
from longshort.loop import Progress as Progress
from longshort.loop import Skipped as Skipped
from longshort.loop import Stopped as Stopped
from longshort.model import LanguageModel
from longshort.processes import COLLECT, END, START, STEP, Team
from longshort.text import builtin, corpus, encoding
from longshort.text.batches import IGNORED, SAMPLERS, Batch, ConsecutiveLanes, Lines, Sampler
from longshort.text.encoding import Part, Survey
from longshort.text.tokenizers import Tokenizer, from_json, train_tokenizer
from longshort.updates import Stepper, Stop, checkpoint_size, device

LOOK_CHARACTERS = 131_072
"""Looks during training read this much of the held-out text; the last figure is of all of it."""


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
        source, self.text = _find(config, sha256)
        if tokenizer is None and config.from_model is not None:
            tokenizer = from_json(_load(config.from_model)[0].tokenizer_json)
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
            if config.from_model is None:
                raise TextError(
                    f"As symbols of the tokenizer {tokenizer.name}, the text to train on has none after the first.",
                    "Give a longer text, or another tokenizer.",
                )
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


Event = Started | loop.Event


def settle(config: TrainConfig, steps_per_epoch: int, heldout_tokens: int) -> TrainConfig:
    """Return `config` with the number of steps, looks, threads and lanes that it leaves open."""
    for name in ("patience", "eval_lanes"):
        if getattr(config, name) and not heldout_tokens:
            raise UsageError(f"{name} needs held-out text, but heldout is 0.", "Leave it out.")
    lanes = None if config.lines or not heldout_tokens else config.eval_lanes or lanes_for(heldout_tokens)
    return dataclasses.replace(settled(config, steps_per_epoch), eval_lanes=lanes)


_SURELY = 1.25
"""Training is refused where the estimate, which is right to a fifth, is so many times the memory that there is."""


def require_memory(config: TrainConfig, prepared: Prepared, team: Team | None = None) -> None:
    """Refuse what surely does not fit: Linux promises memory that it does not have, and ends who takes it by a signal.

    Raises:
        TrainingError: accordingly.
    """
    part, team = prepared.train, team or Team()
    rows = config.batch_size if part.breaks is None else len(part.breaks) - 1
    columns = min(config.seq_len, max(part.tokens // rows, 1))  # at least: the longest lines have more
    tokens = columns * config.batch_size // team.size
    needed, there = memory.training_needs(config, prepared.tokenizer.size, tokens), machine.memory()
    if config.device == "cpu" and there and needed > _SURELY * there:
        raise TrainingError(
            f"This training needs about {needed / 1e9:,.1f} GB of memory; there are {there / 1e9:,.1f} GB.",
            "Lower --batch-size or --seq-len, or --hidden and --layers.",
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
    return model.to(device(config.device))


class TextStepper(Stepper[LanguageModel, Batch]):
    """Steps of a language model: truncated backpropagation through time, the state carried from window to window."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        steps: int,
        team: Team | None = None,
        stop: Stop = lambda: False,
    ) -> None:
        super().__init__(model, config, steps, team, stop)
        self.seq_len = config.seq_len

    def zero_state(self, rows: int) -> State:
        """Return the state before a text's first symbol."""
        return self.model.zero_state(rows)

    def read(self, batch: Batch) -> float:
        """As of every stepper.

        Lines longer than `seq_len` are read in windows of it, in which the rows that have ended, the last ones, are
        left out: the loss is that of whole lines, gradients reach back as far as in any other text.
        """
        if batch.starts_fresh or self.state is None:
            self.state = self.zero_state(batch.inputs_TB.shape[1])
        total, tokens, seq_len = 0.0, max(batch.tokens, 1), self.seq_len
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


class TextTask:
    """What the loop trains: a language model on the text of a run.

    Args:
        config: every value settled.
        prepared: the text.
        sampler: the order in which it is read.
        model: to be looked at.
    """

    def __init__(self, config: TrainConfig, prepared: Prepared, sampler: Sampler, model: LanguageModel) -> None:
        self.config, self.prepared, self.model = config, prepared, model
        self.batch, self.starts_fresh = sampler.batch, sampler.starts_fresh
        self.sampler = sampler

    def look(self, pause: Callable[[], None]) -> Evaluation | None:
        """Return how well the model predicts the beginning of the held-out text; None where there is none."""
        return self._evaluate(self.prepared.look, None, pause)

    def measure(self, pause: Callable[[], None]) -> Evaluation | None:
        """Return how well the model predicts all held-out text; None where there is none."""
        return self._evaluate(self.prepared.heldout, self.config.eval_lanes, pause)

    def _evaluate(self, part: Part, lanes: int | None, pause: Callable[[], None]) -> Evaluation | None:
        if not self.prepared.heldout_tokens:
            return None
        return evaluate(self.model.reader(), self.prepared.tokenizer, part, lanes=lanes, pause=pause)

    def figures(self, values: dict[str, Any]) -> Evaluation:
        """Return what `Evaluation.to_dict` gave."""
        return Evaluation(**values)

    def description(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return what a checkpoint holds beside weights: the model's configuration, `tokenizer.json`, other values."""
        text = self.prepared.text
        extra = {"text_name": text.name, "text_sha256": text.sha256}
        return self.model.config.to_dict(), self.prepared.tokenizer.to_json(), extra

    def started(self, run: Path, resumed_at: int | None, processes: int, vectors: int | None = None) -> Started:
        """Return the first event of training."""
        prepared = self.prepared
        return Started(
            self.config,
            run,
            self.model,
            prepared.tokenizer,
            prepared.text,
            prepared.train.tokens if self.config.lines else len(prepared.train.ids),
            self.sampler.steps_per_epoch,
            prepared.unknown_tokens,
            resumed_at,
            processes,
            vectors,
        )


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
        TrainingError: there is too little memory, or the loss is no longer finite.
    """
    team = team or Team()
    prepared = prepared or Prepared(config)
    sampler = prepared.sampler(config, team)
    config = settle(config, sampler.steps_per_epoch, prepared.heldout_tokens)
    torch.set_num_threads(config.threads or 1)
    require_memory(config, prepared, team)
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
    stepper = TextStepper(model, config, config.steps or 1, team, stop)
    run = checkpoint.create_run(path, _config_content(config, prepared.text, legs), tokenizer.to_json())
    with keeping(run, checkpoint_size(stepper)):
        _lead(team, config, prepared, model)
        task = TextTask(config, prepared, sampler, model)
        started = task.started(run.path, None, team.size, found)
        yield from Loop(config, legs, task, stepper, run, stop).events(started)


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
        TrainingError: as of `train`.
    """
    team, config, run = team or Team(), run_config(Path(path)), checkpoint.open_run(path)
    saved_config = run.config()
    with run.lock():
        torch.set_num_threads(config.threads or 1)  # before `recover`, which compares them with the checkpoint's
        saved, training, position = recover(run, steps)
        config = dataclasses.replace(config, out=str(path))
        if texts:
            config = dataclasses.replace(config, texts=tuple(texts), corpus=None)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        prepared = Prepared(config, from_json(saved.tokenizer_json), saved_config["text_sha256"])
        config = _with_absolute_paths(config)
        require_memory(config, prepared, team)
        model = make_model(config, prepared.tokenizer)
        model.load_weights(saved.weights)
        legs = further_legs(saved_config["legs"], position, steps)
        config = dataclasses.replace(config, steps=legs[-1][1])
        sampler, stepper = prepared.sampler(config, team), TextStepper(model, config, legs[-1][1], team, stop)
        durable.require_space(run.path / "checkpoints", checkpoint_size(stepper))
        run.rewind(saved, training, position.best_step)
        content = _config_content(config, prepared.text, legs)
        if content != {**saved_config, "longshort_version": longshort.__version__}:
            run.write_config(content)
        stepper.put_back(training)
        _lead(team, config, prepared, model, training)
        task = TextTask(config, prepared, sampler, model)
        started = task.started(run.path, position.step, team.size)
        yield from Loop(config, legs, task, stepper, run, stop, position).events(started)


_WEIGHT = "weight."


def _lead(
    team: Team,
    config: TrainConfig,
    prepared: Prepared,
    model: LanguageModel,
    training: model_files.Training | None = None,
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
    names = [name for name in arrays if name.startswith(_WEIGHT)]
    model.load_weights({name.removeprefix(_WEIGHT): arrays.pop(name) for name in names})
    stepper = TextStepper(model, config, 1, team, stop)
    # Other rows must not lose the same units by dropout.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, team.rank]).generate_state(1, np.uint64)[0]))
    if brief["training"] is not None:
        stepper.put_back(model_files.Training(arrays, brief["training"]))
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
    (saved, theirs), ours = _load(source), model.config
    for name in MODEL_OPTIONS:
        if getattr(theirs, name) != getattr(ours, name):
            found, wanted = getattr(theirs, name), getattr(ours, name)
            raise UsageError(f"{source} has {name} {found}, not {wanted}.", f"Leave out {name}: --from brings it.")
    model.load_weights(saved.weights)


def _load(source: str) -> tuple[model_files.Saved, ModelConfig]:
    """Return the run or model `source` and what it is; UsageError where that is no language model."""
    saved = checkpoint.load_model(source)
    return saved, ModelConfig.from_dict(saved.model, f"{saved.path}/config.json")


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return `config` with paths that hold wherever the run is looked at from."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path else None

    texts = tuple(text if text in corpus.STDIN else str(Path(text).absolute()) for text in config.texts)
    paths: dict[str, Any] = {name: absolute(getattr(config, name)) for name in ("data_dir", "from_model", "vectors")}
    return dataclasses.replace(config, texts=texts, **paths)


def _config_content(config: TrainConfig, text: Survey, legs: Legs) -> dict[str, Any]:
    """Return what a run's config.json holds."""
    content = {"longshort_version": longshort.__version__, "text_name": text.name, "text_sha256": text.sha256}
    return {**content, "legs": [list(leg) for leg in legs], "train": config.to_dict()}


def run_config(run: Path) -> TrainConfig:
    """Return the configuration that `run` was trained with.

    Raises:
        UsageError, CheckpointError: there is no run, or its configuration is not one of ours.
    """
    saved = checkpoint.open_run(run).config()
    train, sha256, legs = saved.get("train"), saved.get("text_sha256"), saved.get("legs")
    if "train_labels" in saved:
        raise UsageError(
            f"{run} trains a model that labels sequences, not a language model.",
            "Resume it in Python, where its examples are: longshort.resume_labels(RUN, EXAMPLES, HELDOUT)",
        )
    if not isinstance(train, dict) or not isinstance(sha256, str) or not are_legs(legs):
        raise CheckpointError(f"{run}/config.json is not the configuration of a training run.", "Restore the run.")
    return TrainConfig.from_dict(train, f"{run}/config.json")


def heldout_part(run: Path, tokenizer: Tokenizer, data_dir: Path | None = None) -> Part:
    """Return the ids of the held-out part of the text that `run` was trained on.

    Args:
        run: the run directory.
        tokenizer: the run's.
        data_dir: where a named corpus is now, if no longer where it was.

    Raises:
        UsageError: the run held nothing out, or its text is no longer what it was.
    """
    config = dataclasses.replace(run_config(run), out=str(run))
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=str(data_dir))
    source, found = _find(config, checkpoint.open_run(run).config()["text_sha256"])
    if not config.heldout:
        raise UsageError(f"{run} held nothing out.", "Evaluate it on a text: longshort eval MODEL TEXT")
    cut = encoding.place_of_cut(source, found, config.heldout, config.lines)
    return encoding.encode(source, found, tokenizer, cut, config.lines)[1]


def _find(config: TrainConfig, sha256: str | None) -> tuple[corpus.Source, Survey]:
    """Return the text that `config` names, and its survey; of a run, UsageError where its hash is not `sha256`."""
    source: corpus.Source = corpus.find(config.texts, config.corpus, Path(config.data_dir) if config.data_dir else None)
    found = encoding.survey(source)
    if sha256 is None or found.sha256 == sha256:
        return source, found
    run, hashes = Path(str(config.out)), f"it was {sha256[:12]}, it is {found.sha256[:12]} (SHA-256)"
    elsewhere = "The model itself can be used on another: longshort eval, or train --from"
    if config.corpus != "builtin":
        raise UsageError(f"The text of {run} has changed: {hashes}.", f"Restore the text. {elsewhere}")
    if (kept := builtin.kept(sha256)) is not None:
        return kept, encoding.survey(kept)
    raise UsageError(
        f"The built-in text comes with Python, and that of Python {platform.python_version()} is not the one of {run}: "
        f"{hashes}.",
        f"Use {_python_of(run)} that the run was trained with. {elsewhere}",
    )


def _python_of(run: Path) -> str:
    """Return in words the Python that made the latest checkpoint of `run`, with its version where that can be read."""
    version: Any = None
    with suppress(CheckpointError):
        if (latest := checkpoint.open_run(run).latest()) is not None:
            environment = documents.read_json(latest / model_files.POSITION).get("environment")
            version = environment.get("python") if isinstance(environment, dict) else None
    return f"the Python {version:.20}" if isinstance(version, str) else "the Python"
