"""The native kernels as PyTorch operations: nothing stale, nothing mixed up, registered as PyTorch asks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longshort
from longshort import graph, kernels, native, packing
from longshort.buffers import Saved
from longshort.cells import Stack
from longshort.options import LayerOptions
from recurrent import CELL_PAIRS, PAIRS, same

pytestmark = pytest.mark.skipif(not native.targets(), reason="there are no native kernels here")


def changes() -> dict[str, Callable[[nn.Module], Any]]:
    """Ways in which weights change between two calls."""

    def step(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(layer.parameters(), lr=0.1).step()

    def data(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data.add_(0.1)

    def exchange(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data = parameter.data + 0.1

    def numpy(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.detach().numpy()[...] += 0.1

    def single(layer: nn.Module) -> None:
        layer.get_parameter("weight_hh_l0").data[1, 1] += 1
        kernels.invalidate()

    def load(layer: nn.Module) -> None:
        layer.load_state_dict({name: value + 0.1 for name, value in layer.state_dict().items()})

    def replace(layer: nn.Module) -> None:
        layer.weight_hh_l0 = nn.Parameter(layer.get_parameter("weight_hh_l0").detach() + 0.1)

    return {each.__name__: each for each in (step, data, exchange, numpy, single, load, replace)}


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_kept_weights_are_never_stale(ours: Any, theirs: Any, quiet: Any, change: str) -> None:
    layer, x = ours(3, 20), torch.randn(4, 2, 3)
    with quiet():
        before = layer(x)[0]
    changes()[change](layer)
    peer = theirs(3, 20)
    peer.load_state_dict(layer.state_dict())
    with quiet():
        after = layer(x)
        assert not torch.equal(before, after[0])
        same(after, peer(x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_steps_of_fused_optimizers_are_noticed(optimizer: Any) -> None:
    layer: Any = longshort.GRU(64, 16, bias=False)
    peer: Any = nn.GRU(64, 16, bias=False)
    peer.load_state_dict(layer.state_dict())
    steps = []
    for each in (layer, peer):
        each.weight_hh_l0.requires_grad_(False)  # only one column of weight_ih changes in a step
        steps.append(optimizer([each.weight_ih_l0], lr=0.5, fused=True))
    for symbol in range(64):
        x = torch.eye(64)[[symbol]].expand(3, 2, 64)
        found = []
        for each, step in zip((layer, peer), steps, strict=True):
            step.zero_grad()
            each(x)[0].sum().backward()
            step.step()
            with torch.no_grad():
                found.append(each(x)[0])
        same(found[0], found[1])


@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_ih_l0"])
def test_weights_that_are_computed_anew_are_noticed(name: str) -> None:
    class Changed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 1

    layer: Any = longshort.LSTM(24, 40)
    peer: Any = nn.LSTM(24, 40)
    x = torch.randn(5, 3, 24)
    peer.load_state_dict(layer.state_dict())
    for each in (layer, peer):
        nn.utils.parametrize.register_parametrization(each, name, Changed())
    with torch.no_grad():
        for row in range(160):
            for each in (layer, peer):
                each.parametrizations[name].original[row] += 1
            same(layer(x)[0], peer(x)[0])


def test_packed_weights_go_when_their_layer_goes() -> None:
    packing.invalidate()
    layer = longshort.LSTM(3, 4)
    with torch.no_grad():
        layer(torch.randn(2, 1, 3))
        assert len(packing._packed) == 1
        del layer
    assert not packing._packed


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_many_passes_at_once_keep_their_own_memory(ours: Any, theirs: Any) -> None:
    """Forward passes whose backward passes come later, in another order, and twice."""
    layer, peer = ours(5, 24), theirs(5, 24)
    peer.load_state_dict(layer.state_dict())
    inputs = [torch.randn(6, 3, 5) for _ in range(4)]
    found = [layer(x)[0].square().sum() for x in inputs]
    expected = [peer(x)[0].square().sum() for x in inputs]
    for i in (2, 0, 3, 0, 1):
        gradients = torch.autograd.grad(found[i], list(layer.parameters()), retain_graph=True)
        same(list(gradients), list(torch.autograd.grad(expected[i], list(peer.parameters()), retain_graph=True)))


@pytest.mark.parametrize("shape", [{}, {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_an_output_may_be_changed_in_place(ours: Any, theirs: Any, shape: dict[str, Any]) -> None:
    layer, peer = ours(4, 4, **shape), theirs(4, 4, **shape)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(6, 3, 4)
    found = []
    for each, changes in ((layer, True), (peer, False)):  # some of PyTorch's refuse it
        y, _ = each(x)
        if changes:
            y += torch.cat([x] * (1 + layer.bidirectional), -1)
            y.mul_(3)
        else:
            y = (y + torch.cat([x] * (1 + layer.bidirectional), -1)) * 3
        found.append(torch.autograd.grad(y.square().sum(), list(each.parameters())))
    same(list(found[0]), list(found[1]))


def test_an_input_that_was_changed_is_noticed() -> None:
    layer, x = longshort.LSTM(3, 4), torch.randn(2, 1, 3)
    y, _ = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [{}, {"num_layers": 2}])
def test_a_training_loop_holds_what_one_forward_pass_saves(monkeypatch: pytest.MonkeyPatch, shape: Any) -> None:
    """Also while the last step's loss lives, as it does in a loop until the next step has one."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    make = Saved.__init__

    def note(saved: Saved, floats: int) -> None:
        make(saved, floats)
        alive.add(saved)

    monkeypatch.setattr(Saved, "__init__", note)
    layer, x = longshort.LSTM(3, 4, **shape), torch.randn(5, 2, 3)
    losses: list[Any] = []
    for step in range(4):
        losses.append(layer(x)[0].sum())
        assert len(alive) == layer.num_layers
        if step == 2:
            losses[-1].backward(retain_graph=True)
            assert len(alive) == layer.num_layers
        losses[-1].backward()
        assert not alive
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses[-1].backward()


