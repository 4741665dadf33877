"""The native kernels as operations that torch.compile, torch.export and dispatch modes see: one node a layer.

    longshort::layer            y, h_n, c_n and what the backward pass needs, from x, state and weights
    longshort::layer_backward   the gradients

Eager calls go past this, straight to `ops`. All arguments are tensors and numbers, so that a graph can be saved; the
state, masks (a list has one of each direction), counts and vectors that a call does not have are None, also lists:
AOTInductor hands on empty ones as None. Gradients of gradients are refused: a graph holds no equations that could be
differentiated once more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longshort import backends, buffers, calls, native, native_backend, ops
from longshort.cells import Options, Readings, Sequences, Stack, State

_LAYER = (
    "Tensor x, Tensor? h_0, Tensor? c_0, Tensor[] weights, str cell, int hidden_size, int directions, bool bias, "
    "bool batch_first, Tensor? counts, Tensor? order, SymInt batch_size, bool packed, Tensor[]? h_masks, "
    "Tensor[]? zoneout_masks, float zoneout, Tensor[]? resets, int target, str[]? vectors, int projected"
)


class _Layer(NamedTuple):
    """Those arguments, which both operations begin with."""

    x: Tensor
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]
    cell: str
    hidden_size: int
    directions: int
    bias: bool
    batch_first: bool
    counts: Tensor | None
    order: Tensor | None
    batch_size: int
    packed: bool
    h_masks: list[Tensor] | None
    zoneout_masks: list[Tensor] | None
    zoneout: float
    resets: list[Tensor] | None
    target: int
    vectors: list[str] | None
    projected: int

    def size(self) -> tuple[int, int]:
        """Return T and B."""
        if self.counts is not None:
            return self.counts.shape[0], self.batch_size
        return (self.x.shape[1], self.x.shape[0]) if self.batch_first else (self.x.shape[0], self.x.shape[1])

    @property
    def state_sizes(self) -> list[int]:
        """The widths of h and, of an LSTM, c."""
        return [self.projected or self.hidden_size, self.hidden_size][: native.STATES[self.cell]]


_NUM_LAYER = len(_Layer._fields)
_library: Any = torch.library.Library("longshort", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"layer({_LAYER}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"layer_backward({_LAYER}, Tensor y, Tensor saved, Tensor? dy, Tensor? dh_n, Tensor? dc_n, bool[] wanted)"
    " -> Tensor[]"
)


def _call(given: _Layer) -> tuple[Tensor, State | None, list[Tensor], calls.Call]:
    """Return x, state, weights and the rest, from the arguments that both operations share."""
    sequences, options = None, tuple[Options, ...]()
    if given.counts is not None:
        order = None if given.order is None else given.order.contiguous()
        sequences = Sequences(given.counts.contiguous(), order, given.batch_size, given.packed)
    masks: tuple[list[Any] | None, ...] = (given.h_masks, given.zoneout_masks, given.resets)
    if any(masks) or given.zoneout:
        of_directions = zip(*(each or [None] * given.directions for each in masks), strict=True)
        options = tuple(
            Options(h_mask_BH=h, zoneout_mask_TBH=zoneout, zoneout=given.zoneout, resets_TB=resets).contiguous()
            for h, zoneout, resets in of_directions
        )
    plain = (given.cell, given.hidden_size, given.directions, given.bias, given.batch_first, sequences, options)
    vectors = tuple(given.vectors or ())
    call = calls.Call(*plain, given.target, vectors, projected=given.projected).resolved(given.x)
    state = None
    if given.h_0 is not None:
        state = tuple(calls.dense(tensor) for tensor in (given.h_0, given.c_0) if tensor is not None)
    return calls.rows(given.x), state, list(map(calls.dense, given.weights)), call


def _saved_floats(cell: str, H: int, T: int, B: int, target: int, layer_norm: bool) -> int:
    """Return what one direction saves, for all rows of all steps, also those that there are not, and the target.

    A graph that names no target is made before it is known which one runs: the most that any of them saves. The next
    direction's begins with a line of the cache. Compiled graphs that PyTorch keeps on disk hold this size and never ask
    again, also of a later version: where it changes, an operation must get another argument.
    """
    return (T * B * _floats_a_row(cell, H, target, layer_norm) + calls.SAVED_OF_ALL) // 16 * 16 + 16


@functools.cache
def _floats_a_row(cell: str, H: int, target: int, layer_norm: bool) -> int:
    targets = (target,) if target >= 0 else [calls.TARGETS[name] for name in native.supported()]
    return max(calls.saved_floats_a_row(cell, H, number, layer_norm) for number in targets)


def _layer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, (save,) = _Layer(*arguments[:_NUM_LAYER]), arguments[_NUM_LAYER:]
    x, state, weights, call = _call(given)
    floats = _saved_floats(call.cell, call.H, *call.size(x), given.target, call.layer_norm) if save else 0
    saved = buffers.prefer_large_pages(x.new_empty(call.directions, floats))
    y, after = ops.forward(call, x, state, weights, saved.unbind() if save else ())
    if save:
        if (written := calls.saved_floats(call, x)) < floats - 1:
            saved[:, written:] = 0  # what absent steps and smaller vectors leave
        saved[:, -1] = call.target
    return y, after[0], after[1] if len(after) > 1 else x.new_empty(0), saved


def _layer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, (save,) = _Layer(*arguments[:_NUM_LAYER]), arguments[_NUM_LAYER:]
    (T, B), D, x = given.size(), given.directions, given.x
    floats = 0
    if save:
        layer_norm = "gamma_ih" in (given.vectors or ())
        floats = _saved_floats(given.cell, given.hidden_size, T, B, given.target, layer_norm)
    P, *rest = given.state_sizes
    c_n = x.new_empty(D, B, *rest) if rest else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], D * P), x.new_empty(D, B, P), c_n, x.new_empty(D, floats)


def _layer_backward(*arguments: Any) -> list[Tensor]:
    y, saved, dy, dh_n, dc_n, wanted = arguments[_NUM_LAYER:]
    x, state, weights, call = _call(_Layer(*arguments[:_NUM_LAYER]))
    call = call._replace(target=int(saved[0, -1]))  # it alone knows how what it has saved lies
    dstate = (dh_n, dc_n)[: call.num_states]
    parts = saved.unbind()
    found = ops.backward(call, x, state, weights, y, parts, dy, dstate, wanted)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


def _layer_backward_fake(*arguments: Any) -> list[Tensor]:
    given, wanted = _Layer(*arguments[:_NUM_LAYER]), arguments[-1]
    _, B = given.size()
    states = [(given.directions, B, width) for width in given.state_sizes]
    shapes = [given.x.shape, *states, *[weight.shape for weight in given.weights]]
    return [given.x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    y, _, _, saved = output
    x, h_0, c_0, weights, *rest = inputs[:_NUM_LAYER]
    ctx.rest = rest
    ctx.save_for_backward(x, h_0, c_0, *weights, y, saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Tensor | None) -> Any:
    x, h_0, c_0, *weights, y, saved = ctx.saved_tensors
    lstm = native.STATES[ctx.rest[0]] == 2
    need = ctx.needs_input_grad
    states = (need[1], need[2])[: 1 + lstm]
    of_weights = need[3] if isinstance(need[3], (list, tuple)) else [need[3]] * len(weights)
    wanted = [bool(need[0]), *map(bool, states), *map(bool, of_weights)]
    found = torch.ops.longshort.layer_backward(
        x, h_0, c_0, weights, *ctx.rest, y, saved, dy, dh_n, dc_n if lstm else None, wanted
    )
    grads = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    dc_0 = grads[2] if lstm else None
    # Where a list of tensors went in, a list of gradients is to come out; masks have none.
    rest = [[None] * len(value) if _is_tensors(value) else None for value in ctx.rest]
    return (grads[0], grads[1], dc_0, grads[2 + lstm :], *rest, None)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value)


def _setup_backward(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    return None


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "longshort's compiled layers have no gradients of gradients.\n"
        "Compile under longshort.kernels.use('reference'), or take these gradients without torch.compile."
    )


_library.impl("layer", _layer, "CPU")
_library.impl("layer_backward", _layer_backward, "CPU")
torch.library.register_fake("longshort::layer", _layer_fake, lib=_library)
torch.library.register_fake("longshort::layer_backward", _layer_backward_fake, lib=_library)
torch.library.register_autograd("longshort::layer", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("longshort::layer_backward", _refuse, setup_context=_setup_backward, lib=_library)


def _given(tensors: Iterable[Tensor | None]) -> list[Tensor] | None:
    return [tensor for tensor in tensors if tensor is not None] or None


def run_graph(
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
    target: int = -1,
    grad: bool = False,
) -> tuple[Tensor, State]:
    """Run a stack of layers, one node each; arguments as in `native_backend.run_native`."""
    assert readings is None
    D = 2 if stack.bidirectional else 1
    layers, per_layer = stack.num_layers, len(weights) // stack.num_layers
    cell = calls.cell_of(stack)
    lstm = native.STATES[cell] == 2
    rows: tuple[Any, ...] = (None, None, 0, False)
    if sequences is not None:
        rows = (sequences.counts, sequences.order, sequences.batch_size, sequences.packed)
    h_n, c_n = [], []
    for layer in range(layers):
        having = options[layer * D : (layer + 1) * D]
        own, vectors = native_backend.join_vectors(D, weights[layer * per_layer : (layer + 1) * per_layer], having)
        before = [None, None] if state is None else [tensor[layer * D : (layer + 1) * D] for tensor in state]
        x, h, c, _ = torch.ops.longshort.layer(
            x,
            before[0],
            before[1] if lstm else None,
            own,
            cell,
            stack.hidden_size,
            D,
            stack.bias,
            batch_first,
            *rows,
            _given(each.h_mask_BH for each in having),
            _given(each.zoneout_mask_TBH for each in having),
            having[0].zoneout if having else 0.0,
            _given(each.resets_TB for each in having),
            target,
            vectors or None,
            stack.proj_size,
            grad,
        )
        h_n.append(h)
        c_n.append(c)
        if dropout and training and layer + 1 < layers:
            x = backends.drop_between(x, dropout, batch_first, sequences)
    if layers == 1:
        return x, (h_n[0], c_n[0]) if lstm else (h_n[0],)
    return x, (torch.cat(h_n), torch.cat(c_n)) if lstm else (torch.cat(h_n),)
