"""A stack of layers run by PyTorch's own kernels, or by the reference equations: one signature for both.

    T  steps   B  rows   N  steps of all rows   I  input width   H  hidden units   D  directions

`kernels` chooses between them. Arguments that do not fit have been refused before; nothing is checked here.

    stack        the layers
    x            (T, B, I), or (B, T, I) with `batch_first`, or packed (N, I)
    state        each tensor (layers * D, B, H), the LSTM's first P wide where it projects; zeros if None
    weights      flat, in PyTorch's order
    batch_first  see `x`; the output is laid as `x` is
    dropout      share of each layer's output, except the last's, that is dropped in training
    training     whether dropout acts
    sequences    which rows have which steps; all if None
    options      one entry a layer and direction; empty if none has any
    readings     a list to be filled with every gate and state, (T, B, H) each, an entry a layer and direction
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from longshort import cells, masks
from longshort.cells import Options, Readings, Sequences, Stack, State

TORCH_OPS: dict[str, Any] = {"rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "gru": torch.gru, "lstm": torch.lstm}
_cudnn: Any = torch.backends.cudnn
TORCH_STEPS: dict[str, Any] = {
    "rnn": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "gru": torch.gru_cell,
    "lstm": torch.lstm_cell,
}


def lay_for_cudnn(stack: Stack, weights: Sequence[Tensor], apart: bool) -> None:
    """Move weights on a GPU into one piece of memory, as cuDNN reads them: it would copy them at every call.

    They stay the same tensors, as after `torch.nn.RNNBase.flatten_parameters`. Left as they are where cuDNN does not
    run them, or two share their memory.

    Args:
        stack: the layers.
        weights: flat, in PyTorch's order.
        apart: whether `kernels.run_layers` runs one layer after the other, since there is dropout between them or they
            are residual: then each gets a piece.
    """
    if stack.cell not in TORCH_OPS or stack.coupled or not all(weight.is_cuda for weight in weights):
        return
    if not torch._use_cudnn_rnn_flatten_weight():
        return
    first, pointers = weights[0], {weight.data_ptr() for weight in weights}
    fit = all(weight.dtype is first.dtype and _cudnn.is_acceptable(weight) for weight in weights)
    if not fit or len(pointers) < len(weights):
        return
    mode = {"rnn": "RNN_TANH", "rnn_relu": "RNN_RELU"}.get(stack.cell, stack.cell.upper())
    per_layer = len(weights) // stack.num_layers
    D = 1 + stack.bidirectional
    each = 1 if apart else stack.num_layers
    where: Any = torch.cuda.device_of
    with where(first), torch.no_grad():
        for layer in range(0, stack.num_layers, each):
            torch._cudnn_rnn_flatten_weight(
                list(weights[layer * per_layer : (layer + each) * per_layer]),
                per_layer // D,
                D * stack.output_size if layer else stack.input_size,
                _cudnn.rnn.get_cudnn_mode(mode),
                stack.hidden_size,
                stack.proj_size,
                each,
                False,
                stack.bidirectional,
            )


def zero_state(stack: Stack, x: Tensor, batch_size: int) -> State:
    """Return the state of a stack that has read nothing."""
    return tuple(x.new_zeros(stack.num_directions, batch_size, width) for width in stack.state_sizes)


def drop_between(x: Tensor, share: float, batch_first: bool, sequences: Sequences | None) -> Tensor:
    """Drop a share of what goes from one layer to the next: the same steps, rows and units however `x` is laid."""
    packed = sequences is not None and sequences.packed
    if not (packed or batch_first):
        return masks.dropout(x, share)
    T, B = (x.shape[1], x.shape[0]) if sequences is None else (len(sequences.counts), sequences.batch_size)
    mask_TBH = masks.dropout_mask((T, B, x.shape[-1]), share, x)
    if sequences is not None and packed:
        return x * mask_TBH.flatten(0, 1).index_select(0, sequences.packed_index.to(x.device))
    return x * mask_TBH.transpose(0, 1)


def run_reference(
    stack: Stack,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    sequences: Sequences | None = None,
    options: Sequence[Options] = (),
    readings: list[Readings] | None = None,
) -> tuple[Tensor, State]:
    """Run every step of every layer by the equations of `cells`."""
    packed = sequences is not None and sequences.packed
    x_TBI = x.transpose(0, 1) if batch_first else x
    if sequences is not None and packed:
        T, B = sequences.valid_TB.shape
        index = sequences.packed_index.to(x.device)
        x_TBI = x.new_zeros(T * B, stack.input_size).index_copy(0, index, x).view(T, B, -1)
    output, state = cells.run_stack(
        cells.get_cell(stack.cell),
        x_TBI,
        zero_state(stack, x, x_TBI.shape[1]) if state is None else state,
        stack.group(weights),
        bias=stack.bias,
        dropout=dropout if training else 0.0,
        bidirectional=stack.bidirectional,
        sequences=sequences,
        options=options,
        readings=readings,
    )
    if sequences is not None and packed:
        return output.flatten(0, 1).index_select(0, index), state
    return output.transpose(0, 1) if batch_first else output, state


def run_torch(
    stack: Stack,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    sequences: Sequences | None = None,
    options: Sequence[Options] = (),
    readings: list[Readings] | None = None,
) -> tuple[Tensor, State]:
    """Run PyTorch's kernel, which knows neither options nor readings; rows of several lengths are packed for it."""
    assert not options
    assert readings is None
    if sequences is not None and not sequences.packed:
        return _run_torch_padded(stack, x, state, weights, batch_first, dropout, training, sequences)
    if state is None:
        rows = x.shape[0 if batch_first else 1] if sequences is None else sequences.batch_size
        state = zero_state(stack, x, rows)
    hx = state if len(state) > 1 else state[0]
    if x.is_cuda and not training and torch.is_grad_enabled():
        # The same numbers without dropout; but cuDNN keeps what gradients need in training alone.
        dropout, training = 0.0, any(tensor.requires_grad for tensor in (x, *state, *weights))
    rest = (list(weights), stack.bias, stack.num_layers, dropout, training, stack.bidirectional)
    op = TORCH_OPS[stack.cell]
    output, *after = op(x, hx, *rest, batch_first) if sequences is None else op(x, sequences.counts, hx, *rest)
    if torch.compiler.is_compiling():  # PyTorch's own equations of the LSTM, before 2.13, give (layers * D, 1, B, H)
        after = [new.reshape(old.shape) for old, new in zip(state, after, strict=True)]
    return output, tuple(after)


