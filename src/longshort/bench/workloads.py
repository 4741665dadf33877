"""`bench train`, `generate` and `score`: whole workloads beside the program that a PyTorch user would write.

    train      a training step: read a batch, forward, loss, backward, clip, update. The peer: `nn.LSTM` and the
               optimizer in PyTorch's quickest form
    generate   characters: embedding, cell, logits, temperature, choice. The peers: `nn.LSTM` and `nn.LSTMCell`, a step
               in Python at a time
    score      lines: bits of every character. The peer: `nn.LSTM` under inference mode on batches of sorted, padded
               lines

Both sides have the same sizes, do the same work on the same text, and are measured in turns (timing.py).
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import machine, native, training
from longshort.bench import ledger, peers, profiling
from longshort.bench.timing import Side, interleave, spread
from longshort.config import FEWEST_ADAPTIVE, SHRINKAGE, TrainConfig, adaptive_cutoffs
from longshort.decoder import Decoder
from longshort.errors import UsageError
from longshort.model import LanguageModel
from longshort.native_model import Draw
from longshort.scoring import score
from longshort.text import grammar
from longshort.text.batches import IGNORED, Batch
from longshort.text.tokenizers import CharTokenizer, Tokenizer

SYMBOLS = "\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz$&3"
"""As many as the tiny Shakespeare text has: 65."""
WORDS = "".join(map(chr, range(0x3400, 0x3400 + 33_278)))
"""As many as WikiText-2 has words, a character for each."""
BLOCKS = 9
BLOCK_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One workload, ours and the peer's.

    Attributes:
        name: what is done.
        peer: by whom else.
        unit: what is counted.
        ours: a call of ours.
        theirs: a call of the peer's.
        ours_units: how many units a call of ours is.
        peer_units: the same of the peer's.
        operations: multiplications and additions of a unit's matrix products.
    """

    name: str
    peer: str
    unit: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    ours_units: float = 1.0
    peer_units: float = 1.0
    operations: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contest, measured.

    Attributes:
        name: of the contest, as all up to `unit`.
        peer: by whom else.
        unit: what is counted.
        ours_per_second: units, median over the blocks.
        peer_per_second: the same.
        ratio: `ours_per_second` / `peer_per_second`.
        gemm_share: rate of our matrix products, as a share of that of one large product measured between the blocks.
        ours_spread: distance of the quartiles of the blocks, divided by their median.
        peer_spread: the same.
        noisy: as `ledger.Row.noisy`.
        ours_blocks: seconds a unit, of each block.
        peer_blocks: the same.
        handover_seconds: as `ledger.Row.handover_seconds`.
    """

    name: str
    peer: str
    unit: str
    ours_per_second: float
    peer_per_second: float
    ratio: float
    gemm_share: float
    ours_spread: float
    peer_spread: float
    noisy: bool
    ours_blocks: list[float]
    peer_blocks: list[float]
    handover_seconds: float


class Setting(NamedTuple):
    """How both sides run."""

    threads: int
    precision: str = "float32"
    """Ours: of training, or of the weights of what runs a trained model."""
    peer_precision: str = "float32"
    """The peer's: bfloat16 is autocast in training, else a model turned into bfloat16; int8 its dynamic rounding."""

    def peer(self, name: str) -> str:
        """Return what a peer is called."""
        return name if self.peer_precision == "float32" else f"{name}, {self.peer_precision}"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return what the peer's forward pass of training runs in."""
        return nullcontext() if self.peer_precision == "float32" else torch.autocast("cpu", torch.bfloat16)

    def turned(self, plain: PlainModel) -> PlainModel:
        """Return the peer's model as it reads and writes."""
        if self.peer_precision == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is to move to a package of its own
                quantization: Any = torch.ao.quantization
                turned: PlainModel = quantization.quantize_dynamic(plain, {nn.LSTM, nn.LSTMCell, nn.Linear})
                return turned
        return plain if self.peer_precision == "float32" else plain.bfloat16()


