"""Models that label sequences: a class for each, or a tag for each of its steps. They may read in both directions.

T  steps   B  rows   I  input width   H  hidden units   D  directions   C  labels   N  sequences

The layers are `longshort.RNN`, `GRU` and `LSTM` with the rows' lengths, so what is padding changes nothing, whatever
the order of the rows, and a sequence without a step is one too: its class is decided by the output layer's bias.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import kernels
from longshort.config import LabelModelConfig
from longshort.errors import CheckpointError, ConfigError, UsageError
from longshort.examples import Batch, Encoded, Examples
from longshort.layers import GRU, LSTM, RNN
from longshort.model_files import Saved
from longshort.text import tokenizers
from longshort.text.batches import IGNORED
from longshort.text.tokenizers import Tokenizer

_ROWS_AT_ONCE = 64


class Labeller(nn.Module):
    """What `SequenceClassifier` and `SequenceTagger` share.

    Args:
        config: what the model reads, its layers, its labels.
        tokenizer: where it reads texts or words.
    """

    identity: Tensor | None

    def __init__(self, config: LabelModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        if config.per_step is not self.per_step:
            other = SequenceTagger if config.per_step else SequenceClassifier
            raise ConfigError(f"per_step is {config.per_step}: that is a {other.__name__}.")
        self.config = config
        self.tokenizer = tokenizer
        V = config.vocab_size
        self.embedding = nn.Embedding(V, config.embedding) if V and config.embedding else None
        # Not weights, so not saved: one-hot rows, and a row of zeros for the unknown symbol.
        identity = F.pad(torch.eye(V), (0, 0, 0, 1)) if V and not config.embedding else None
        self.register_buffer("identity", identity, persistent=False)
        width = config.inputs or config.embedding or V
        options: dict[str, Any] = {"bidirectional": config.bidirectional}
        options |= {"dropout": config.dropout if config.layers > 1 else 0.0}
        options |= {"residual": config.residual, "layer_norm": config.layer_norm}
        if config.cell == "lstm":
            self.recurrent: Any = LSTM(width, config.hidden, config.layers, **options)
        elif config.cell == "gru":
            self.recurrent = GRU(width, config.hidden, config.layers, **options)
        else:
            nonlinearity = "relu" if config.cell == "rnn_relu" else "tanh"
            self.recurrent = RNN(width, config.hidden, config.layers, nonlinearity, **options)
        self.output = nn.Linear(config.hidden * (1 + config.bidirectional), len(config.labels))

    per_step: bool
    """Whether each step gets a label."""

    @abstractmethod
    def forward(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the logits."""

    def _read(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Return the last layer's output (T, B, D * H), and what each direction has after its last step (B, D * H)."""
        if self.embedding is not None:
            inputs = kernels.embed(inputs, self.embedding.weight)
        elif self.identity is not None:
            inputs = F.embedding(inputs, self.identity)
        h_TBH, state = self.recurrent(inputs, lengths=lengths)
        last = state[0] if isinstance(state, tuple) else state
        directions = 1 + self.config.bidirectional
        return h_TBH, last[-directions:].transpose(0, 1).flatten(1)

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.config.dropout, self.training)

    def loss(self, batch: Batch, class_weights: Tensor | None = None) -> Tensor:
        """Return the mean of -log p of the labels of `batch`, in nats.

        Args:
            batch: sequences and their labels.
            class_weights: (C), what each label counts in the mean; 1 if None.
        """
        device = self.output.bias.device
        logits = self(torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.lengths_B))
        targets = torch.from_numpy(batch.targets).to(device).flatten()
        nats = F.cross_entropy(logits.flatten(0, -2), targets, class_weights, ignore_index=IGNORED, reduction="sum")
        known = targets[targets != IGNORED]
        total = float(len(known) if class_weights is None else class_weights[known].sum())
        return nats / max(total, 1e-30)

    @torch.no_grad()
    def log_probabilities(self, encoded: Encoded) -> Iterator[tuple[NDArray[np.int64], Batch, NDArray[np.float64]]]:
        """Read all sequences, those of similar length side by side, and give log p, (B, C) or (T, B, C)."""
        device, training = self.output.bias.device, self.training
        self.eval()
        try:
            order = np.argsort(encoded.lengths, kind="stable")
            for first in range(0, len(order), _ROWS_AT_ONCE):
                numbers = order[first : first + _ROWS_AT_ONCE]
                batch = encoded.batch(numbers)
                logits = self(torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.lengths_B))
                yield numbers, batch, F.log_softmax(logits.double(), -1).cpu().numpy()
        finally:
            self.train(training)

    def probabilities(self, sequences: Sequence[Any]) -> list[NDArray[np.float64]]:
        """Return the probability of each label: for each sequence (C), or of a tagger (T, C).

        Args:
            sequences: of the kind that the model reads.

        Raises:
            ConfigError: they are of another kind.
        """
        found: list[Any] = [None] * len(sequences)
        encoded = Encoded(self.config, self.tokenizer, sequences)
        for numbers, batch, log_p in self.log_probabilities(encoded):
            for row, number in enumerate(numbers):
                own = log_p[: batch.lengths_B[row], row] if self.per_step else log_p[row]
                found[number] = np.exp(own)
        return found

    def predict(self, sequences: Sequence[Any]) -> list[Any]:
        """Return the likeliest label of each sequence, of a tagger a list of one a step; as `probabilities`."""
        labels = self.config.labels
        best = [p.argmax(-1) for p in self.probabilities(sequences)]
        return [[labels[i] for i in each] if self.per_step else labels[each] for each in best]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights by name as float32 arrays."""
        return {name: tensor.detach().cpu().float().numpy() for name, tensor in self.state_dict().items()}

    def load_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over weights that `weights` gave.

        Raises:
            CheckpointError: they are those of another model.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if wanted != (given := {name: array.shape for name, array in weights.items()}):
            wrong = min(set(wanted.items()) ^ set(given.items()))[0]
            raise CheckpointError(
                f"The weights are not those of the model that config.json describes: see {wrong!r:.80}.",
                "Restore the files that were saved together.",
            )
        self.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})


class SequenceClassifier(Labeller):
    """Gives each sequence a class; arguments as `Labeller`."""

    per_step = False

    def forward(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the logits (B, C) of each sequence's class.

        Args:
            inputs: ids (T, B), where V stands for what the vocabulary does not hold, or vectors (T, B, I).
            lengths: steps of each row, in any order, 0 allowed; all of them if None.
        """
        h_TBH, ends_BH = self._read(inputs, lengths)
        if self.config.pooling == "ends":
            return cast(Tensor, self.output(self._drop(ends_BH)))
        T, B = h_TBH.shape[:2]
        steps_B = torch.full((B,), T) if lengths is None else torch.as_tensor(lengths)
        steps_B1 = steps_B.to(h_TBH.device).unsqueeze(1)
        # The layers give zeros beyond a row's end, so they may be in the sum.
        return cast(Tensor, self.output(self._drop(h_TBH).sum(0) / steps_B1.clamp(min=1)))


