"""Which implementation runs a recurrent layer, and why.

    avx512      the native kernels of `csrc/`, built for AVX-512; avx2 and baseline are the same for other processors:
                rnn, rnn_relu, gru, lstm in float32 on a CPU
    amx         avx512, but in training matrix units multiply float32, as sums of three numbers of bfloat16; only where
                it is asked for, since it is faster where nobody else uses the cores, and else may be slower
    bfloat16    the native kernels with factors of bfloat16 in their products, where the processor multiplies those:
                faster, 3 digits; sums, states, gates and weights stay float32
    amx_bf16x3  the same with factors of two numbers of bfloat16, by matrix units: 5 digits
    torch       PyTorch's own kernels (oneDNN, MKL or ATen on a CPU, cuDNN on a GPU): rnn, rnn_relu, gru, lstm
    reference   the equations of `cells.py`, step by step: every cell, any precision, differentiable twice

`auto`, the default, takes the fastest of float32 that can run the call, and of lower precision where PyTorch's own
switches allow that (`precision.py`). `use` forces one, `explain` names the choice, `invalidate` forgets packed
weights, `empty_cache` gives back what is kept between calls.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from longshort import backends, buffers, calls, cells, graph, native, native_backend, precision
from longshort.cells import LayerWeights, Options, Readings, Sequences, Stack, State
from longshort.errors import UsageError
from longshort.packing import invalidate as invalidate

_TORCH_CAN = frozenset({"packed", "lengths", "proj_size"})
NATIVE = "native"
"""What `use` takes for the best of the native targets."""
BFLOAT16 = "bfloat16"
"""What `use` takes for the best native target whose products are of bfloat16."""
_forced: str | None = None


class Choice(NamedTuple):
    """An implementation and the reason why it runs."""

    name: str
    reason: str
    grad: bool = False
    """Whether gradients are wanted."""
    autocast: bool = False
    """Whether they run in the place of what autocast to bfloat16 would have."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def available() -> tuple[str, ...]:
    """Return the names of the implementations that give the same results: what `use` takes. `auto` prefers the first.

    Beside them it takes `bfloat16` where there is `native.bfloat16`.
    """
    return (*native.targets(), "torch", "reference")


def cells_of(name: str) -> tuple[str, ...]:
    """Return the names of the cells that the implementation `name` can run."""
    if name in (NATIVE, BFLOAT16) or name in native.built_targets():
        return tuple(native.CELLS)
    return tuple(backends.TORCH_OPS) if name == "torch" else tuple(cells.CELLS)


