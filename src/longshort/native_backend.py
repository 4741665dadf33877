"""A stack of layers by the native kernels, with gradients.

    T  steps   B  rows   N  steps of all rows   I  input width   H  hidden units   D  directions

One layer runs after the other, by `ops`. Eager calls go straight to it; under torch.compile and torch.export a layer is
the operation `longshort::layer` of `graph`. `kernels` decides what comes here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from longshort import backends, buffers, cells, native
from longshort.calls import Call, cell_of, dense, is_readable, rows, saved_floats
from longshort.cells import Options, Readings, Sequences, Stack, State
from longshort.ops import backward, forward, show

CAN = frozenset(
    {"packed", "lengths", "resets", "return_gates", "proj_size"}
    | {"recurrent_dropout", "zoneout", "layer_norm", "peephole", "coupled_gates"}
)
"""What a call may have beyond a plain layer."""


class _LongshortLayer(torch.autograd.Function):  # by its name `grad_fn` and anomalies show it
    """One layer with gradients. Gradients of gradients go through the equations of `cells`."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        num_states = call.num_states
        state, weights = rest[:num_states], rest[num_states:]
        given = None if state[0] is None else state
        saved = [buffers.Saved(saved_floats(call, x)) for _ in range(call.directions)]
        y, after = forward(call, x, given, weights, [each.tensor for each in saved])  # type: ignore[arg-type]
        ctx.call, ctx.num_states = call, num_states
        buffers.keep(ctx, (x, *rest), y, saved)
        ctx.set_materialize_grads(False)
        return (y, *after, *(show(call, x, [each.tensor for each in saved]) if call.shows else ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *after: Tensor | None) -> tuple[Any, ...]:
        (x, *rest), y, saved = buffers.kept(ctx)
        state, weights = tuple(rest[: ctx.num_states]), rest[ctx.num_states :]
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not all(map(is_readable, (dy, *after))):
            return (None, *by_equations(ctx.call, x, state, weights, (dy, *after), wanted))
        given = None if state[0] is None else state
        if y is None:
            again = [torch.empty_like(each) for each in saved]
            y, _ = forward(ctx.call, x, given, weights, again)
        dstate, dgates = after[: ctx.num_states], after[ctx.num_states :]
        found = backward(ctx.call, x, given, weights, y, saved, dy, dstate, wanted, dgates)
        buffers.release(ctx)
        return (None, *found)


def by_equations(
    call: Call,
    x: Tensor,
    state: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return what `backward` returns, differentiable once more where gradients are enabled.

    Args:
        call: the layer.
        x: as in `forward`.
        state: h_0, and for the LSTM c_0; None where there is none.
        weights: as in `forward`.
        gradients: of y, h_n, for the LSTM c_n, and of what `show` gave; None: zeros.
        wanted: as in `backward`.
    """
    with equations(x, *state, *weights) as inputs:
        x, *rest = inputs
        given, weights = rest[: len(state)], rest[len(state) :]
        outputs = run_equations(call, x, [tensor for tensor in given if tensor is not None], weights)
    return differentiate(outputs, gradients, inputs, wanted)


@contextmanager
def equations(*inputs: Tensor | None) -> Iterator[list[Any]]:
    """Give the inputs of a layer for its equations, whose gradients are to be taken: None stays None.

    A state may come from the same weights. Gradients must end at this call's own inputs, and not go on to what those
    are made of, as the backward pass that asks for them does that; so these are views of them.
    """
    # The user may have put autocast around the backward pass.
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        yield [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]


def run_equations(call: Call, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return y, h_n, for the LSTM c_n, and what `show` gives, of a layer by the equations of `cells`.

    Args:
        call: the layer.
        x: as in `forward`.
        state: h_0, and for the LSTM c_0; empty: zeros.
        weights: as in `forward`.
    """
    given: Any = tuple(state) or None
    plain, options = part_vectors(call, weights)
    readings: list[Readings] | None = [] if call.shows else None
    if call.ids is not None:
        first = F.embedding(call.ids, x) + plain[2]
        cell = cells.get_cell(call.cell)
        given = given or tuple(x.new_zeros(1, call.ids.shape[1], call.H) for _ in cell.states)
        output, after = cells.run_stack(
            cell, first, given, [plain], bias=True, first_is_gates=True, sequences=call.sequences
        )
    else:
        coupled = call.cell == native.COUPLED
        cell_name = "lstm" if coupled else call.cell
        stack = Stack(cell_name, x.shape[-1], call.H, 1, call.bias, call.directions == 2, call.projected, coupled)
        output, after = backends.run_reference(
            stack,
            x,
            given,
            plain,
            batch_first=call.batch_first,
            sequences=call.sequences,
            options=options,
            readings=readings,
        )
    shown = (torch.stack([seen[name] for name in native.SHOWN[call.cell]]) for seen in readings or ())
    return [output, *after, *shown]


def differentiate(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of `inputs` by PyTorch, those that are `wanted`; differentiable where gradients are enabled.

    Args:
        outputs: with a graph that leads to the inputs.
        gradients: of the outputs; None: zeros.
        inputs: None where there is none.
        wanted: one entry for each input.
    """
    given = zip(outputs, gradients, strict=True)
    pairs = [(out, grad) for out, grad in given if grad is not None and out.requires_grad]
    asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]
    if not pairs:
        return [None for _ in wanted]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            asked,
            [grad for _, grad in pairs],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]


def join_vectors(
    directions: int, weights: Sequence[Tensor], options: Sequence[Options]
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return a layer's weights, each direction's followed by its options' vectors, and the names of these."""
    vectors = [having.vectors for having in options]
    names = tuple(vectors[0]) if vectors else ()
    if names:
        n = len(weights) // directions
        joined = ((*weights[d * n : (d + 1) * n], *own.values()) for d, own in enumerate(vectors))
        weights = [tensor for own in joined for tensor in own]
    return list(map(dense, weights)), names


def part_vectors(call: Call, weights: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Options]]:
    """Return a layer's weights without vectors, and its options with them."""
    if not call.vectors:
        return list(weights), call.options
    n = len(weights) // call.directions
    plain: list[Tensor] = []
    options = []
    for d in range(call.directions):
        own = weights[d * n : (d + 1) * n]
        plain += own[: call.num_plain]
        vectors: dict[str, Any] = dict(zip(call.vectors, own[call.num_plain :], strict=True))
        options.append(replace(call.options[d] if call.options else Options(), **vectors))
    return plain, options


def run_native(
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
    ids: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run a stack of layers by the native kernels.

    Arguments as in `backends`; `target` is the number of the target that runs, -1 for what PyTorch's switches allow or
    else the active one, and `grad` says whether gradients are wanted. With `ids` (T, B), int64, the first layer reads
    symbols; `x` is its table then, as `Call` says, and the first of the weights is empty.
    """
    D = 2 if stack.bidirectional else 1
    layers, per_layer = stack.num_layers, len(weights) // stack.num_layers
    cell = cell_of(stack)
    shows = readings is not None and bool(native.SHOWN[cell])
    x = unwrap_if_dead(x)  # what has left a transform of torch.func that is over
    if state is not None:
        state = tuple(dense(unwrap_if_dead(tensor)) for tensor in state)
    after: list[State] = []
    for layer in range(layers):
        having = tuple(each.contiguous() for each in options[layer * D : (layer + 1) * D])
        own, vectors = join_vectors(D, weights[layer * per_layer : (layer + 1) * per_layer], having)
        symbols = None if layer or ids is None else ids.contiguous()
        plain = (cell, stack.hidden_size, D, stack.bias, batch_first, sequences, having, target)
        call = Call(*plain, vectors, symbols, shows, stack.proj_size).resolved(x)
        x = rows(x) if symbols is None else dense(x)
        before = state if state is None or layers == 1 else tuple(t[layer * D : (layer + 1) * D] for t in state)
        num_states = len(stack.state_sizes)
        shown: tuple[Tensor, ...] = ()
        if grad:
            x, *rest = _LongshortLayer.apply(call, x, *(before or (None,) * num_states), *own)  # type: ignore[no-untyped-call]
            last, shown = tuple(rest[:num_states]), tuple(rest[num_states:])
        else:
            saved = [buffers.Saved(saved_floats(call, x)) for _ in range(D if shows else 0)]
            y, last = forward(call, x, before, own, [each.tensor for each in saved], keep_packed=symbols is None)
            shown, x = show(call, x, [each.tensor for each in saved]), y
        after.append(last)
        if readings is not None:
            y_TBH = x.transpose(0, 1) if batch_first else x
            readings += [_reading(stack, h, gates, sequences) for h, gates in zip_longest(y_TBH.chunk(D, -1), shown)]
        if dropout and training and layer + 1 < layers:
            x = backends.drop_between(x, dropout, batch_first, sequences)
    if layers == 1:
        return x, after[0]
    return x, tuple(torch.cat(tensors) for tensors in zip(*after, strict=True))


def _reading(stack: Stack, h_TBH: Tensor, shown: Tensor | None, sequences: Sequences | None) -> Readings:
    """Return what one direction had at every step by name, in the order of `cells`."""
    values = dict(zip(native.SHOWN[cell_of(stack)], () if shown is None else shown.unbind(), strict=True), h=h_TBH)
    if stack.coupled:
        i_TBH = 1 - values["f"]
        values["i"] = i_TBH if sequences is None else i_TBH.masked_fill(~sequences.valid_TB.unsqueeze(-1), 0)
    known = cells.get_cell(stack.cell)
    return {name: values[name] for name in (*known.gates, *known.states)}


def step_native(run: Any, cell: str, x_BI: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Run one step by `run`, which runs native layers; the weights as in `backends.step_reference`."""
    H = weights[1].shape[1]  # type: ignore[union-attr]
    stack = Stack(cell, x_BI.shape[1], H, 1, weights[2] is not None)
    given = tuple(tensor.unsqueeze(0) for tensor in state)
    flat = [weight for weight in weights if weight is not None]
    _, after = run(stack, x_BI.unsqueeze(0), given, flat)
    return tuple(tensor.squeeze(0) for tensor in after)