def _run_torch_padded(
    stack: Stack,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    batch_first: bool,
    dropout: float,
    training: bool,
    sequences: Sequences,
) -> tuple[Tensor, State]:
    # PyTorch packs no empty batch, and a graph does not know what to pack.
    if torch.compiler.is_compiling() or not sequences.counts[0]:
        return run_reference(
            stack,
            x,
            state,
            weights,
            batch_first=batch_first,
            dropout=dropout,
            training=training,
            sequences=sequences,
        )
    x_TBI = x.transpose(0, 1) if batch_first else x
    T, B = x_TBI.shape[:2]
    state = zero_state(stack, x, B) if state is None else state
    lengths_B = sequences.valid_TB.sum(0)
    rows = lengths_B.argsort(descending=True, stable=True)[: int(sequences.counts[0])]
    lengths, rows = lengths_B[rows], rows.to(x.device)
    data, counts, *_ = pack_padded_sequence(x_TBI.index_select(1, rows), lengths)
    data, after = run_torch(
        stack,
        data,
        tuple(tensor.index_select(1, rows) for tensor in state),
        weights,
        dropout=dropout,
        training=training,
        sequences=Sequences(counts, None, len(rows), packed=True),
    )
    output, _ = pad_packed_sequence(PackedSequence(data, counts), total_length=T)
    output = output.new_zeros(T, B, output.shape[-1]).index_copy(1, rows, output)
    state = tuple(old.index_copy(1, rows, new) for old, new in zip(state, after, strict=True))
    return output.transpose(0, 1) if batch_first else output, state


def step_reference(cell: str, x_BI: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Run one step by the equations; the weights are weight_ih, weight_hh, bias_ih and bias_hh."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    assert weight_ih is not None
    assert weight_hh is not None
    x_BG, h_BG = F.linear(x_BI, weight_ih, bias_ih), F.linear(state[0], weight_hh, bias_hh)
    return cells.get_cell(cell).step(x_BG, h_BG, state)[0]


def step_torch(cell: str, x_BI: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Run one step by PyTorch's kernel; the weights as in `step_reference`."""
    after = TORCH_STEPS[cell](x_BI, state if len(state) > 1 else state[0], *weights)
    return after if isinstance(after, tuple) else (after,)