def test_weights_are_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[Any] = []
    monkeypatch.setattr(weakref, "finalize", lambda owner, *call: watched.append(owner))
    layer, x = longshort.GRU(3, 4), torch.randn(2, 1, 3)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
            kernels.invalidate()
    assert [id(owner) for owner in watched] == [id(layer.weight_hh_l0)]
    packing._forget(id(layer.weight_hh_l0))  # nobody else will


def test_numbers_that_are_to_be_read_as_negative() -> None:
    """Views such as the imaginary part of a conjugate lie as they were, with a sign to be changed."""
    x = torch.complex(torch.zeros(6, 1, 1), torch.randn(6, 1, 1)).conj().imag
    assert x.is_neg()
    for ours, theirs in PAIRS:
        layer, peer = ours(1, 1), theirs(1, 1)
        layer.load_state_dict(peer.state_dict())
        before = x[:1] if theirs is not nn.LSTM else (x[:1], x[1:2])
        for each in (torch.enable_grad(), torch.no_grad()):
            with each:
                same(layer(x, before), peer(x, before))
        gradients = []
        for module in (layer, peer):
            y = module(x)[0]
            loss = torch.complex(y, y).conj().imag.sum()
            gradients.append(list(torch.autograd.grad(loss, list(module.parameters()))))
        same(gradients[0], gradients[1])
    for ours, theirs in CELL_PAIRS:
        cell, peer = ours(1, 4), theirs(1, 4)
        cell.load_state_dict(peer.state_dict())
        same(cell(x[0]), peer(x[0]))


def test_subnormal_numbers_count_again_after_a_call() -> None:
    layer = longshort.GRU(3, 4)
    layer(torch.full((3, 2, 3), 1e-41))[0].sum().backward()
    tiny = torch.tensor([1e-41])
    assert (tiny * 1.0).item() > 0
    assert (tiny + 0.0).item() > 0


@pytest.mark.parametrize("kernel", native.targets())
@pytest.mark.parametrize(("T", "B", "I", "H"), [(3, 4, 3, 18), (9, 30, 5, 260)])
def test_nan_and_infinity_pass(kernel: str, T: int, B: int, I: int, H: int) -> None:
    for ours, theirs in PAIRS:
        layer, peer = ours(I, H), theirs(I, H)
        peer.load_state_dict(layer.state_dict())
        x = torch.randn(T, B, I)
        x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = torch.nan, torch.inf, -torch.inf
        with kernels.use(kernel):
            found = layer(x)[0]
        for row in range(4):
            a, b = found[:, row], peer(x)[0][:, row]
            assert torch.equal(a.isnan(), b.isnan())
            torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=0, atol=1e-5)


