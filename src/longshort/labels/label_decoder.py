"""Runs a trained classifier or tagger without PyTorch: on the native kernels or on NumPy.

T  steps   B  rows   I  input width   H  hidden units   G  gates times H   D  directions   C  labels
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from longshort import machine, native, native_layers
from longshort.config import LabelModelConfig
from longshort.decoder import CELLS, LAYER_WEIGHTS, Array, State, look_up, normalised, step_of
from longshort.errors import CheckpointError
from longshort.labels.examples import Batch
from longshort.labels.labelling import LabelModel, read_saved
from longshort.model_files import Saved
from longshort.native_layers import Gains, Options, Sequences, Weights
from longshort.native_model import product
from longshort.text.tokenizers import Tokenizer


class LabelDecoder(LabelModel):
    """A trained classifier or tagger that labels.

    Args:
        config: what the model is.
        weights: its weights by name, as `SequenceClassifier.weights` gives them.
        tokenizer: where it reads texts or words.

    Raises:
        CheckpointError: a weight is missing or has another shape than `config` says.
    """

    def __init__(
        self, config: LabelModelConfig, weights: Mapping[str, Array], tokenizer: Tokenizer | None = None
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._cell = CELLS[config.cell]
        shapes = _weight_shapes(config)
        for name in {**shapes, **weights}:
            wanted, given = shapes.get(name, "nothing"), weights[name].shape if name in weights else "nothing"
            if wanted != given:
                raise CheckpointError(
                    f"The weight {name!r:.80} should have the shape {wanted}; the file has {given}.",
                    "Restore the files that were saved together.",
                )
        self._weights = {name: np.asarray(weights[name], dtype=np.float32) for name in shapes}
        self.threads = machine.cores()
        """At most so many are used."""
        self._native = native.ready()

    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """Return the logits of each sequence (B, C), or step (T, B, C); beyond a row's end they mean nothing."""
        config, lengths_B = self.config, batch.lengths_B
        run = self._run_native if self._native else self._run
        x_TBI, ends = self._inputs(batch), list[Array]()
        for layer in range(config.layers):
            y_TBH, ends = run([f"l{layer}{suffix}" for suffix in suffixes(config)], x_TBI, lengths_B)
            x_TBI = x_TBI + y_TBH if layer and config.residual else y_TBH
        read = x_TBI  # zeros beyond a row's end, so they may be in the sum
        if not config.per_step and config.pooling == "ends":
            read = np.concatenate(ends, axis=-1)
        elif not config.per_step:
            read = x_TBI.sum(0) / np.maximum(lengths_B, 1)[:, None].astype(np.float32)
        logits: NDArray[np.float64] = product(read, self._weights["output.weight"].T).astype(np.float64)
        return logits + self._weights["output.bias"]

    def weights(self) -> dict[str, Array]:
        """Return the weights by name, as they were given."""
        return dict(self._weights)

    def _inputs(self, batch: Batch) -> Array:
        """Return what the first layer reads, (T, B, I)."""
        config, inputs = self.config, batch.inputs
        if not config.inputs:
            inputs = look_up(self._weights["embedding.weight"] if config.embedding else self._one_hot, inputs)
        return inputs

    @cached_property
    def _one_hot(self) -> Array:
        return np.eye(self.config.vocab_size, dtype=np.float32)

    def _run_native(self, ofs: list[str], x_TBI: Array, lengths_B: NDArray[np.int64]) -> tuple[Array, list[Array]]:
        """Return what one layer puts out, (T, B, D H), and what each direction has after its last step, (B, H)."""
        config, w, steps = self.config, self._weights, np.arange(len(x_TBI))[:, None]
        weights = [Weights(*(w[f"recurrent.{name}_{of}"] for name in LAYER_WEIGHTS)) for of in ofs]
        gains = [Gains(*(w[name] for name in _gains(config, of))) if config.layer_norm else None for of in ofs]
        options = [Options(gains=own) for own in gains]
        sequences = Sequences(
            counts=(lengths_B > steps).sum(1),
            order=np.argsort(-lengths_B, kind="stable"),
        )
        done = native_layers.forward_directions(
            config.cell, x_TBI, weights, options, sequences=sequences, threads=self.threads
        )
        return done.y, [*done.h_n]

    def _run(self, ofs: list[str], x_TBI: Array, lengths_B: NDArray[np.int64]) -> tuple[Array, list[Array]]:
        """The same by NumPy, step by step."""
        found = [self._run_direction(of, x_TBI, lengths_B) for of in ofs]
        return np.concatenate([y for y, _ in found], axis=-1), [end for _, end in found]

    def _run_direction(self, of: str, x_TBI: Array, lengths_B: NDArray[np.int64]) -> tuple[Array, Array]:
        w, (T, B), H = self._weights, x_TBI.shape[:2], self.config.hidden
        x_TBG = normalised(w, f"ih_{of}", product(x_TBI, w[f"recurrent.weight_ih_{of}"].T))
        x_TBG += w[f"recurrent.bias_ih_{of}"]
        step, y_TBH = step_of(self._cell, w, of), np.zeros((T, B, H), np.float32)
        state: State = tuple(np.zeros((B, H), np.float32) for _ in self._cell.states)
        for t in reversed(range(T)) if of.endswith("_reverse") else range(T):
            h_BG = normalised(w, f"hh_{of}", product(state[0], w[f"recurrent.weight_hh_{of}"].T))
            after, _ = step(x_TBG[t], h_BG + w[f"recurrent.bias_hh_{of}"], state)
            has_B1 = (lengths_B > t)[:, None]
            state = tuple(np.where(has_B1, new, old) for new, old in zip(after, state, strict=True))
            y_TBH[t] = np.where(has_B1, after[0], 0)
        return y_TBH, state[0]


def suffixes(config: LabelModelConfig) -> tuple[str, ...]:
    """Return how the weights of each direction end, behind the layer's number."""
    return ("", "_reverse")[: 1 + config.bidirectional]


def _gains(config: LabelModelConfig, of: str) -> list[str]:
    """Return the names of a layer's gains of layer normalisation, as `native_layers.Gains` takes them."""
    return [f"recurrent.{name}_{of}" for name in native.gain_sizes(config.cell, 0, 0)]


def _weight_shapes(config: LabelModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight."""
    V, H, D, C = config.vocab_size, config.hidden, 1 + config.bidirectional, len(config.labels)
    G = len(CELLS[config.cell].gates) * H
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (V, config.embedding)} if V and config.embedding else {}
    for layer in range(config.layers):
        width = D * H if layer else config.inputs or config.embedding or V
        for suffix in suffixes(config):
            of = f"l{layer}{suffix}"
            plain = {"weight_ih": (G, width), "weight_hh": (G, H), "bias_ih": (G,), "bias_hh": (G,)}
            shapes |= {f"recurrent.{name}_{of}": shape for name, shape in plain.items()}
            if config.layer_norm:
                gains = native.gain_sizes(config.cell, G, H)
                shapes |= {f"recurrent.{name}_{of}": (size,) for name, size in gains.items()}
    return {**shapes, "output.weight": (C, D * H), "output.bias": (C,)}


def from_saved(saved: Saved) -> LabelDecoder:
    """Return the classifier or tagger that a run or model directory holds.

    Raises:
        UsageError: it holds a language model.
        CheckpointError: the files do not belong together.
    """
    config, tokenizer = read_saved(saved)
    return LabelDecoder(config, saved.weights, tokenizer)