def result(
    what: str,
    threads: int,
    report: Callable[[Row, int, int], None] = lambda row, done, all: None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Measure a kind of workloads and return everything that `bench --json` prints.

    Args:
        what: `train`, `generate` or `score`.
        threads: of both sides.
        report: called after each row with it, the number of those done, and of all.
        precision: ours. `bfloat16` and `int8` are measured beside PyTorch's float32 and beside the same of PyTorch's.

    Raises:
        UsageError: this processor does not have that precision, or training does not.
    """
    check_precision(what, precision)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of_peer = ("float32",) if precision == "float32" else ("float32", precision)
        contests = [(build, Setting(threads, precision, peer)) for build in KINDS[what] for peer in of_peer]
        rows = []
        for build, setting in contests:
            gc.collect()
            rows.append(_measure(build(setting)))
            report(rows[-1], len(rows), len(contests))
    finally:
        torch.set_num_threads(before)
    asked = "" if precision == "float32" else f" --precision {precision}"
    return {
        "benchmark": what,
        "command": f"longshort bench {what} --threads {threads}{asked}",
        "threads": threads,
        "precision": precision,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.description(),
        "library": ledger.library(),
        "torch_code": torch.backends.cpu.get_cpu_capability(),
        "noisy": sum(row.noisy for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def check_precision(what: str, precision: str) -> None:
    """Raise a UsageError where a kind of workloads cannot be had in a precision."""
    if precision == "bfloat16":
        native.need_bfloat16()
    if (what, precision) == ("train", "int8"):
        raise UsageError(
            "Training is in float32 or bfloat16, not in int8.", "bench generate and bench score take --precision int8."
        )


def _measure(contest: Contest) -> Row:
    timing = interleave(
        Side(contest.ours), Side(contest.theirs), peers.gemm(), blocks=BLOCKS, block_seconds=BLOCK_SECONDS
    )
    ours = [seconds / contest.ours_units for seconds in timing.ours]
    theirs = [seconds / contest.peer_units for seconds in timing.peer]
    gemm = 2 * peers.GEMM_SIZE**3 / statistics.median(timing.gemm)
    middle, peer_middle = statistics.median(ours), statistics.median(theirs)
    return Row(
        name=contest.name,
        peer=contest.peer,
        unit=contest.unit,
        ours_per_second=1 / middle,
        peer_per_second=1 / peer_middle,
        ratio=peer_middle / middle,
        gemm_share=contest.operations / middle / gemm,
        ours_spread=spread(ours),
        peer_spread=spread(theirs),
        noisy=spread(timing.gemm) > ledger.MOST_GEMM_SPREAD or timing.stolen > ledger.MOST_STOLEN,
        ours_blocks=ours,
        peer_blocks=theirs,
        handover_seconds=timing.handover_seconds,
    )


# --------------------------------------------------------------------------------------------------- models


class PlainModel(nn.Module):
    """The model as a PyTorch user writes it: embedding or one-hot rows, `nn.LSTM`, linear layer."""

    def __init__(self, like: LanguageModel) -> None:
        super().__init__()
        config = like.config
        self.size = config.vocab_size
        self.embedding = nn.Embedding(self.size, config.embedding) if config.embedding else None
        self.recurrent: Any = nn.LSTM(config.embedding or self.size, config.hidden, config.layers)
        self.output: Any = nn.Linear(config.hidden, self.size)
        if config.adaptive_softmax:
            size = (config.hidden, self.size, adaptive_cutoffs(self.size), float(SHRINKAGE))
            self.output = nn.AdaptiveLogSoftmaxWithLoss(*size, head_bias=True)
        if config.tied and self.embedding is not None:
            self.output.weight = self.embedding.weight
        with torch.no_grad():
            if self.embedding is not None and like.embedding is not None:
                self.embedding.weight.copy_(like.embedding.weight[: self.size])
            self.recurrent.load_state_dict(like.recurrent.state_dict())
            self.output.load_state_dict(like.output.state_dict())

    def inputs(self, ids: Tensor) -> Tensor:
        """Return what the first layer reads."""
        return F.one_hot(ids, self.size).float() if self.embedding is None else self.embedding(ids)

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits and the state after."""
        h, state = self.recurrent(self.inputs(ids), state)
        return self.output(h), state

    def loss(self, ids: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the mean loss in nats and the state after."""
        h, state = self.recurrent(self.inputs(ids), state)
        if isinstance(self.output, nn.AdaptiveLogSoftmaxWithLoss):
            return self.output(h.flatten(0, 1), targets.flatten()).loss, state
        return F.cross_entropy(self.output(h).flatten(0, 1), targets.flatten()), state


def _models(config: TrainConfig, tokenizer: Tokenizer) -> tuple[LanguageModel, PlainModel]:
    model = training.make_model(config, tokenizer)
    return model, PlainModel(model)


def _lines(number: int) -> list[str]:
    """Return lines of made-up English, of the lengths that lines of logs and plays have."""
    text = grammar.generate(number * 60, seed=5).replace("\n", " ")
    words = "".join(c for c in text if c in SYMBOLS).split()
    generator = np.random.default_rng(0)
    lines, first = [], 0
    for _ in range(number):
        count = int(generator.integers(2, 16))
        lines.append(" ".join(words[first : first + count]))
        first = (first + count) % (len(words) - 16)
    return lines


# ----------------------------------------------------------------------------------------------------- train


class Training(NamedTuple):
    """A kind of training steps."""

    name: str
    config: TrainConfig
    symbols: str

    def prepare(self) -> tuple[training.TextStepper, list[Batch]]:
        """Return what makes steps, with a new model, and what they read."""
        config, tokenizer = self.config, CharTokenizer(self.symbols)
        T, B = config.seq_len, config.batch_size
        ids = _symbols(tokenizer.size, (64, T + 1, B))
        batches = [Batch(part[:-1], part[1:], T * B, 0, False) for part in ids]
        return training.TextStepper(training.make_model(config, tokenizer), config, 10**6), batches


def _symbols(size: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return random symbols: characters alike, of words the k-th in proportion to 1 / k, as natural text has them."""
    generator = np.random.default_rng(0)
    if size < FEWEST_ADAPTIVE:
        return generator.integers(size, size=shape)
    p = 1 / np.arange(1, size + 1)
    return generator.choice(size, size=shape, p=p / p.sum())


def _train(kind: Training, setting: Setting) -> Contest:
    config, (stepper, batches) = kind.config, kind.prepare()
    V, B, T, H = stepper.model.config.vocab_size, config.batch_size, config.seq_len, config.hidden
    plain = PlainModel(stepper.model)
    parameters = list(plain.parameters())
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    turn = {"ours": 0, "peer": 0}
    state: list[Any] = [tuple(torch.zeros(1, B, H) for _ in range(2))]

    def ours() -> float:
        turn["ours"] += 1
        return stepper.step(turn["ours"], batches[turn["ours"] % 64])[0]

    def peer() -> float:
        turn["peer"] += 1
        batch = batches[turn["peer"] % 64]
        inputs, targets = torch.from_numpy(batch.inputs_TB), torch.from_numpy(batch.targets_TB)
        optimizer.zero_grad()
        with setting.autocast():
            loss, state[0] = plain.loss(inputs, targets, tuple(tensor.detach().float() for tensor in state[0]))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, config.clip or 1.0)
        optimizer.step()
        return loss.item()

    # An adaptive softmax makes another number of operations in each step: none are counted.
    operations = 0 if config.adaptive_softmax else 3 * 2 * T * B * (4 * H * H + H * V)
    return Contest(
        name=kind.name, peer=setting.peer("nn.LSTM"), unit="steps", ours=ours, theirs=peer, operations=operations
    )


_CONSTANT: dict[str, Any] = {"warmup": 0.0, "final_lr": 1.0}
"""The learning rate of both sides stays what it is."""


def _trainings(threads: int, precision: str = "float32") -> tuple[Training, ...]:
    rest: dict[str, Any] = {"batch_size": 32, "threads": threads, "precision": precision, **_CONSTANT}
    lecture, symbols = {"hidden": 256, "seq_len": 35, **rest}, SYMBOLS[-28:]
    return (
        Training(
            "the lecture's: one-hot, 1 x 256, SGD",
            TrainConfig(embedding=0, optimizer="sgd", lr=1.0, **lecture),
            symbols,
        ),
        Training("embedding 256, 1 x 256, AdamW", TrainConfig(embedding=256, **lecture), symbols),
        Training(
            "embedding 512, 1 x 512, T=64, AdamW", TrainConfig(hidden=512, embedding=512, seq_len=64, **rest), SYMBOLS
        ),
        Training("33,278 words, tied, 1 x 256, AdamW", TrainConfig(embedding=256, tied=True, **lecture), WORDS),
        Training(
            "33,278 words, adaptive softmax, 1 x 256, AdamW",
            TrainConfig(embedding=256, adaptive_softmax=True, tokenizer="word", **lecture),
            WORDS,
        ),
    )


def _trained(number: int) -> Callable[[Setting], Contest]:
    return lambda setting: _train(_trainings(setting.threads, setting.precision)[number], setting)


def profiles(
    threads: int,
    report: Callable[[str, int, int], None] = lambda name, done, all: None,
    precision: str = "float32",
) -> list[tuple[str, dict[str, float]]]:
    """Return of each kind of training steps its name and the seconds of its parts.

    Args:
        threads: that run it.
        report: called after each with its name, the number of those done, and of all.
        precision: of training.

    Raises:
        UsageError: this processor, or training, does not have that precision.
    """
    check_precision("train", precision)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # An adaptive softmax is many operations, which would be taken for other parts of the step.
        found, kinds = [], [kind for kind in _trainings(threads, precision) if not kind.config.adaptive_softmax]
        for kind in kinds:
            found.append((kind.name, profiling.profile_step(*kind.prepare())))
            report(kind.name, len(found), len(kinds))
    finally:
        torch.set_num_threads(before)
    return found


# -------------------------------------------------------------------------------------------------- generate

_TEMPERATURE = 0.8


def _written(peer: str, streams: int) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        tokenizer = CharTokenizer(SYMBOLS)
        model, plain = _models(TrainConfig(hidden=256, embedding=128, threads=setting.threads), tokenizer)
        if peer == "nn.LSTMCell":
            plain.recurrent = _cell_of(plain.recurrent)
        plain = setting.turned(plain)
        decoder = Decoder(model.config, model.weights(), tokenizer, setting.precision)
        decoder.threads = setting.threads
        logits_V, first = decoder.logits(np.array([1]), None)
        logits_BV = np.repeat(logits_V[None], streams, axis=0)
        state = tuple(np.ascontiguousarray(np.repeat(tensor, streams, axis=1)) for tensor in first)
        draws = [Draw(_TEMPERATURE, None, None, 0, stream, 0) for stream in range(streams)]
        ours_steps, peer_steps = 2_000 if streams == 1 else 200, 200 if streams == 1 else 50
        write = _with_layer if peer == "nn.LSTM" else _with_cell
        return Contest(
            name=f"{streams} text{'s' if streams > 1 else ''}, LSTM 1 x 256",
            peer=setting.peer(peer),
            unit="characters",
            ours=lambda: decoder.write(logits_BV, state, draws, ours_steps),
            theirs=lambda: write(plain, streams, peer_steps),
            ours_units=ours_steps * streams,
            peer_units=peer_steps * streams,
            operations=2 * (4 * 256 * 256 + 256 * len(SYMBOLS)),
        )

    return build


@torch.inference_mode()
def _with_layer(plain: PlainModel, streams: int, steps: int) -> None:
    ids, state = torch.ones(1, streams, dtype=torch.int64), None
    for _ in range(steps):
        logits, state = plain(ids, state)
        ids = torch.multinomial(F.softmax(logits[0].float() / _TEMPERATURE, dim=-1), 1).T
        ids.tolist()


def _cell_of(layer: Any) -> nn.LSTMCell:
    cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
    return cell


@torch.inference_mode()
def _with_cell(plain: PlainModel, streams: int, steps: int) -> None:
    ids = torch.ones(streams, dtype=torch.int64)
    kind = plain.inputs(ids).dtype
    state = tuple(torch.zeros(streams, plain.recurrent.hidden_size, dtype=kind) for _ in range(2))
    for _ in range(steps):
        state = plain.recurrent(plain.inputs(ids), state)
        ids = torch.multinomial(F.softmax(plain.output(state[0]).float() / _TEMPERATURE, dim=-1), 1)[:, 0]
        ids.tolist()


# ----------------------------------------------------------------------------------------------------- score


def _scored(setting: Setting) -> Contest:
    tokenizer = CharTokenizer(SYMBOLS)
    config = TrainConfig(hidden=256, embedding=128, threads=setting.threads, lines=True)
    model, plain = _models(config, tokenizer)
    plain = setting.turned(plain)
    decoder = Decoder(model.config, model.weights(), tokenizer, setting.precision)
    decoder.threads = setting.threads
    lines = _lines(2_048)
    characters = sum(len(line) + 1 for line in lines)
    return Contest(
        name="lines, LSTM 1 x 256",
        peer=setting.peer("nn.LSTM"),
        unit="characters",
        ours=lambda: list(score(decoder, lines)),
        theirs=lambda: list(_with_padding(plain, tokenizer, lines)),
        ours_units=characters,
        peer_units=characters,
        operations=2 * (4 * 256 * 256 + 256 * len(SYMBOLS)),
    )


@torch.inference_mode()
def _with_padding(plain: PlainModel, tokenizer: Tokenizer, lines: Sequence[str]) -> Iterator[float]:
    encoded = [tokenizer.encode(f"\n{line}\n").astype(np.int64) for line in lines]
    encoded = [np.minimum(ids, plain.size - 1) for ids in encoded]
    order = sorted(range(len(lines)), key=lambda i: len(encoded[i]))
    found = [0.0] * len(lines)
    for first in range(0, len(order), 64):
        batch = order[first : first + 64]
        padded = nn.utils.rnn.pad_sequence([torch.from_numpy(encoded[i]) for i in batch], padding_value=IGNORED)
        logits, _ = plain(padded[:-1].clamp(min=0), None)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), padded[1:].flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = nats.view(padded[1:].shape).sum(0).tolist()
        for i, total in zip(batch, sums, strict=True):
            found[i] = total / (len(lines[i]) + 1) / 0.6931471805599453
    yield from found


KINDS: dict[str, tuple[Callable[[Setting], Contest], ...]] = {
    "train": tuple(map(_trained, range(5))),
    "generate": (
        _written("nn.LSTM", 1),
        _written("nn.LSTMCell", 1),
        _written("nn.LSTM", 64),
        _written("nn.LSTMCell", 64),
    ),
    "score": (_scored,),
}