def active() -> str:
    """Return the implementation that is forced for this process, or `auto`."""
    return _forced or "auto"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one implementation for every layer of this process while the context lasts.

    Args:
        name: one of `available()`, `native` for the best of its targets, `bfloat16`, or `auto`.

    Raises:
        UsageError: there is no implementation of that name, or this processor cannot run it.
    """
    global _forced
    names = (*available(), NATIVE, BFLOAT16, "auto")
    if name == BFLOAT16:
        name = native.need_bfloat16()
    elif name in native.supported():
        pass
    elif name in native.built_targets():
        raise UsageError(f"This processor cannot run the kernels {name!r}; it can run {', '.join(available())}.")
    elif name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise UsageError(
            f"There is no kernel called {name!r}; there are {', '.join(names)}.",
            f"Did you mean {close[0]!r}?" if close else "",
        )
    if name == NATIVE:
        if not native.targets():
            raise UsageError(f"There are no native kernels here: {native.reason()}")
        name = _active_target()
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def empty_cache() -> None:
    """Give back to the system what is kept from one call to the next: packed weights, memory, scratch.

    A training loop is faster for what its last step left; who has finished training may have other use for it.
    """
    invalidate()
    buffers.drop()
    if (library := native.library()) is not None:
        library.ls_trim()


def exporting() -> bool:
    """Return whether PyTorch is tracing or exporting to ONNX: plain layers then run PyTorch's own forward."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def transforming() -> bool:
    """Return whether torch.func transforms the call or forward-mode derivatives are taken."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def choose(
    cell: str,
    needs: frozenset[str] = frozenset(),
    *,
    x: Tensor | None = None,
    size: tuple[int, int, int] | None = None,
    grad: bool = False,
    casts: bool = False,
    others: Sequence[Tensor | None] = (),
) -> Choice:
    """Return the implementation that a call runs.

    Args:
        cell: name of the cell.
        needs: what the call has beyond a plain layer: the names of the layer's active options, and of `packed`,
            `lengths`, `resets`, `return_gates` and `proj_size` those that it uses.
        x: input, for its type and device; None where it is not known.
        size: T, B and H, for how exact products have to be; None where they are not known.
        grad: whether gradients are wanted.
        casts: whether the caller hands the call to `run_layers`, which does what autocast asks for.
        others: what the call reads beside `x`: state and weights; none where they are not known.

    Raises:
        UsageError: the forced implementation cannot run the call.
    """
    forced, beside = _forced, _not_dense(others)
    if forced == "reference":
        return Choice("reference", "forced by kernels.use")
    if casts and not beside and (forced is None or forced in native.BFLOAT16) and (best := _stand_in(cell, needs, x)):
        return Choice(forced or best, "autocast asks for bfloat16, which our products can have", grad, True)
    if forced != "torch":
        lacks = _native_lacks(cell, needs, x) or beside
        if not lacks and forced:
            return Choice(forced, "forced by kernels.use", grad)
        if not lacks and size and not torch.compiler.is_compiling() and (allowed := precision.target(*size)):
            reason = f"torch.backends' fp32_precision allows {precision.allowed()} in products of float32"
            return Choice(allowed, reason, grad)
        if not lacks:
            return Choice(_active_target(), "the native kernels run this call", grad)
        if forced:
            raise UsageError(f"The native kernels cannot run this call: {lacks}.", "Use kernel torch or auto.")
    lacking = ", ".join(sorted(needs - _TORCH_CAN))
    if cell in backends.TORCH_OPS and not lacking:
        if forced == "torch":
            return Choice("torch", "forced by kernels.use")
        if transforming():
            return Choice("reference", "torch.func and forward-mode derivatives go through the equations")
        onednn = cell == "lstm" and x is not None and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
        if onednn and grad and torch.compiler.is_compiling():
            return Choice("reference", "PyTorch's compiler cannot differentiate oneDNN's LSTM")
        return Choice("torch", f"PyTorch has a fused kernel for this cell, and as for ours, {lacks}")
    what = f"{lacking} in its kernels" if lacking else f"kernel for the cell {cell!r}"
    if forced == "torch":
        raise UsageError(f"PyTorch has no {what}.", "Use kernel reference, or auto.")
    return Choice("reference", f"PyTorch has no {what}, and as for ours, {lacks}")


def _active_target() -> str:
    if torch.compiler.is_compiling():  # which cannot look into the library
        return next(iter(calls.SUPPORTED))
    name = native.active_target()
    assert name is not None  # asked where there are native kernels alone
    return name


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _native_lacks(cell: str, needs: frozenset[str], x: Tensor | None, casts: bool = False) -> str:
    """Return why the native kernels cannot run a call, as it is or with what it is given cast; empty if they can."""
    if cell not in native.CELLS:
        return f"they have no cell {cell!r}"
    if not needs <= native_backend.CAN:
        return f"they have no {', '.join(sorted(needs - native_backend.CAN))}"
    if not (calls.TARGETS or native.ready()):
        return native.reason()
    if "return_gates" in needs and _graphed():
        return "as a node of a graph they do not give their gates"
    if x is None:
        return ""
    if not (x.dtype is torch.float32 or (casts and x.dtype is torch.bfloat16)) or not x.is_cpu:
        return f"they run float32 on a CPU, not {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    if exporting():
        return "PyTorch is tracing or exporting, and sees no more than its own operations"
    if torch._C._is_any_autocast_enabled() and not casts:
        return "autocast is on"
    if torch.compiler.is_compiling():
        return ""
    if transforming():
        return "torch.func transforms the call or forward-mode derivatives are taken"
    if type(x) not in _PLAIN_TYPES and not torch._C._len_torch_dispatch_stack():
        return f"they run dense tensors, not {type(x).__name__}"
    return "" if x.layout is torch.strided else f"they run dense tensors, not {x.layout}"


def _not_dense(tensors: Sequence[Tensor | None]) -> str:
    """Return why the native kernels cannot read the numbers of these, beside x; empty if they can."""
    if not _graphed():
        for tensor in tensors:
            if tensor is None:
                continue
            wraps = type(tensor) not in _PLAIN_TYPES and is_traceable_wrapper_subclass(tensor)
            if wraps or torch._is_functional_tensor(tensor):
                return "they run dense tensors, not those that stand for others"
    return ""


def _stand_in(cell: str, needs: frozenset[str], x: Tensor | None) -> str | None:
    """Return our target with products of bfloat16 if autocast asks for such and it can run a call in its place.

    A graph cannot know whether there is one where it runs: it has products of float32.
    """
    if x is None or not torch.is_autocast_enabled("cpu"):
        return None
    if torch.get_autocast_dtype("cpu") is not torch.bfloat16 or _native_lacks(cell, needs, x, casts=True):
        return None
    return _active_target() if torch.compiler.is_compiling() else native.bfloat16()


def _graphed() -> bool:
    """Return whether a call becomes a node of a graph, or of whatever looks at PyTorch's operations."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def _run_native(choice: Choice) -> Any:
    """Return what runs a stack of layers by the native kernels: as a node where a graph is made, else at once."""
    graphed = _graphed()
    target = calls.TARGETS[choice.name]
    if graphed and _forced is None:
        # A graph may run when the process has another target, or elsewhere. What it saves has the size of this
        # processor's best, so that compiled code that is kept on disk must not be that of another.
        target = -1 - target
    return partial(graph.run_graph if graphed else native_backend.run_native, target=target, grad=choice.grad)


