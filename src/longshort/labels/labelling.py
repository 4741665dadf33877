"""What every model that labels sequences can do, with PyTorch or without, and how well it does it.

T  steps   B  rows   C  labels   N  sequences
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.config import LabelModelConfig
from longshort.errors import CheckpointError, ConfigError, UsageError
from longshort.labels.examples import Batch, Encoded, Examples
from longshort.model_files import Saved
from longshort.text import tokenizers
from longshort.text.batches import IGNORED
from longshort.text.tokenizers import Tokenizer

_ROWS_AT_ONCE = 64


class LabelModel(ABC):
    """A classifier or a tagger: the torch-free `LabelDecoder`, PyTorch's `SequenceClassifier` or `SequenceTagger`."""

    config: LabelModelConfig
    """What the model reads, its layers, its labels."""
    tokenizer: Tokenizer | None
    """Where it reads texts or words."""

    @abstractmethod
    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """Return the logits of each sequence (B, C), or step (T, B, C); beyond a row's end they mean nothing."""

    def log_probabilities(self, encoded: Encoded) -> Iterator[tuple[NDArray[np.int64], Batch, NDArray[np.float64]]]:
        """Read all sequences, those of similar length side by side, and give log p, (B, C) or (T, B, C)."""
        order = np.argsort(encoded.lengths, kind="stable")
        for first in range(0, len(order), _ROWS_AT_ONCE):
            numbers = order[first : first + _ROWS_AT_ONCE]
            batch = encoded.batch(numbers)
            logits = self.logits(batch)
            shifted = logits - logits.max(-1, keepdims=True)
            yield numbers, batch, shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

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
                own = log_p[: batch.lengths_B[row], row] if self.config.per_step else log_p[row]
                found[number] = np.exp(own)
        return found

    def predict(self, sequences: Sequence[Any]) -> list[Any]:
        """Return the likeliest label of each sequence, of a tagger a list of one a step; as `probabilities`."""
        labels = self.config.labels
        best = [p.argmax(-1) for p in self.probabilities(sequences)]
        return [[labels[i] for i in each] if self.config.per_step else labels[each] for each in best]


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
    model: LabelModel,
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
    protocol = f"each {'step' if model.config.per_step else 'sequence'} from all of its sequence"

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


def encode(model: LabelModel, examples: Examples) -> Encoded:
    """Return `examples` as `model` reads them; errors as of `evaluate_labels`."""
    config = model.config
    if examples.per_step is not config.per_step:
        wanted, found = ("each step", "the sequence") if config.per_step else ("the sequence", "each step")
        raise ConfigError(f"The model needs a label for {wanted}; the examples have one for {found}.")
    return Encoded(config, model.tokenizer, examples.sequences, examples.labels)


def read_saved(saved: Saved) -> tuple[LabelModelConfig, Tokenizer | None]:
    """Return what a run or model directory says of a model that labels, and its tokenizer, if it needs one.

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
    return config, tokenizer
