"""Layers under `torch.func`, forward-mode and double derivatives, tracing, scripting, compiling and exporting."""

from __future__ import annotations

import io
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.testing._internal.two_tensor import TwoTensor

import longshort
from longshort import kernels, native
from longshort.errors import UsageError
from recurrent import CELL_PAIRS, PAIRS, flat, same

trace: Any = torch.jit.trace
script: Any = torch.jit.script
export_onnx: Any = torch.onnx.export
two_tensor: Any = TwoTensor
make_dual: Any = forward_ad.make_dual
unpack_dual: Any = forward_ad.unpack_dual


def layer_and_peer(ours: Any, theirs: Any, **arguments: Any) -> tuple[Any, Any]:
    layer, peer = ours(3, 4, 2, bidirectional=True, **arguments), theirs(3, 4, 2, bidirectional=True, **arguments)
    layer.load_state_dict(peer.state_dict())
    return layer, peer


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_vmap_is_a_loop(ours: Any, theirs: Any) -> None:
    layer, peer = layer_and_peer(ours, theirs)
    x = torch.randn(6, 5, 2, 3)
    same(vmap(lambda x: layer(x)[0])(x), torch.stack([peer(each)[0] for each in x]))
    lengths = [3, 0]
    same(vmap(lambda x: layer(x, lengths=lengths)[0])(x), torch.stack([layer(each, lengths=lengths)[0] for each in x]))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_of_each_sample(ours: Any, theirs: Any) -> None:
    layer, peer = layer_and_peer(ours, theirs, dtype=torch.float64)
    x, names = torch.randn(6, 5, 1, 3, dtype=torch.float64), [name for name, _ in layer.named_parameters()]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()  # type: ignore[no-any-return]

    found = vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    for index, each in enumerate(x):
        expected = torch.autograd.grad(peer(each)[0].square().sum(), list(peer.parameters()))
        same([found[name][index] for name in names], expected)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_an_ensemble_of_models(ours: Any, theirs: Any) -> None:
    layers, x = [ours(3, 4) for _ in range(3)], torch.randn(5, 2, 3)
    stacked, _ = stack_module_state(layers)
    base = ours(3, 4).to("meta")
    found = vmap(lambda parameters: functional_call(base, parameters, (x,))[0])(stacked)
    same(found, torch.stack([layer(x)[0] for layer in layers]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, in its forward-mode formulas
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_forward_mode_derivatives_are_those_of_backward_mode(ours: Any, theirs: Any) -> None:
    layer, _ = layer_and_peer(ours, theirs, dtype=torch.float64)
    x, direction = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    expected = (torch.func.jacrev(lambda x: layer(x)[0])(x) * direction).sum((-3, -2, -1))
    same(jvp(lambda x: layer(x)[0], (x,), (direction,))[1], expected)
    with forward_ad.dual_level():
        assert kernels.explain(layer, x).name == "reference"
        output = layer(make_dual(x, direction))[0]
        same(unpack_dual(output).tangent, expected)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_double_backward(ours: Any, theirs: Any, kernel: str) -> None:
    layer, peer = layer_and_peer(ours, theirs)
    x = torch.randn(5, 2, 3, requires_grad=True)
    found = []
    for each, forced in ((layer, kernel), (peer, "auto")):
        with kernels.use(forced):
            first = torch.autograd.grad(each(x)[0].square().sum(), [x, *each.parameters()], create_graph=True)
            second = sum(part.square().sum() for part in first)
            found.append(torch.autograd.grad(second, [x, *each.parameters()]))  # type: ignore[arg-type]
    same(found[0], found[1], 1e-4)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_double_backward_through_calls_that_feed_each_other(
    ours: Any, theirs: Any, kernel: str, shape: dict[str, Any]
) -> None:
    """A state that is carried comes from the same weights, and gradients of gradients go through it once."""
    layer, peer = ours(4, 4, **shape), theirs(4, 4, **shape)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(3, 2, 4, requires_grad=True)
    found = []
    for each, forced in ((layer, kernel), (peer, "auto")):
        with kernels.use(forced):
            total, state = torch.zeros(()), None
            for _ in range(3):
                y, state = each(x, state)
                total = total + y.square().sum()
            inputs = [x, *each.parameters()]
            first = torch.autograd.grad(total, inputs, create_graph=True)
            second = torch.stack([part.square().sum() for part in first]).sum()
            found.append([*first, *torch.autograd.grad(second, inputs)])
    same(found[0], found[1], 1e-4)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_double_backward_through_steps_of_a_cell(ours: Any, theirs: Any, kernel: str) -> None:
    cell, peer = ours(3, 4), theirs(3, 4)
    cell.load_state_dict(peer.state_dict())
    x = torch.randn(4, 2, 3, requires_grad=True)
    found = []
    for each, forced in ((cell, kernel), (peer, "auto")):
        with kernels.use(forced):
            state = None
            for step in x:
                state = each(step, state)
            inputs = [x, *each.parameters()]
            total = flat(state)[0].square().sum()
            first = torch.autograd.grad(total, inputs, create_graph=True)
            second = torch.stack([part.square().sum() for part in first]).sum()
            found.append([*first, *torch.autograd.grad(second, inputs)])
    same(found[0], found[1], 1e-4)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop"
)  # PyTorch's
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_vmap_and_tangents_of_a_backward_pass(ours: Any, theirs: Any, shape: dict[str, Any]) -> None:
    layer, peer, many = ours(3, 4, **shape), theirs(3, 4, **shape), torch.randn(3, 5, 2, 4 * (1 + len(shape) // 2))
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(5, 2, 3, requires_grad=True)
    found = []
    for each in (layer, peer):
        y = each(x)[0]
        found.append(vmap(lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True)[0])(many))
    same(found[0], found[1])
    y = layer(x)[0]
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(y, x, make_dual(many[0], many[1]))
        same(unpack_dual(dual), (found[0][0], found[0][1]))  # a gradient is linear in that of the output


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_in_inference_mode_are_none(ours: Any, theirs: Any) -> None:
    x = torch.randn(5, 2, 3)
    for shape in ({}, {"num_layers": 2, "bidirectional": True}):
        layer = ours(3, 4, **shape)
        with torch.inference_mode(), torch.enable_grad():
            found = flat([layer(x), layer(x, lengths=[5, 2]), layer(x, return_gates=True)[0]])
        assert not any(tensor.requires_grad for tensor in found)
    for cell in (longshort.RNNCell(3, 4), longshort.GRUCell(3, 4), longshort.LSTMCell(3, 4)):
        with torch.inference_mode(), torch.enable_grad():
            assert not any(tensor.requires_grad for tensor in flat(cell(x[0])))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_double_backward_where_outputs_do_not_depend_on_what_is_trained() -> None:
    layer, peer = longshort.LSTM(3, 4, proj_size=2), nn.LSTM(3, 4, proj_size=2)
    layer.load_state_dict(peer.state_dict())
    found = []
    for each in (layer, peer):
        for name, weight in each.named_parameters():
            weight.requires_grad_(name == "weight_hr_l0")
        y, (_, c_n) = each(torch.ones(1, 2, 3))
        found.append(torch.autograd.grad(y.square().sum() + c_n.sum(), [*each.parameters()][-1:], create_graph=True))
    same(found[0], found[1])


@pytest.mark.parametrize("shape", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_is_exchanged_between_forward_and_backward_pass_is_noticed(
    ours: Any, theirs: Any, shape: dict[str, Any]
) -> None:
    """Memory of another size or type lay under the addresses that the kernels were given."""

    def half(layer: Any, x: Tensor) -> None:
        layer.half()

    def double(layer: Any, x: Tensor) -> None:
        layer.double()

    def smaller(layer: Any, x: Tensor) -> None:
        layer.bias_ih_l0.data = torch.zeros(1)

    def of_input(layer: Any, x: Tensor) -> None:
        x.data = x.data.half()

    for change in (half, double, smaller, of_input):
        for arguments in ({}, {"return_gates": True}):
            layer, x = ours(16, 16, **shape), torch.randn(5, 3, 16, requires_grad=True)
            y, *_ = layer(x, **arguments)
            change(layer, x)
            with pytest.raises(RuntimeError, match="must stay as they are until its backward pass"):
                y.sum().backward()
    layer, peer, x = ours(16, 16, **shape), theirs(16, 16, **shape), torch.randn(5, 3, 16)
    peer.load_state_dict(layer.state_dict())
    y = layer(x)[0]
    for weight in layer.parameters():
        weight.data = weight.data.mT.contiguous().mT if weight.dim() == 2 else weight.data
    found = torch.autograd.grad(y.sum(), list(layer.parameters()))
    same(list(found), list(torch.autograd.grad(peer(x)[0].sum(), list(peer.parameters()))))


@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_cells_under_transforms(ours: Any, theirs: Any) -> None:
    cell, x = ours(3, 4), torch.randn(6, 2, 3)
    first = vmap(lambda x: cell(x) if theirs is not nn.LSTMCell else cell(x)[0])(x)
    same(first, torch.stack([cell(each) if theirs is not nn.LSTMCell else cell(each)[0] for each in x]))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_tensors_that_have_left_a_transform(ours: Any, theirs: Any, layers: int) -> None:
    layer, peer = ours(3, 4, layers), theirs(3, 4, layers)
    layer.load_state_dict(peer.state_dict())
    left: list[Tensor] = []

    def keep(z: Tensor) -> Tensor:
        left.append(z * 2)
        return z.sum()

    grad(keep)(torch.randn(5, 2, 3))
    grad(keep)(torch.randn(layers, 2, 4))
    x, h = left
    hx = (h, h) if theirs is nn.LSTM else h
    with torch.no_grad():
        same(layer(x, hx)[0], peer(x, hx)[0])
    found = [torch.autograd.grad(each(x, hx)[0].square().sum(), list(each.parameters())) for each in (layer, peer)]
    same(found[0], found[1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_tensors_that_stand_for_others(ours: Any, theirs: Any, bidirectional: bool) -> None:
    layer, peer = (each(3, 4, bidirectional=bidirectional) for each in (ours, theirs))
    layer.load_state_dict(peer.state_dict())
    left: list[Tensor] = []
    h = torch.randn(1 + bidirectional, 2, 4)

    def keep(z: Tensor) -> Tensor:
        left.append(z * 1)
        return z

    torch.func.functionalize(keep)(h)
    x, functional = torch.randn(5, 2, 3), left[0]
    for state in (functional, two_tensor(h, h.clone())):
        hx, wanted = ((each, each) if theirs is nn.LSTM else each for each in (state, h))
        output = layer(x, hx)[0]
        dense = output.a if isinstance(output, TwoTensor) else torch._from_functional_tensor(output)
        same(dense, peer(x, wanted)[0])


@pytest.mark.parametrize("shape", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_of_many_outputs_at_once(ours: Any, theirs: Any, shape: dict[str, Any]) -> None:
    layer, peer, x = ours(3, 4, **shape), theirs(3, 4, **shape), torch.randn(5, 2, 3)
    layer.load_state_dict(peer.state_dict())
    jacobian: Any = torch.autograd.functional.jacobian
    same(*(jacobian(lambda x, each=each: each(x)[0].sum(-1), x, vectorize=True) for each in (layer, peer)))


def test_many_gradients_of_a_loss_at_once() -> None:
    model = longshort.LanguageModel(longshort.ModelConfig(vocab_size=9, hidden=16))
    ids, many = torch.randint(9, (6, 2)), torch.tensor([1.0, -0.5, 3.0])
    loss, _ = model.loss(ids, ids.roll(-1, 0), None, 12)
    found = torch.autograd.grad(loss, list(model.parameters()), many, is_grads_batched=True, retain_graph=True)
    one = torch.autograd.grad(loss, list(model.parameters()))
    same(found, [torch.stack([factor * gradient for factor in many]) for gradient in one])


@pytest.mark.parametrize(("ours", "theirs"), [*PAIRS, *CELL_PAIRS])
def test_a_layer_that_has_run_is_cast_by_exchange(ours: Any, theirs: Any) -> None:
    x = torch.randn(2, 3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = ours(3, 4)
        with torch.no_grad():
            layer(x)
        layer.double()
        assert layer(x.double())[0].dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_tracing_and_scripting_get_torchs_own_layer(ours: Any, theirs: Any) -> None:
    layer, peer = layer_and_peer(ours, theirs)
    x, longer = torch.randn(5, 2, 3), torch.randn(9, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that TorchScript is deprecated
        traced = trace(layer, (x,))
        operation = {"RNN": "aten::rnn_tanh", "GRU": "aten::gru", "LSTM": "aten::lstm"}[theirs.__name__]
        assert sum(node.kind() == operation for node in traced.graph.nodes()) == 1
        same(traced(longer), peer(longer))
        model = nn.Sequential(layer)
        scripted = script(model)
        same(scripted(longer), peer(longer))
        with pytest.raises(UsageError, match="has no layer_norm"):
            script(ours(3, 4, layer_norm=True))
        rich = ours(3, 4, layer_norm=True)
        same(trace(rich, (x,))(x), rich(x))
        slow = ours(3, 4, zoneout=0.1).eval()
        same(trace(slow, (x,))(x + 1), slow(x + 1))


@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_tracing_and_scripting_of_cells(ours: Any, theirs: Any) -> None:
    cell, x = ours(3, 4), torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(trace(cell, (x,))(x), cell(x))
        same(script(cell)(x), cell(x))


class Held(nn.Module):
    """A model whose graph `torch.fx` draws."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y * 2


class HeldWithLengths(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y, _, gates = self.layer(x, lengths=lengths, return_gates=True)
        return y * 2, gates[0]["h"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_symbolic_trace_has_a_node_for_a_layer(ours: Any, theirs: Any) -> None:
    x = torch.randn(5, 3, 3)
    model = Held(ours(3, 4))
    drawn, peer = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(Held(theirs(3, 4)))
    assert [(n.op, str(n.target)) for n in drawn.graph.nodes] == [(n.op, str(n.target)) for n in peer.graph.nodes]
    same(drawn(x), model(x))
    rich, lengths = HeldWithLengths(ours(3, 4, layer_norm=True)), torch.tensor([5, 0, 2])
    drawn = torch.fx.symbolic_trace(rich)
    assert "call_module" in [node.op for node in drawn.graph.nodes]
    same(drawn(x, lengths), rich(x, lengths))
    with pytest.raises(torch.fx.proxy.TraceError):  # as PyTorch's, which is no model either
        torch.fx.symbolic_trace(ours(3, 4))


@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_a_symbolic_trace_has_a_node_for_a_cell(ours: Any, theirs: Any) -> None:
    model, x = nn.Sequential(ours(3, 4)), torch.randn(2, 3)
    drawn = torch.fx.symbolic_trace(model)
    assert [node.op for node in drawn.graph.nodes] == ["placeholder", "call_module", "output"]
    same(drawn(x), model(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="trace that model"):
        torch.fx.symbolic_trace(ours(3, 4))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS[1:])
def test_onnx_gets_one_node_a_layer(ours: Any, theirs: Any, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    layer = ours(3, 4, 2).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            graph = export_onnx(layer, (torch.randn(5, 2, 3),), dynamo=True, verbose=False).model_proto.graph
        else:
            file = io.BytesIO()
            export_onnx(layer, (torch.randn(5, 2, 3),), file, dynamo=False)
            graph = onnx.load_from_string(file.getvalue()).graph
    assert [node.op_type for node in graph.node].count(theirs.__name__) == 2


def test_while_exporting_torchs_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = longshort.GRU(3, 4), torch.randn(5, 2, 3)
    monkeypatch.setattr(torch._C, "_is_tracing", lambda: True)
    monkeypatch.setattr(nn.GRU, "forward", lambda self, input, hx=None: "PyTorch's own")
    assert layer(x) == "PyTorch's own"
    rich = longshort.GRU(3, 4, layer_norm=True)
    assert isinstance(rich(x)[0], Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_compiling_and_exporting_whole(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    layer, peer = layer_and_peer(ours, theirs, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
    same(compiled(x), peer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(compiled(x), peer(x))
    rich = ours(3, 4, layer_norm=True, dtype=dtype)
    compiled = torch.compile(rich, fullgraph=True, backend="eager")
    same(compiled(x), rich(x))
    for arguments in ({"lengths": [5, 2]}, {"lengths": torch.tensor([0, 5])}, {"resets": torch.eye(5, 2).bool()}):
        compiled = torch.compile(partial(layer, **arguments), fullgraph=True, backend="eager")
        same(compiled(x), layer(x, **arguments))
    exported: Any = torch.export.export(layer, (x,)).module()
    same(exported(x), peer(x))


def same_under_autocast(module: Any, x: Tensor) -> Any:
    """Check that what is compiled gives types and numbers of what is not, and return it."""
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = flat(compiled(x)), flat(module(x))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    same(found, expected, 2e-2)
    return compiled


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_is_compiled_has_the_types_and_gradients_of_what_is_not(ours: Any, theirs: Any) -> None:
    layer, _ = layer_and_peer(ours, theirs)
    x = torch.randn(5, 2, 3)
    compiled = same_under_autocast(layer, x)
    layer.bfloat16()
    gradients = []
    for run in (compiled, layer):
        sums = [tensor.float().square().sum() for tensor in flat(run(x.bfloat16()))]
        gradients.append(torch.autograd.grad(sum(sums[1:], sums[0]), list(layer.parameters())))
    same(gradients[0], gradients[1], 5e-2)


@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_compiled_cells_under_autocast(ours: Any, theirs: Any) -> None:
    same_under_autocast(ours(3, 4), torch.randn(2, 3))


@pytest.mark.skipif(not native.targets(), reason="there are no native kernels")
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # PyTorch's own: of TorchScript, of its trees
def test_a_package_of_aotinductor_holds_layers(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = longshort.GRU(3, 4, 2, bidirectional=True)
            self.rich = longshort.LSTM(8, 4, layer_norm=True, peephole=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rich(self.plain(x)[0])[0]
            return y * 2

    model, x = Both().eval(), torch.randn(5, 3, 3)
    steps, rows = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: steps, 1: rows}})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for shape in ((5, 3, 3), (9, 2, 3)):
            y = torch.randn(shape)
            assert torch.equal(loaded(y), model(y))


@pytest.mark.skipif(not native.targets(), reason="there are no native kernels")
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_compiled_layer_runs_the_target_that_the_process_has_then(ours: Any, theirs: Any) -> None:
    layer, x = ours(7, 37), torch.randn(5, 9, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradients(layer_or_compiled: Any, before: str, after: str) -> list[Tensor]:
        layer.zero_grad()
        native.set_target(before)
        y = layer_or_compiled(x)[0]
        native.set_target(after)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in layer.parameters())]

    own = native.active_target()
    assert own is not None
    try:
        for target in native.targets():
            wanted = gradients(layer, target, target)
            for other in (target, own, native.targets()[-1]):  # what is saved lies otherwise for each
                found = gradients(compiled, target, other)
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (target, other)
    finally:
        native.set_target(own)
