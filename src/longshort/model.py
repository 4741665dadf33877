"""The language model: embedding, recurrent stack, output layer; the state goes in and comes out explicitly.

T  steps   B  rows   V  symbols   E  embedding width   H  hidden units   L  layers
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import cells, checkpoint, kernels, masks, native, symbols
from longshort.cells import Readings, Stack, State
from longshort.config import ModelConfig
from longshort.decoder import Decoder, check_weights, runs_natively
from longshort.errors import UsageError
from longshort.head import AdaptiveSoftmax, Softmax
from longshort.layers import CellStack
from longshort.model_files import Saved
from longshort.text import tokenizers
from longshort.text.batches import IGNORED
from longshort.text.tokenizers import Tokenizer


class LanguageModel(nn.Module):
    """Predicts each next symbol of a text from all before it.

    Args:
        config: architecture and vocabulary size.
        tokenizer: of the text that the model reads, if it is to read texts and not only ids.

    The parameters are named as `torch.nn`'s: `embedding.weight` (V, E) unless symbols are fed one-hot,
    `recurrent.weight_ih_l0` (G, E or V) and so on, `output.weight` (V, H), `output.bias` (V)
    unless the softmax is adaptive.
    """

    identity: Tensor | None

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        V, H = config.vocab_size, config.hidden
        self.embedding = nn.Embedding(V, config.embedding) if config.embedding else None
        apart = config.residual or config.dropout > 0
        self.recurrent = CellStack(config.cell, config.embedding or V, H, config.layers, config.layer_norm, apart)
        self.output: Softmax | AdaptiveSoftmax = AdaptiveSoftmax(H, V) if config.adaptive_softmax else Softmax(H, V)
        if config.tied and self.embedding is not None and isinstance(self.output, Softmax):
            nn.init.uniform_(self.embedding.weight, -(H**-0.5), H**-0.5)
            self.output.weight = self.embedding.weight
        # One-hot rows, and a row of zeros for the unknown symbol; not weights, so not saved.
        one_hot = not config.embedding or config.embedding >= V
        identity = torch.cat([torch.eye(V), torch.zeros(1, V)]) if one_hot else None
        self.register_buffer("identity", identity, persistent=False)

    def zero_state(self, batch_size: int = 1) -> State:
        """Return the state before the first symbol: for each tensor of the cell's state zeros (L, B, H)."""
        names = cells.get_cell(self.config.cell).states
        like = self.recurrent.all_weights[0][0]
        return tuple(like.new_zeros(self.config.layers, batch_size, self.config.hidden) for _ in names)

    def forward(self, ids_TB: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict the symbol after each of `ids_TB`.

        Args:
            ids_TB: symbols 0 .. V-1, or V for one that the vocabulary does not hold.
            state: before the first of them, as this function or `zero_state` gave it; zeros if None.

        Returns:
            Logits (T, B, V) and the state after the last symbol. The gradient flows through both: cut it with
            `detach` where a window ends.

        Raises:
            UsageError: other numbers than symbols, or a state of other shape, type or device than `zero_state` gives.
        """
        h_TBH, state = self._read(ids_TB, state)
        return self.output.logits(h_TBH), state

    def loss(self, ids_TB: Tensor, targets_TB: Tensor, state: State | None, tokens: int) -> tuple[Tensor, State]:
        """Predict the symbol after each of `ids_TB`, of which `targets_TB` says what it was.

        Args:
            ids_TB: as of `forward`.
            targets_TB: symbols, int64; `text.batches.IGNORED` where there is nothing to predict.
            state: as of `forward`.
            tokens: what the loss is divided by, so that parts of a batch add up.

        Returns:
            The sum of -log p of the targets, in nats, divided by `tokens`; and the state after the last symbol.

        Raises:
            UsageError: as of `forward`; targets that are no symbols, or not one for each of `ids_TB`.
        """
        if targets_TB.shape != ids_TB.shape:
            wanted, given = tuple(ids_TB.shape), tuple(targets_TB.shape)
            raise UsageError(f"There must be a target for each symbol, {wanted}, got {given}.")
        targets_TB = self._checked(targets_TB, IGNORED, self.config.vocab_size - 1)
        h_TBH, state = self._read(ids_TB, state)
        return self.output.loss(h_TBH.flatten(0, 1), targets_TB.flatten(), tokens), state

    def _read(self, ids_TB: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Return what the output layer reads, (T, B, H), and the state after the last symbol."""
        config = self.config
        ids_TB = self._checked(ids_TB, 0, config.vocab_size)
        state = self.zero_state(ids_TB.shape[1]) if state is None else state
        if not ids_TB.numel():
            return state[0].new_zeros(*ids_TB.shape, config.hidden), state
        h_TBH, state = symbols.run(
            config.cell,
            ids_TB,
            None if self.embedding is None else self.embedding.weight,
            self.identity,
            state,
            self.recurrent.all_weights,
            dropout=config.dropout,
            training=self.training,
            residual=config.residual,
            options=self.recurrent.options,
        )
        return masks.dropout(h_TBH, config.dropout, self.training), state

    def _checked(self, ids_TB: Tensor, least: int, most: int) -> Tensor:
        """Return symbols as int64, where they are some, from `least` to `most`."""
        if ids_TB.dim() != 2 or ids_TB.is_floating_point() or ids_TB.dtype is torch.bool:
            raise UsageError(f"Symbols must be integers (T, B), got {tuple(ids_TB.shape)} of {ids_TB.dtype}.")
        if ids_TB.device != self.device:
            raise UsageError(f"Symbols must be where the model is, on {self.device}, not on {ids_TB.device}.")
        # Elsewhere looking would wait for the device, which refuses what is out of range itself.
        if ids_TB.is_cpu and ids_TB.numel() and not torch.compiler.is_compiling():
            lowest, highest = (int(number) for number in ids_TB.aminmax())
            if lowest < least or highest > most:
                given = lowest if lowest < least else highest
                raise UsageError(f"Symbols must be from {least} to {most}, got {given}.")
        return ids_TB.long()

    def initialise_normal(self, std: float = 0.01) -> None:
        """Draw every weight from N(0, std) and set every bias to zero, as the lecture does; gains stay 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            elif "gamma" not in name:
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.recurrent.all_weights[0][0].device

    @property
    def num_parameters(self) -> int:
        """Number of trained values; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights by name as float32 arrays, a tied output matrix left out."""
        state = {k: v.detach().cpu().float().numpy() for k, v in self.state_dict().items()}
        if self.config.tied:
            del state["output.weight"]
        return state

    def load_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over weights that `weights` gave.

        Raises:
            CheckpointError: they are those of another model.
        """
        cell = cells.get_cell(self.config.cell)
        check_weights(self.config, len(cell.gates), weights, cell.vectors)
        state = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
        if self.config.tied:
            state["output.weight"] = state["embedding.weight"]
        self.load_state_dict(state)

    def reader(self) -> LanguageModel | Decoder:
        """Return what reads texts quickest with the weights as they are now: a decoder, where native kernels run it."""
        native_kernels = kernels.active() in ("auto", native.active_target()) and native.ready()
        if self.tokenizer is None or self.device.type == "cuda" or not (native_kernels and runs_natively(self.config)):
            return self
        decoder = Decoder(self.config, self.weights(), self.tokenizer)
        decoder.threads = torch.get_num_threads()
        return decoder

    def _state_of(self, state: Any) -> State | None:
        """Return a state that may be arrays as tensors."""
        return state and tuple(torch.as_tensor(tensor, device=self.device) for tensor in state)

    # What evaluation and generation ask of any model, this one or the torch-free decoder: arrays in, arrays out.

    @torch.no_grad()
    def nats(
        self, inputs_TB: NDArray[np.int64], targets_TB: NDArray[np.int64], state: State | None
    ) -> tuple[NDArray[np.float64], State]:
        """Return -log p of each target in nats, float64 (T, B), and the state after the last input."""
        with masks.evaluating(self):
            h_TBH, state = self._read(torch.from_numpy(inputs_TB).to(self.device), self._state_of(state))
            targets_N = torch.from_numpy(targets_TB).to(self.device).flatten()
            nats_N = self.output.nats(h_TBH.flatten(0, 1), targets_N)
        return nats_N.double().view(targets_TB.shape).cpu().numpy(), state

    @torch.no_grad()
    def readings(self, ids_T: NDArray[np.int64]) -> list[dict[str, NDArray[np.float32]]]:
        """Read `ids_T` from a zero state and return what each layer had at every step, as `Decoder.readings`."""
        config, device = self.config, self.device
        ids_TB = self._checked(torch.from_numpy(ids_T).to(device).unsqueeze(1), 0, config.vocab_size)
        embedding_VE = None if self.embedding is None else self.embedding.weight
        x_TBI = symbols.vectors(ids_TB, embedding_VE, self.identity)
        weights = [weight for own in self.recurrent.all_weights for weight in own]
        stack = Stack(config.cell, x_TBI.shape[-1], config.hidden, config.layers, residual=config.residual)
        needs = frozenset({"return_gates", *(("layer_norm",) if config.layer_norm else ())})
        choice = kernels.choose(config.cell, needs, x=x_TBI, size=(len(ids_T), 1, config.hidden))
        found: list[Readings] = []
        options, state = self.recurrent.options, self.zero_state(1)
        kernels.run_layers(choice, stack, x_TBI, state, weights, options=options, readings=found)
        return [{name: value[:, 0].cpu().float().numpy() for name, value in each.items()} for each in found]

    @torch.no_grad()
    def logits(self, ids_T: NDArray[np.int64], state: State | None) -> tuple[NDArray[np.float32], State]:
        """Read `ids_T` and return the logits (V) of the symbol after the last, and the state there."""
        device = self.device
        with masks.evaluating(self):
            logits_TBV, state = self(torch.from_numpy(ids_T).to(device).unsqueeze(1), self._state_of(state))
        return logits_TBV[-1, 0].cpu().float().numpy(), state

    @torch.no_grad()
    def step(self, ids_B: NDArray[np.int64], state: State | None) -> tuple[NDArray[np.float32], State]:
        """Read a symbol of each of B texts; return the logits (B, V) of the next ones, and the state after."""
        with masks.evaluating(self):
            logits_TBV, state = self(torch.from_numpy(ids_B).to(self.device).unsqueeze(0), self._state_of(state))
        return logits_TBV[0].cpu().float().numpy(), state


def load_language_model(path: str | Path) -> LanguageModel:
    """Return the `LanguageModel` saved at `path`, a run or a model directory, in evaluation mode.

    Raises:
        UsageError: there is nothing at `path`.
        CheckpointError: it is damaged, or the files do not belong together.
    """
    return from_saved(checkpoint.load_model(path))


def from_saved(saved: Saved) -> LanguageModel:
    """Return the `LanguageModel` of what was read; errors as of `load_language_model`."""
    config = ModelConfig.from_dict(saved.model, f"{saved.path}/config.json")
    model = LanguageModel(config, tokenizers.from_json(saved.tokenizer_json))
    model.load_weights(saved.weights)
    return model.eval()
