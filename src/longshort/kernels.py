"""Which implementation runs a recurrent layer, and why.

    torch       PyTorch's own kernels (oneDNN, MKL or ATen on a CPU, cuDNN on a GPU): rnn, rnn_relu, gru, lstm
    reference   the equations of `cells.py`, step by step: every cell, any precision, differentiable twice

`auto`, the default, takes the fastest that can run the call. `use` forces one, `explain` names the choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort import cells
from longshort.cells import LayerWeights, State
from longshort.errors import UsageError

_TORCH_OPS: dict[str, Any] = {"rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "gru": torch.gru, "lstm": torch.lstm}
_NAMES = ("torch", "reference")
_forced: str | None = None


class Choice(NamedTuple):
    """An implementation and the reason why it runs."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def available() -> tuple[str, ...]:
    """Return the names that `use` takes, fastest first."""
    return _NAMES


def cells_of(name: str) -> tuple[str, ...]:
    """Return the names of the cells that the implementation `name` can run."""
    return tuple(_TORCH_OPS) if name == "torch" else tuple(cells.CELLS)


def active() -> str:
    """Return the implementation that is forced for this process, or `auto`."""
    return _forced or "auto"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one implementation for every layer of this process while the context lasts.

    Args:
        name: one of `available()`, or `auto`.

    Raises:
        UsageError: there is no implementation of that name.
    """
    global _forced
    if name not in (*_NAMES, "auto"):
        close = difflib.get_close_matches(name, _NAMES, n=1)
        raise UsageError(
            f"There is no kernel called {name!r}; there are {', '.join(_NAMES)} and auto.",
            f"Did you mean {close[0]!r}?" if close else "",
        )
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def choose(cell: str, packed: bool = False) -> Choice:
    """Return the implementation that a call runs.

    Args:
        cell: name of the cell.
        packed: whether the input is a `PackedSequence`.

    Raises:
        UsageError: the forced implementation cannot run the call.
    """
    if _forced == "reference":
        if packed:
            raise UsageError("The reference kernels take padded tensors, not a PackedSequence.", "Use kernel torch.")
        return Choice("reference", "forced by kernels.use")
    if cell in _TORCH_OPS:
        return Choice("torch", "forced by kernels.use" if _forced else "PyTorch has a fused kernel for this cell")
    if _forced == "torch":
        raise UsageError(f"PyTorch has no kernel for the cell {cell!r}.", "Use kernel reference, or auto.")
    return Choice("reference", f"PyTorch has no kernel for the cell {cell!r}")


def explain(layer: Any, x: Any = None) -> Choice:
    """Return the implementation that `layer(x)` would run, and why.

    Args:
        layer: one of longshort's layers or cells.
        x: its input, where the choice may depend on it.
    """
    return choose(layer.cell, packed=isinstance(x, torch.nn.utils.rnn.PackedSequence))


def run(
    cell: str,
    x_TBI: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, State]:
    """Run a stack of layers in one direction over a sequence of vectors.

    Args:
        cell: name of the cell.
        x_TBI: input.
        state: each tensor (layers, B, H).
        weights: of each layer, with biases.
        dropout: between layers, in training.
        training: whether dropout acts.

    Returns:
        Outputs (T, B, H) and the state after the last step.
    """
    if choose(cell).name == "reference":
        drop = dropout if training else 0.0
        return cells.run_stack(cells.get_cell(cell), x_TBI, state, weights, bias=True, dropout=drop)
    flat = [tensor for layer_weights in weights for tensor in layer_weights]
    hx = list(state) if cell == "lstm" else state[0]
    output, *after = _TORCH_OPS[cell](x_TBI, hx, flat, True, len(weights), dropout, training, False, False)
    return output, tuple(after)


def run_tokens(
    cell: str,
    ids_TB: Tensor,
    embedding_VE: Tensor | None,
    identity: Tensor | None,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, State]:
    """Run a stack of layers over a sequence of symbols.

    The first layer's product of embedding and input weights is taken once a symbol of the vocabulary, not once a
    token: a table of V rows from which the gates' input share is gathered. PyTorch's kernels cannot start from a
    gathered share; where V is below E they get one-hot rows and the table as input weights, the same product, V wide.

    Args:
        cell: name of the cell.
        ids_TB: symbols; the id V is unknown and embedded as zero.
        embedding_VE: the embedding, or None for one-hot input.
        identity: (V + 1, V), the identity with a row of zeros below it; None where V is above E.
        state: each tensor (layers, B, H).
        weights: of each layer, with biases; the first input weights are (G, E), or (G, V) for one-hot input.
        dropout: between layers, in training.
        training: whether dropout acts.

    Returns:
        Outputs (T, B, H) and the state after the last step.
    """
    weight_ih, bias_ih = weights[0][0], weights[0][2]
    if choose(cell).name == "reference":
        table_VG = weight_ih.T if embedding_VE is None else embedding_VE @ weight_ih.T
        first = F.embedding(ids_TB, F.pad(table_VG, (0, 0, 0, 1)) + bias_ih)
        drop = dropout if training else 0.0
        return cells.run_stack(
            cells.get_cell(cell), first, state, weights, bias=True, dropout=drop, first_is_gates=True
        )
    if identity is not None:
        x_TBI = F.embedding(ids_TB, identity)
        if embedding_VE is not None:
            weights = [[weight_ih @ embedding_VE.T, *weights[0][1:]], *weights[1:]]
    else:
        assert embedding_VE is not None
        x_TBI = F.embedding(ids_TB, F.pad(embedding_VE, (0, 0, 0, 1)))
    return run(cell, x_TBI, state, weights, dropout=dropout, training=training)
