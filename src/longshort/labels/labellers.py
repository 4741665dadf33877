"""PyTorch's models that label sequences: a class for each, or a tag for each of its steps; in both directions too.

T  steps   B  rows   I  input width   H  hidden units   D  directions   C  labels

The layers are `longshort.RNN`, `GRU` and `LSTM` with the rows' lengths, so what is padding changes nothing, whatever
the order of the rows, and a sequence without a step is one too: its class is decided by the output layer's bias.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import masks, symbols
from longshort.config import LabelModelConfig
from longshort.errors import CheckpointError, ConfigError
from longshort.labels.examples import Batch
from longshort.labels.labelling import LabelModel, read_saved
from longshort.layers import GRU, LSTM, RNN
from longshort.model_files import Saved
from longshort.text.batches import IGNORED
from longshort.text.tokenizers import Tokenizer


class Labeller(nn.Module, LabelModel):
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
            inputs = symbols.embed(inputs, self.embedding.weight)
        elif self.identity is not None:
            inputs = F.embedding(inputs, self.identity)
        h_TBH, state = self.recurrent(inputs, lengths=lengths)
        last = state[0] if isinstance(state, tuple) else state
        directions = 1 + self.config.bidirectional
        return h_TBH, last[-directions:].transpose(0, 1).flatten(1)

    def _drop(self, h: Tensor) -> Tensor:
        return masks.dropout(h, self.config.dropout, self.training)

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
    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """Return what `LabelModel.logits` says; a model in training is in training afterwards."""
        with masks.evaluating(self):
            inputs = torch.from_numpy(batch.inputs).to(self.output.bias.device)
            logits = self(inputs, torch.from_numpy(batch.lengths_B))
        found: NDArray[np.float64] = logits.double().cpu().numpy()
        return found

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
    """Gives each sequence a class.

    Args:
        config: what the model reads, its layers, its labels; `per_step` is False.
        tokenizer: where it reads texts or words.
    """

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
    """Gives each step of a sequence a tag.

    Args:
        config: what the model reads, its layers, its labels; `per_step` is True.
        tokenizer: where it reads texts or words.
    """

    per_step = True

    def forward(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the logits (T, B, C) of each step's tag; beyond a row's end they mean nothing.

        Args:
            inputs: ids (T, B), where V stands for what the vocabulary does not hold, or vectors (T, B, I).
            lengths: steps of each row, in any order, 0 allowed; all of them if None.
        """
        return cast(Tensor, self.output(self._drop(self._read(inputs, lengths)[0])))


def make_labeller(config: LabelModelConfig, tokenizer: Tokenizer | None) -> Labeller:
    """Return a new classifier or tagger, as `config` says."""
    return (SequenceTagger if config.per_step else SequenceClassifier)(config, tokenizer)


def from_saved(saved: Saved) -> Labeller:
    """Return the classifier or tagger that a run or model directory holds, in evaluation mode.

    Raises:
        UsageError: it holds a language model.
        CheckpointError: the files do not belong together.
    """
    model = make_labeller(*read_saved(saved))
    model.load_weights(saved.weights)
    return model.eval()