class SequenceTagger(Labeller):
    """Gives each step of a sequence a tag; arguments as `Labeller`."""

    per_step = True

    def forward(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the logits (T, B, C) of each step's tag; beyond a row's end they mean nothing.

        Args:
            inputs: as of `SequenceClassifier`.
            lengths: the same.
        """
        return cast(Tensor, self.output(self._drop(self._read(inputs, lengths)[0])))


@dataclass(frozen=True, slots=True)
class Labelling:
    """What `evaluate_labels` found."""

    sequences: int
    labels: int
    """How many labels were predicted: one for each sequence, or for each step."""
    nats_per_label: float
    """Mean of -log p of the right label, each counted by its class weight."""
    accuracy: float
    """Share of the labels that were right."""
    macro_f1: float
    """Mean of `f1` over the labels that occur, in truth or as a prediction."""
    precision: dict[str, float]
    """Of each label, the share of its predictions that were right; 0 where there are none."""
    recall: dict[str, float]
    """Of each label, the share of its occurrences that were found; 0 where there are none."""
    f1: dict[str, float]
    """Of each label, the harmonic mean of both."""
    confusion: list[list[int]]
    """How often each label (the row) was predicted as each (the column)."""
    protocol: str

    @property
    def loss(self) -> float:
        """What training looks at: the nats a label."""
        return self.nats_per_label

    def metrics(self) -> dict[str, Any]:
        """Return what the log of a run says of a look."""
        figures = {"heldout_nats_per_label": self.nats_per_label, "heldout_accuracy": self.accuracy}
        return {**figures, "heldout_macro_f1": self.macro_f1, "protocol": self.protocol}

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


def evaluate_labels(
    model: Labeller,
    examples: Examples | Encoded,
    class_weights: Sequence[float] = (),
    pause: Callable[[], None] = lambda: None,
) -> Labelling:
    """Return how well `model` labels `examples`.

    Args:
        model: a classifier or a tagger.
        examples: what it has not been trained on.
        class_weights: what each label counts in the nats, in the model's order; 1 if not given.
        pause: called every few sequences; it may raise, to end a long evaluation.

    Raises:
        ConfigError, UsageError: the examples are of another kind, or have labels that the model does not know.
    """
    encoded = examples if isinstance(examples, Encoded) else encode(model, examples)
    C, nats, total = len(model.config.labels), 0.0, 0.0
    weights_C = np.array(class_weights or np.ones(C))
    confusion_CC = np.zeros((C, C), np.int64)
    for _, batch, log_p in model.log_probabilities(encoded):
        pause()
        targets, log_p_NC = batch.targets.ravel(), log_p.reshape(-1, C)
        known = targets != IGNORED
        targets, log_p_NC = targets[known], log_p_NC[known]
        nats -= float((weights_C[targets] * log_p_NC[np.arange(len(targets)), targets]).sum())
        total += float(weights_C[targets].sum())
        np.add.at(confusion_CC, (targets, log_p_NC.argmax(1)), 1)
    right_C, true_C, predicted_C = np.diag(confusion_CC), confusion_CC.sum(1), confusion_CC.sum(0)
    precision_C, recall_C = right_C / np.maximum(predicted_C, 1), right_C / np.maximum(true_C, 1)
    f1_C = 2 * right_C / np.maximum(true_C + predicted_C, 1)
    occurs_C = true_C + predicted_C > 0
    protocol = f"each {'step' if model.per_step else 'sequence'} from all of its sequence"

    def by_name(figures_C: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(model.config.labels, figures_C.tolist(), strict=True))

    return Labelling(
        sequences=len(encoded),
        labels=int(confusion_CC.sum()),
        nats_per_label=nats / max(total, 1e-30),
        accuracy=float(right_C.sum() / max(confusion_CC.sum(), 1)),
        macro_f1=float(f1_C[occurs_C].mean()) if occurs_C.any() else 0.0,
        precision=by_name(precision_C),
        recall=by_name(recall_C),
        f1=by_name(f1_C),
        confusion=confusion_CC.tolist(),
        protocol=protocol + ", nats by class weights" * bool(class_weights),
    )


def encode(model: Labeller, examples: Examples) -> Encoded:
    """Return `examples` as `model` reads them; errors as of `evaluate_labels`."""
    config = model.config
    if examples.per_step is not config.per_step:
        wanted, found = ("each step", "the sequence") if config.per_step else ("the sequence", "each step")
        raise ConfigError(f"A {type(model).__name__} needs a label for {wanted}; the examples have one for {found}.")
    return Encoded(config, model.tokenizer, examples.sequences, examples.labels)


def make_labeller(config: LabelModelConfig, tokenizer: Tokenizer | None) -> Labeller:
    """Return a new classifier or tagger, as `config` says."""
    return (SequenceTagger if config.per_step else SequenceClassifier)(config, tokenizer)


def from_saved(saved: Saved) -> Labeller:
    """Return the classifier or tagger that a run or model directory holds, in evaluation mode.

    Raises:
        UsageError: it holds a language model.
        CheckpointError: the files do not belong together.
    """
    if "labels" not in saved.model:
        raise UsageError(f"{saved.path} holds a language model, not one that labels sequences.")
    config = LabelModelConfig.from_dict(saved.model, f"{saved.path}/config.json")
    needs = config.reads in ("text", "words")
    tokenizer = tokenizers.from_json(saved.tokenizer_json) if needs else None
    if tokenizer is not None and tokenizer.size != config.vocab_size:
        raise CheckpointError(
            f"{saved.path} has a tokenizer of {tokenizer.size} symbols for a model of {config.vocab_size}.",
            "Restore the files that were saved together.",
        )
    model = make_labeller(config, tokenizer)
    model.load_weights(saved.weights)
    return model.eval()