def explain(layer: Any, x: Any = None, **arguments: Any) -> Choice:
    """Return the implementation that `layer(x)` would run, and why.

    Args:
        layer: one of longshort's layers or cells.
        x: its input; without it the answer is that for one of float32 on a CPU.
        arguments: `lengths`, `return_gates` and `resets`, as in the layer's call.
    """
    choice: Choice = layer.choose(x, **arguments)
    return choice


def run_layers(
    choice: Choice,
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
    """Run a stack of layers by the chosen implementation; arguments as in `backends`, and checked before.

    Returns:
        The outputs, laid as `x` is, and the state after, each tensor (layers * directions, B, H).
    """
    run: Any = backends.run_torch if choice.name == "torch" else backends.run_reference
    if choice.name not in ("torch", "reference"):
        run = _run_native(choice)
    rest: dict[str, Any] = {"batch_first": batch_first, "training": training, "sequences": sequences}
    if choice.autocast:
        rest |= {"dropout": dropout, "readings": readings}
        return _run_autocast(choice, stack, x, state, weights, options=options, **rest)
    # PyTorch's kernel would draw masks of its own between layers: which kernel runs would decide what is dropped, and
    # cuDNN's numbers could not be put back when training is resumed.
    drops = choice.name == "torch" and dropout > 0 and stack.num_layers > 1 and (training or x.is_cuda)
    if not (stack.residual or drops):
        found: tuple[Tensor, State] = run(
            stack, x, state, weights, dropout=dropout, options=options, readings=readings, **rest
        )
        return found
    D, each = 1 + stack.bidirectional, len(weights) // stack.num_layers

    def run_layer(layer: int, x: Tensor) -> tuple[Tensor, State]:
        one = replace(stack, input_size=x.shape[-1], num_layers=1, residual=False)
        at = slice(layer * D, (layer + 1) * D)
        before = state and tuple(tensor[at] for tensor in state)
        own = weights[layer * each : (layer + 1) * each]
        found: tuple[Tensor, State] = run(one, x, before, own, options=options[at], readings=readings, **rest)
        return found

    def drop(x: Tensor) -> Tensor:
        return backends.drop_between(x, dropout, batch_first, sequences) if dropout and training else x

    return layer_by_layer(run_layer, drop, stack.num_layers, x, stack.residual)


def _run_autocast(
    choice: Choice,
    stack: Stack,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    *,
    options: Sequence[Options],
    **rest: Any,
) -> tuple[Tensor, State]:
    """Run what autocast to bfloat16 asks for: float32 inside, and outside the types that PyTorch's layers give."""
    given = x.dtype if state is None else state[-1].dtype
    # A GRU's state keeps its type there, and so does the c of an LSTM that projects h.
    of_h = given if stack.cell == "gru" else torch.bfloat16
    kinds = (of_h, given if stack.proj_size else torch.bfloat16)
    y, after = run_layers(  # nothing that it does is among what autocast changes
        choice._replace(autocast=False),
        stack,
        x.float(),
        state and tuple(tensor.float() for tensor in state),
        [weight.float() for weight in weights],
        options=[each.in_float32() for each in options],
        **rest,
    )
    return y.to(of_h), tuple(tensor.to(kind) for tensor, kind in zip(after, kinds, strict=False))


def layer_by_layer(
    run_layer: Callable[[int, Tensor], tuple[Tensor, State]],
    drop: Callable[[Tensor], Tensor],
    num_layers: int,
    x: Tensor,
    residual: bool,
) -> tuple[Tensor, State]:
    """Run layers, one above the other.

    Args:
        run_layer: gives a layer's output and the state after, from its number and what it reads.
        drop: dropout between layers.
        num_layers: their number.
        x: what the first one reads.
        residual: whether each but the first adds what it reads to what it puts out.

    Returns:
        What the last one puts out, and the states of all.
    """
    after = []
    for layer in range(num_layers):
        y, last = run_layer(layer, x)
        x = x + y if residual and layer else y
        x = drop(x) if layer + 1 < num_layers else x
        after.append(last)
    return x, tuple(torch.cat(tensors) for tensors in zip(*after, strict=True))


def native_target(x: Tensor) -> int | None:
    """Return the number of the target that may run at once, on a tensor like `x`; None where none may."""
    return quick_target() if calls.SUPPORTED and x.dtype is torch.float32 and x.is_cpu else None


def quick_target() -> int | None:
    """Return the number of the target that a plain call may run at once; None if it may not.

    What `choose` finds out about the process, and nothing about the call: `quick.Quick` looks at that.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_tracing()
        or transforming()
    ):
        return None
    return -1 if _forced is None else calls.TARGETS.get(_forced)


def run_step(choice: Choice, cell: str, x_BI: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Run one step of a cell by the chosen implementation.

    Args:
        choice: the implementation.
        cell: name of the cell.
        x_BI: input.
        state: before the step, each tensor (B, H).
        weights: weight_ih, weight_hh, bias_ih and bias_hh; the biases may be None.
    """
    if choice.name not in ("torch", "reference"):
        return native_backend.step_native(_run_native(choice), cell, x_BI, state, weights)
    run = backends.step_torch if choice.name == "torch" else backends.step_reference
    return run(cell, x_BI, state, weights)


def run(
    cell: str,
    x_TBI: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    dropout: float = 0.0,
    training: bool = False,
    options: Sequence[Options] = (),
) -> tuple[Tensor, State]:
    """Run a stack of layers in one direction over a sequence of vectors.

    Args:
        cell: name of the cell.
        x_TBI: input.
        state: each tensor (layers, B, H).
        weights: of each layer, with biases.
        dropout: between layers, in training.
        training: whether dropout acts.
        options: of each layer, if it has any: layer normalisation.

    Returns:
        Outputs (T, B, H) and the state after the last step.

    Raises:
        UsageError: state, weights or the options' vectors do not fit.
    """
    stack = Stack(cell, x_TBI.shape[-1], weights[0][1].shape[-1], len(weights))
    flat = [tensor for layer_weights in weights for tensor in layer_weights]
    require_fit(stack, x_TBI.shape[1], state, flat, options)
    inputs = (x_TBI, *state, *flat, *(tensor for each in options for tensor in each.vectors.values()))
    grad = calls.differentiates(*inputs)
    needs = frozenset({"layer_norm"} if options else ())
    size = (*x_TBI.shape[:2], stack.hidden_size)
    choice = choose(cell, needs, x=x_TBI, size=size, grad=grad)
    return run_layers(choice, stack, x_TBI, state, flat, dropout=dropout, training=training, options=options)


def require_fit(stack: Stack, rows: int, state: State, weights: Sequence[Tensor], options: Sequence[Options]) -> None:
    """Refuse what does not fit: the native kernels would read beyond its end, PyTorch's equations repeat it.

    Args:
        stack: what runs.
        rows: B.
        state: as of `run`.
        weights: of all layers, in their order.
        options: as of `run`.

    Raises:
        UsageError: one has another shape, type or device.
    """
    like, casts = weights[0], torch._C._is_any_autocast_enabled()

    def require(name: str, tensor: Tensor, shape: tuple[int, ...], casts: bool = False) -> None:
        typed = casts or tensor.dtype is like.dtype
        if tensor.shape != shape or tensor.device != like.device or not typed:
            raise UsageError(
                f"{name} must be {shape}, of {like.dtype} on {like.device}.",
                f"It is {tuple(tensor.shape)}, of {tensor.dtype} on {tensor.device}.",
            )

    if len(state) != len(stack.state_sizes):
        raise UsageError(f"The state of {stack.cell} is {len(stack.state_sizes)} tensors, not {len(state)}.")
    for number, (tensor, width) in enumerate(zip(state, stack.state_sizes, strict=True)):
        require(f"Tensor {number} of the state", tensor, (stack.num_layers, rows, width), casts)
    for number, (tensor, shape) in enumerate(zip(weights, stack.weight_shapes, strict=True)):
        require(f"Weight {number}", tensor, shape)
    for layer, each in enumerate(options):
        for name, vector in each.vectors.items():
            size = stack.gate_size if name in ("gamma_ih", "gamma_hh") else stack.hidden_size
            require(f"{name} of layer {layer}", vector, (size,))