def arguments_of(
    cell: str, D: int, *, lengths: bool, masks: bool, grad: bool, vectors: bool = False
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    G, H, I, T, B = native.GATES[cell], 5, 3, 4, 2
    coupled, lstm = cell == native.COUPLED, native.STATES[cell] == 2
    options = LayerOptions(layer_norm=vectors, peephole=vectors and lstm, coupled_gates=coupled)
    sizes = options.parameter_sizes(Stack("lstm" if lstm else cell, I, H, coupled=coupled))
    of_vectors = [(size,) for size in sizes.values()]
    projected = 2 if vectors and lstm else 0
    P, projection = (projected, [(projected, H)]) if projected else (H, [])
    own = ((G * H, I), (G * H, P), (G * H,), (G * H,), *projection, *of_vectors)
    shapes = [shape for _ in range(D) for shape in own]
    weights = [torch.randn(shape).mul(0.3).requires_grad_(grad) for shape in shapes]
    x, h_0 = torch.randn(T, B, I).requires_grad_(grad), torch.randn(D, B, P).requires_grad_(grad)
    c_0 = torch.randn(D, B, H).requires_grad_(grad) if lstm else None
    counts, order = (torch.tensor([2, 2, 1, 0]), torch.tensor([1, 0])) if lengths else (None, None)
    h_masks = [torch.rand(B, P) for _ in range(D)] if masks else None
    zoneout = [torch.rand(T, B, P) for _ in range(D)] if masks else None
    resets = [torch.rand(T, B) < 0.3 for _ in range(D)] if masks else None
    rest = (cell, H, D, True, False, counts, order, B if lengths else 0, False, h_masks, zoneout, 0.0, resets, -1)
    return (x, h_0, c_0, weights, *rest, list(sizes) or None, projected, grad)


# Of the four choices any three in every combination, by half as many calls as all four would take.
@pytest.mark.parametrize(("lengths", "masks", "vectors"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", native.COUPLED])
def test_opcheck(cell: str, lengths: bool, masks: bool, vectors: bool) -> None:
    D = 1 + (lengths ^ masks ^ vectors)
    layer, backward = torch.ops.longshort.layer, torch.ops.longshort.layer_backward
    for grad in (False, True):
        settings = {"lengths": lengths, "masks": masks, "vectors": vectors}
        torch.library.opcheck(layer, arguments_of(cell, D, **settings, grad=grad))
    arguments = arguments_of(cell, D, **settings, grad=True)
    with torch.no_grad():
        y, h_n, c_n, saved = layer(*arguments)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments[: graph._NUM_LAYER]]
    detached[3] = [weight.detach() for weight in arguments[3]]
    gradients = (
        torch.randn_like(y),
        torch.randn_like(h_n),
        torch.randn_like(c_n) if native.STATES[cell] == 2 else None,
    )
    wanted = [True] * (1 + native.STATES[cell] + len(arguments[3]))
    torch.library.opcheck(
        backward,
        (*detached, y, saved, *gradients, wanted),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_graph_refuses_gradients_of_gradients() -> None:
    x, *rest = arguments_of("gru", 1, lengths=False, masks=False, grad=True)
    y = torch.ops.longshort.layer(x, *rest)[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        dx.sum().backward()


def test_compiled_and_eager_give_the_same_bits() -> None:
    torch.compiler.reset()
    layer = longshort.LSTM(3, 5, 2, bidirectional=True)
    x = torch.randn(4, 2, 3, requires_grad=True)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(layer_or_compiled: Any) -> list[Tensor]:
        output, state = layer_or_compiled(x)
        return [output, *torch.autograd.grad(output.square().sum() + state[1].sum(), [x, *layer.parameters()])]

    assert all(torch.equal(a, b) for a, b in zip(run(compiled), run(layer), strict=True))


def test_a_child_process_runs_layers_too() -> None:
    """After a fork PyTorch's pool is gone, and so is ours: calls run in one thread, and end."""
    program = """
import os, torch, longshort
torch.set_num_threads(2)
layer, x = longshort.LSTM(64, 256), torch.randn(20, 16, 64)
expected = layer(x)[0].detach().numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if layer(x)[0].detach().numpy().tobytes() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_the_operations_begin_with_the_arguments_that_are_read() -> None:
    fields = list(graph._Layer._fields)
    for operation in (torch.ops.longshort.layer, torch.ops.longshort.layer_backward):
        names = [argument.name for argument in operation.default._schema.arguments]
        assert names[: len(fields)] == fields
