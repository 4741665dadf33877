"""What a model is and how it is trained: validated dataclasses, free of torch.

Each option is declared once, with its default, its help and its range; the command line, TOML files and the
Python interface are all made from these declarations, so they cannot say different things.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from longshort.errors import ConfigError, UsageError

MOST_ONE_HOT = 4096
"""A one-hot row is as wide as the vocabulary; beyond this many symbols a learned embedding is the only sane input."""


FEWEST_ADAPTIVE = 1000
"""Below so many symbols there is nothing to gain from an adaptive softmax."""
SHRINKAGE = 4
"""By so much each group of rarer symbols is narrower than the one before."""


def adaptive_cutoffs(vocab_size: int) -> list[int]:
    """Return where an adaptive softmax parts the symbols, the most frequent first (docs/log.md has the measurement)."""
    return [vocab_size // 16, vocab_size // 4]


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
) -> Any:
    """Declare an option: its default, one line of help, its range or choices; its flag if not `--the-name`."""
    limits = {"least": least, "above": above, "below": below, "most": most}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flag": flag, **limits})


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _hints(options: type[Any]) -> dict[str, Any]:
    """Return the types of a class's options, which take longer to find than to check: they are found once."""
    if options not in _HINTS:
        _HINTS[options] = get_type_hints(options)
    return _HINTS[options]


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the flag of an option on the command line."""
    return field.metadata["flag"] or f"--{field.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the configurations: checks every option, and names the one that is wrong."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self.check(field.name, getattr(self, field.name))

    @classmethod
    def check(cls, name: str, value: Any) -> None:
        """Raise ConfigError if `value` is not of the type of the option `name`, or outside its range."""
        _check(cls.__dataclass_fields__[name], _hints(cls)[name], value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the configuration") -> Self:
        """Return the configuration that holds `values`.

        Raises:
            ConfigError: an unknown name (with the nearest known one) or a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
                raise ConfigError(f"Unknown option {name!r} in {where}.", hint)
        hints = _hints(cls)
        wants_tuple = {name for name, hint in hints.items() if "tuple" in str(hint)}
        return cls(**{k: tuple(v) if k in wants_tuple and isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def is_own_cell(name: str) -> bool:
    """Return whether `name` is that of a cell in a user's own file, FILE.py:NAME."""
    return ".py:" in name


@dataclass(frozen=True, kw_only=True)
class Layers(Options):
    """The recurrent layers of any model, and what they read symbols by."""

    cell: str = option("lstm", "Recurrent cell: lstm, gru, rnn, rnn_relu, or FILE.py:NAME of your own.")
    layers: int = option(1, "Recurrent layers, one above the other.", least=1, most=64)
    hidden: int = option(256, "Hidden units of each layer.", least=1, most=65536)
    embedding: int = option(
        128, "Width of the learned embedding; 0 feeds one-hot symbols, as the lecture does.", least=0, most=65536
    )
    dropout: float = option(0.0, "Share of each layer's outputs that training drops.", least=0, below=1)
    residual: bool = option(False, "Each layer but the first adds what it reads to what it puts out.")
    layer_norm: bool = option(False, "Normalise what each gate reads, and the LSTM's cell state.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual and self.layers < 2:
            raise ConfigError(
                "residual adds up from the second layer on, but there is one layer.", "Set --layers, or leave it out."
            )
        if self.layer_norm and self.hidden < 2:
            raise ConfigError("layer_norm needs two hidden units or more: one number normalised is 0.")


@dataclass(frozen=True, kw_only=True)
class Schedule(Options):
    """How the weights of any model are found, and what a run keeps."""

    out: str | None = option(None, "Run directory to make; named after the text if not given.")
    steps: int | None = option(None, "Training steps (updates).", least=1)
    epochs: float | None = option(
        None,
        "Passes over the training text, instead of steps; 10 if neither steps, epochs nor minutes are given.",
        above=0,
        most=1e9,
    )
    batch_size: int = option(32, "Rows that are trained on side by side.", least=1, most=1_000_000)
    optimizer: str = option("adamw", "adamw, or sgd (plain gradient descent).", choices=("adamw", "sgd"))
    lr: float = option(4e-3, "Highest learning rate.", above=0)
    warmup: float = option(0.05, "Share of the steps over which the rate rises to its highest.", least=0, most=1)
    final_lr: float = option(0.02, "The rate at the last step, as a share of the highest (cosine).", least=0, most=1)
    weight_decay: float = option(0.0, "Decoupled weight decay (adamw).", least=0)
    clip: float | None = option(1.0, "Most that the common L2 norm of all gradients may be.", above=0)
    seed: int = option(0, "Decides initial weights, dropout and the order of reading.", least=0, most=2**63 - 1)
    threads: int | None = option(
        None, "Processor threads; measured or PyTorch's own choice if not given.", least=1, most=1024
    )
    device: str = option("cpu", "cpu, or cuda.", choices=("cpu", "cuda"))
    precision: str = option(
        "float32",
        "bfloat16: products are of numbers with 3 digits, faster; weights, states and sums stay float32.",
        choices=("float32", "bfloat16"),
    )
    validate_every: int | None = option(None, "Steps between looks at held-out text; a tenth of all if unset.", least=1)
    save_every: int | None = option(
        None, "Steps between checkpoints, beside those at looks; every five minutes if unset.", least=1
    )
    patience: int | None = option(None, "Stop after this many looks without improvement.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision != "float32" and self.device != "cpu":
            raise ConfigError(
                f"precision {self.precision} is for the kernels of a CPU, not for {self.device}.",
                "Leave out --precision, or --device.",
            )


@dataclass(frozen=True, kw_only=True)
class Architecture(Layers):
    """The part of a language model that its user chooses."""

    lines: bool = option(False, "Each line of the text is a sequence of its own, from a zero state to its end mark.")
    tied: bool = option(False, "Use the embedding as the output layer's weights too (embedding = hidden).")
    adaptive_softmax: bool = option(
        False, "For many words: rare ones share small output layers, which most steps do without."
    )
    bidirectional: bool = option(False, "Refused: a model that predicts the next symbol must not read it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bidirectional:
            raise ConfigError(
                "A language model cannot be bidirectional: its backward direction would read the symbol to predict.",
                "Leave it out. For classes and tags there are longshort.SequenceClassifier and SequenceTagger.",
            )
        if self.tied and self.embedding != self.hidden:
            raise ConfigError(
                f"tied needs embedding = hidden, but embedding is {self.embedding} and hidden {self.hidden}.",
                f"Set --embedding {self.hidden}, or leave out --tied.",
            )
        if self.adaptive_softmax and self.tied:
            raise ConfigError(
                "An adaptive softmax has several matrices, so it cannot be tied.", "Leave out one of both."
            )
        if self.adaptive_softmax and self.hidden < 16:
            raise ConfigError(f"adaptive_softmax needs 16 hidden units or more, not {self.hidden}.")


MODEL_OPTIONS = ("cell", "layers", "hidden", "embedding", "tied", "residual", "layer_norm", "adaptive_softmax")
"""The options that decide what a model computes from its weights. Dropout is none of them."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """A language model: its architecture and the size of its vocabulary."""

    vocab_size: int = option(256, "Number of symbols that the model can write.", least=1, most=10_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_one_hot(self.embedding, self.vocab_size, self.hidden)
        if self.adaptive_softmax and self.vocab_size < FEWEST_ADAPTIVE:
            raise ConfigError(
                f"adaptive_softmax is for {FEWEST_ADAPTIVE:,} symbols or more; this text has {self.vocab_size:,}.",
                "Leave it out: the whole softmax is the faster one.",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the configuration") -> Self:
        """Return the configuration that holds `values`; UsageError where they are those of a model with labels."""
        if "labels" in values:
            raise UsageError(
                f"{where} is that of a model that labels sequences, not of a language model.",
                "Load it in Python: longshort.load(PATH).predict(...)",
            )
        return super().from_dict(values, where)


def _check_one_hot(embedding: int, vocab_size: int, hidden: int) -> None:
    if not embedding and vocab_size > MOST_ONE_HOT:
        raise ConfigError(
            f"One-hot input is for at most {MOST_ONE_HOT} symbols; this text has {vocab_size}.",
            f"Give the symbols a learned embedding, such as --embedding {hidden}.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Schedule, Architecture):
    """A training run: what is read, the architecture, and how its weights are found."""

    texts: tuple[str, ...] = option((), "Text files or directories.")
    corpus: str | None = option(None, "A named corpus instead of TEXT: builtin, timemachine or tinyshakespeare.")
    data_dir: str | None = option(None, "Directory that holds the named corpora, instead of a download.")
    from_model: str | None = option(
        None,
        "Run or model to start from instead of new weights; it brings sizes and tokenizer.",
        flag="--from",
    )
    vectors: str | None = option(
        None, "File of word vectors to begin the embedding with: word2vec's, GloVe's or fastText's formats."
    )
    freeze_embedding: bool = option(False, "Do not train the embedding, such as one that begins with --vectors.")
    tokenizer: str = option(
        "char",
        "How the text is cut into symbols: char, byte, word (with --min-freq) or bpe (with --vocab-size).",
        choices=("char", "byte", "word", "bpe"),
    )
    min_freq: int | None = option(None, "word: how often a word must occur to be a symbol; once if unset.", least=1)
    vocab_size: int | None = option(None, "bpe: symbols at most; 4096 if unset.", least=257, most=1_000_000)
    heldout: float = option(0.1, "Share of the text, at its end, that is never trained on.", least=0, below=1)
    sampler: str = option(
        "consecutive",
        "consecutive: rows go on where they stopped, state carried; random: windows from a zero state.",
        choices=("consecutive", "random"),
    )
    drop_incomplete: bool = option(False, "Leave out the incomplete last window of an epoch, as the lecture does.")
    seq_len: int = option(
        64, "Steps of a window: how far gradients reach back, also within a line.", least=1, most=1_000_000
    )
    init: str = option(
        "torch",
        "torch: PyTorch's own ranges; normal: N(0, 0.01) and zero biases, as the lecture.",
        choices=("torch", "normal"),
    )
    single_bias: bool = option(
        False, "Train one bias a gate, as the equations have; the second one of PyTorch's layers stays zero."
    )
    eval_lanes: int | None = option(
        None, "Overlapping lanes in which held-out text is read for the last figure; by its length if unset.", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tokenizer in (("min_freq", "word"), ("vocab_size", "bpe")):
            if getattr(self, name) is not None and self.tokenizer != tokenizer:
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"{name} is for the tokenizer {tokenizer}, but this run's is {self.tokenizer}.",
                    f"Set --tokenizer {tokenizer}, or leave out --{flag}.",
                )
        if self.adaptive_softmax and self.tokenizer != "word":
            raise ConfigError(
                f"adaptive_softmax needs symbols in the order of their frequency, as the tokenizer word has them; "
                f"not {self.tokenizer}.",
                "Set --tokenizer word, or leave out --adaptive-softmax.",
            )
        if self.precision != "float32" and is_own_cell(self.cell):
            raise ConfigError(
                f"precision {self.precision} is for cells that have native kernels, not for {self.cell}.",
                "Leave out --precision.",
            )
        if self.vectors is not None and not self.embedding:
            raise ConfigError("Symbols that are fed one-hot have no vectors.", "Leave out vectors, or --embedding 0.")
        if self.vectors is not None and self.from_model is not None:
            raise ConfigError("--from brings an embedding of its own, so vectors does not go with it.")
        if self.freeze_embedding and (self.tied or not self.embedding):
            raise ConfigError(
                "freeze_embedding needs an embedding that is not the output layer's too.",
                "Leave out tied, or freeze_embedding.",
            )
        if self.lines and (self.sampler != "consecutive" or self.drop_incomplete or self.eval_lanes is not None):
            raise ConfigError(
                "With lines, each is read alone: the options sampler, drop_incomplete and eval_lanes have no meaning.",
                "Leave them out, or leave out --lines.",
            )

    def model(self, vocab_size: int) -> ModelConfig:
        """Return the configuration of the model to train."""
        names = [field.name for field in dataclasses.fields(Architecture)]
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})


LABEL_CELLS = ("lstm", "gru", "rnn", "rnn_relu")


@dataclass(frozen=True, kw_only=True)
class LabelLayers(Layers):
    """The part of a model that labels sequences which its user chooses."""

    hidden: int = option(64, "Hidden units of each layer and direction.", least=1, most=65536)
    embedding: int = option(32, "Width of the learned embedding; 0 feeds one-hot symbols.", least=0, most=65536)
    bidirectional: bool = option(True, "Each layer reads backward too.")
    pooling: str = option(
        "mean",
        "What a class is decided by: mean, of all steps; ends: what each direction has after its last step.",
        choices=("mean", "ends"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in LABEL_CELLS:
            raise ConfigError(f"A model that labels sequences has the cell {', '.join(LABEL_CELLS)}; not {self.cell}.")


@dataclass(frozen=True, kw_only=True)
class LabelModelConfig(LabelLayers):
    """A model that labels sequences: its layers, what it reads and which labels it gives."""

    labels: tuple[str, ...] = option((), "The labels, in the order of the model's outputs.")
    per_step: bool = option(False, "Whether each step gets a label, as a tagger gives, or the sequence one.")
    reads: str = option("ids", "What a sequence is.", choices=("text", "words", "ids", "vectors"))
    vocab_size: int = option(0, "Number of symbols that it knows; 0 where it reads vectors.", least=0, most=10_000_000)
    inputs: int = option(0, "Width of the vectors that it reads; 0 where it reads symbols.", least=0, most=10_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ConfigError(f"labels must be two different ones or more, not {self.labels!r:.80}.")
        if self.per_step and self.pooling != "mean":
            raise ConfigError("A tagger labels each step, so it has no pooling.", "Leave pooling out.")
        width, other = (self.inputs, self.vocab_size) if self.reads == "vectors" else (self.vocab_size, self.inputs)
        if not width or other:
            wanted = "inputs and no vocab_size" if self.reads == "vectors" else "vocab_size and no inputs"
            raise ConfigError(
                f"A model that reads {self.reads} has {wanted}, not vocab_size {self.vocab_size}, inputs {self.inputs}."
            )
        _check_one_hot(self.embedding, self.vocab_size, self.hidden)


@dataclass(frozen=True, kw_only=True)
class LabelTrainConfig(Schedule, LabelLayers):
    """A training run on labelled sequences; the examples themselves are given beside it."""

    out: str | None = option(None, "Run directory to make; labels-run, or the next free name, if not given.")
    tokenizer: str = option("char", "How texts are cut into symbols.", choices=("char", "byte", "word", "bpe"))
    min_freq: int | None = option(None, "words: how often one must occur to be a symbol; once if unset.", least=1)
    class_weights: tuple[float, ...] = option((), "What an error counts at each label; 1 each if not given.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < weight < math.inf for weight in self.class_weights):
            raise ConfigError(f"class_weights must be above 0 and finite, not {self.class_weights!r:.80}.")

    def model(self, **found: Any) -> LabelModelConfig:
        """Return the configuration of the model to train, of which the examples have told `found`."""
        names = [field.name for field in dataclasses.fields(LabelLayers)]
        return LabelModelConfig(**found, **{name: getattr(self, name) for name in names})


def _check(field: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Raise `ConfigError` if `value` is not of the field's type or outside its range."""
    limits = field.metadata
    allowed = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if value is None and type(None) in allowed:
        return
    if get_origin(hint) is tuple:
        number = float in get_args(hint)
        if not isinstance(value, tuple) or not all(isinstance(part, (int, float) if number else str) for part in value):
            raise ConfigError(f"{field.name} must be a list of {'numbers' if number else 'texts'}, not {value!r:.80}.")
        return
    wanted = next((t for t in (bool, int, float, str) if t in allowed), None)
    if wanted is not None:
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (wanted is not bool and isinstance(value, bool)):
            raise ConfigError(f"{field.name} must be {_NAMES[wanted]}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name} must be a finite number, not {value}.")
    choices = limits["choices"]
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint_text = f"Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{field.name} must be one of {', '.join(choices)}; not {value!r}.", hint_text)
    for limit, (breaks, words) in _LIMITS.items():
        bound = limits[limit]
        if bound is not None and breaks(value, bound):
            raise ConfigError(f"{field.name} must be {words} {bound:g}, not {value:g}.")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "least": (operator.lt, "at least"),
    "above": (operator.le, "above"),
    "below": (operator.ge, "below"),
    "most": (operator.gt, "at most"),
}
