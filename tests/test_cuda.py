"""Layers, cells and models on a GPU: PyTorch's kernels and the equations run there, with the results of a CPU."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import longshort
from longshort import checkpoint, kernels, training
from longshort.config import LabelTrainConfig, TrainConfig
from longshort.errors import UsageError
from longshort.evaluation import evaluate
from longshort.labels.examples import Examples
from longshort.loop import Finished
from longshort.model import load_language_model
from recurrent import CELL_PAIRS, PAIRS, flat, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")

SHAPES: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "bias": False},
]
OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"recurrent_dropout": 0.3},
    {"zoneout": 0.2},
    {"weight_drop": 0.4},
    {"forget_bias": 1.0},
    {"learn_initial_state": True},
    {"peephole": True},
    {"coupled_gates": True},
    {"residual": True},
]
OF_LSTM = {"forget_bias", "peephole", "coupled_gates"}
LAYERS_WITH_OPTIONS = [
    (ours, option) for ours, _ in PAIRS for option in OPTIONS if ours is longshort.LSTM or not option.keys() & OF_LSTM
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """cuDNN and cuBLAS would multiply with ten bits else."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def with_gradients(layer: Any, *arguments: Any, **named: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a layer puts out, and the gradients of a loss that all of it goes into."""
    outputs = flat(layer(*arguments, **named))
    loss = sum(
        (tensor * torch.arange(tensor.numel(), device=tensor.device).view_as(tensor).cos()).sum() for tensor in outputs
    )
    assert isinstance(loss, Tensor)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    return outputs, [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


def agree(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Check what both devices gave in float32, gradients among it."""
    same([tensor.cpu() for tensor in flat(ours)], [tensor.cpu() for tensor in flat(theirs)], tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_layers_are_pytorchs(ours: Any, theirs: Any, shape: dict[str, Any]) -> None:
    layer, peer = ours(5, 7, **shape).cuda(), theirs(5, 7, **shape).cuda()
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(4, 6, 5, device="cuda")
    assert kernels.explain(layer, x).name == "torch"
    same(with_gradients(layer, x), with_gradients(peer, x), 1e-6)
    with torch.no_grad():
        same(layer(x), peer(x), 1e-6)
    sequence = pack_sequence([torch.randn(n, 5, device="cuda") for n in (2, 5, 1)], enforce_sorted=False)
    mine, his = layer(sequence), peer(sequence)
    assert isinstance(mine[0], PackedSequence)
    same(mine, his, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_lengths_and_resets_are_those_of_the_cpu(ours: Any, theirs: Any, shape: dict[str, Any]) -> None:
    layer = ours(5, 7, **shape)
    there = copy.deepcopy(layer).cuda()
    x = torch.randn(4, 6, 5)
    rows, steps = (4, 6) if shape.get("batch_first") else (6, 4)
    lengths = [min(n, steps) for n in (3, 0, 4, 1, 4, 2)[:rows]]
    resets = torch.rand(*x.shape[:2]) < 0.3
    for arguments in ({"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
        agree(with_gradients(there, x.cuda(), **arguments), with_gradients(layer, x, **arguments))
    arguments = {"lengths": torch.tensor(lengths, device="cuda"), "resets": resets.cuda()}
    agree(there(x.cuda(), **arguments), layer(x, lengths=lengths, resets=resets))
    (y, _, gates), (expected, _, wanted) = there(x.cuda(), return_gates=True), layer(x, return_gates=True)
    agree(y, expected)
    for found, on_cpu in zip(gates, wanted, strict=True):
        assert found.keys() == on_cpu.keys()
        agree(list(found.values()), list(on_cpu.values()))


@pytest.mark.parametrize(("ours", "option"), LAYERS_WITH_OPTIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single contiguous chunk"
)  # PyTorch's, of weights made anew
def test_options_are_those_of_the_cpu(ours: Any, option: dict[str, Any], training: bool) -> None:
    layer = ours(7, 7, 2, bidirectional="residual" not in option, **option).train(training)
    there = copy.deepcopy(layer).cuda()
    x = torch.randn(4, 6, 7)
    if training and option.keys() & {"recurrent_dropout", "zoneout", "weight_drop"}:  # which draw
        outputs, gradients = with_gradients(there, x.cuda())
        assert all(torch.isfinite(tensor).all() for tensor in [*outputs, *gradients])
        torch.manual_seed(3)
        first = there(x.cuda())[0]
        torch.manual_seed(3)
        torch.testing.assert_close(there(x.cuda())[0], first)
        return
    agree(with_gradients(there, x.cuda()), with_gradients(layer, x))


@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_cells_are_pytorchs(ours: Any, theirs: Any) -> None:
    cell, peer = ours(5, 7).cuda(), theirs(5, 7).cuda()
    cell.load_state_dict(peer.state_dict())
    for x in (torch.randn(3, 5, device="cuda"), torch.randn(5, device="cuda")):
        same(with_gradients(cell, x), with_gradients(peer, x), 1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"dropout": 0.5}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_weights_stay_in_one_piece_for_cudnn(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    x, buffer = torch.randn(4, 6, 5, device="cuda"), io.BytesIO()
    layer = ours(5, 5, 2, **options).cuda()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(layer), ours(5, 5, 2, device="cuda", **options)]
    others.append(torch.load(buffer, weights_only=False))  # whose weights may be shared with other processes
    others[-1].flatten_parameters()
    others.append(copy.deepcopy(layer).double().float())
    for each in (layer, *others):
        each(x)[0].sum().backward()


def test_a_layer_goes_there_and_back() -> None:
    layer, x = longshort.LSTM(5, 7, 2), torch.randn(4, 6, 5)
    with torch.no_grad():
        before = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.cuda()
    layer(x.cuda())[0].sum().backward()
    optimizer.step()
    on_gpu = layer(x.cuda())
    layer.cpu()
    with torch.no_grad():
        after = layer(x)
    assert kernels.explain(layer, x).name not in ("torch", "reference") or not longshort.native.targets()
    agree(on_gpu, after)
    assert not torch.allclose(before[0], after[0])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_converted_models_run_there(ours: Any, theirs: Any) -> None:
    model = nn.Sequential(theirs(5, 7, 2)).cuda()
    x, optimizer = torch.randn(4, 6, 5, device="cuda"), torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(x)
    longshort.convert(model)
    assert type(model[0]) is ours
    same(model(x), expected, 1e-6)
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    same(longshort.to_torch(model)(x), expected, 1e-6)


@pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single contiguous chunk"
)  # of bfloat16, so theirs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_other_types(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    layer, peer = ours(8, 8, 2).to("cuda", dtype), theirs(8, 8, 2).to("cuda", dtype)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(4, 6, 8, device="cuda", dtype=dtype)
    same(with_gradients(layer, x), with_gradients(peer, x), 1e-6)
    assert layer(x)[0].dtype is dtype


@pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single contiguous chunk"
)  # of weights that are cast
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_autocast(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    layer, peer = ours(8, 8, 2).cuda(), theirs(8, 8, 2).cuda()
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(4, 6, 8, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        mine, his = layer(x), peer(x)
        assert [tensor.dtype for tensor in flat(mine)] == [tensor.dtype for tensor in flat(his)]
        same(mine, his, 1e-6)
        normal = ours(8, 8, layer_norm=True).cuda()
        with_gradients(normal, x)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_does_not_fit_is_refused_in_pytorchs_words(ours: Any, theirs: Any) -> None:
    layer, peer = ours(5, 7).cuda(), theirs(5, 7).cuda()
    cases: list[tuple[Tensor, Any]] = [
        (torch.randn(4, 6, 5), None),
        (torch.randn(4, 6, 4, device="cuda"), None),
        (torch.randn(4, 6, 5, device="cuda"), torch.zeros(1, 6, 7)),
        (torch.randn(4, 6, 5, device="cuda", dtype=torch.float64), None),
    ]
    for x, hx in cases:
        hx = (hx, hx) if hx is not None and ours is longshort.LSTM else hx
        with pytest.raises((RuntimeError, ValueError)) as his:
            peer(x, hx)
        with pytest.raises(his.type) as mine:
            layer(x, hx)
        assert str(mine.value).splitlines()[0] == str(his.value).splitlines()[0]
    with pytest.raises((RuntimeError, ValueError)):
        ours(5, 7)(torch.randn(4, 6, 5, device="cuda"))
    with kernels.use("native"), pytest.raises(UsageError, match="they run float32 on a CPU, not float32 on cuda"):
        layer(torch.randn(4, 6, 5, device="cuda"))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_derivatives_of_derivatives_by_the_equations(ours: Any, theirs: Any) -> None:
    layer = ours(3, 4, 2, bidirectional=True)
    there, x = copy.deepcopy(layer).cuda(), torch.randn(5, 2, 3)

    def second(layer: Any, x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        with kernels.use("reference"):
            y = layer(x)[0]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))

    agree(second(there, x.cuda()), second(layer, x.clone()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_transforms_go_through_the_equations(ours: Any, theirs: Any) -> None:
    layer = ours(3, 4)
    there, x, tangent = copy.deepcopy(layer).cuda(), torch.randn(6, 5, 2, 3), torch.randn(5, 2, 3)

    def loss(layer: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()  # type: ignore[no-any-return]

    def of_each(layer: Any, x: Tensor) -> list[Tensor]:
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        found = vmap(grad(partial(loss, layer)), in_dims=(None, 0))(parameters, x)
        return [found[name] for name in parameters]

    agree(vmap(lambda x: there(x)[0])(x.cuda()), vmap(lambda x: layer(x)[0])(x))
    agree(of_each(there, x.cuda()), of_each(layer, x))

    def forward_mode(layer: Any, x: Tensor, tangent: Tensor) -> Any:
        make_dual: Any = forward_ad.make_dual
        unpack_dual: Any = forward_ad.unpack_dual
        with forward_ad.dual_level():
            return unpack_dual(layer(make_dual(x, tangent))[0]).tangent

    agree(forward_mode(there, x[0].cuda(), tangent.cuda()), forward_mode(layer, x[0], tangent))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its compiler
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_compiled_whole(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    layer = ours(3, 4, **options).cuda()
    x = torch.randn(3, 2, 3, device="cuda")
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    agree(with_gradients(compiled, x), with_gradients(layer, x))


new_stream: Any = torch.cuda.Stream


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_cuda_graph_holds_a_layer(ours: Any, theirs: Any) -> None:
    layer, x = ours(5, 7, 2).cuda().eval(), torch.randn(4, 6, 5, device="cuda")
    with torch.no_grad():
        stream = new_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)[0]
        x.copy_(torch.randn(4, 6, 5))
        graph.replay()
        same(y, layer(x)[0], 1e-6)


MODELS: list[dict[str, Any]] = [
    {},
    {"embedding": 0},
    {"embedding": 100},
    {"cell": "gru", "layers": 2, "dropout": 0.2},
    {"cell": "rnn", "layers": 2, "residual": True},
    {"layer_norm": True},
    {"cell": "rnn_relu"},
    {"tokenizer": "word", "tied": True},
    {"tokenizer": "word", "adaptive_softmax": True, "embedding": 8},
    {"optimizer": "sgd", "lr": 0.5},
    {"lines": True},
]
SMALL: dict[str, Any] = {"hidden": 16, "embedding": 16, "seq_len": 16, "batch_size": 8, "steps": 12, "threads": 1}


def train(text_file: Path, out: Path, **changes: Any) -> list[training.Event]:
    config = TrainConfig(**(SMALL | {"texts": (str(text_file),), "out": str(out)} | changes))
    return list(training.train(config))


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["nats_per_token"] for line in lines if "nats_per_token" in line]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_training_a_language_model(text_file: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("adaptive_softmax"):
        numbers = np.random.default_rng(0).zipf(1.3, size=20_000)
        text_file.write_text(" ".join(f"w{number % 5000}" for number in numbers), encoding="utf-8")
    finished = train(text_file, tmp_path / "gpu", device="cuda", **changes)[-1]
    assert isinstance(finished, training.Finished)
    found = losses(tmp_path / "gpu")
    if not changes.get("dropout"):
        train(text_file, tmp_path / "cpu", **changes)
        assert found == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    model = load_language_model(tmp_path / "gpu")
    assert model.tokenizer is not None
    text = training.heldout_part(tmp_path / "gpu", model.tokenizer)
    on_cpu = evaluate(model.reader(), model.tokenizer, text, lines=bool(changes.get("lines")))
    assert on_cpu.nats_per_token == pytest.approx(finished.heldout.nats_per_token, abs=1e-3)


def test_a_run_goes_on_where_it_was(text_file: Path, tmp_path: Path) -> None:
    changes = {"device": "cuda", "dropout": 0.2, "layers": 2}
    train(text_file, tmp_path / "whole", **changes)
    events = training.train(
        TrainConfig(**(SMALL | {"texts": (str(text_file),), "out": str(tmp_path / "cut")} | changes))
    )
    for event in events:
        if isinstance(event, training.Looked) and event.step >= 6:
            break
    events.close()
    list(training.resume(tmp_path / "cut"))
    assert losses(tmp_path / "cut")[-6:] == pytest.approx(losses(tmp_path / "whole")[-6:], rel=1e-4)
    assert checkpoint.open_run(tmp_path / "cut").config()["train"]["device"] == "cuda"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
def test_training_what_labels(tmp_path: Path, per_step: bool, residual: bool) -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(5, size=length) for length in generator.integers(1, 9, size=40)]
    labels = [["odd" if i % 2 else "even" for i in ids] for ids in sequences]
    examples = Examples(sequences, labels if per_step else [each[-1] for each in labels])
    found = {}
    for device in ("cpu", "cuda"):
        config = LabelTrainConfig(
            hidden=8,
            embedding=8,
            layers=2,
            bidirectional=not residual,
            residual=residual,
            steps=6,
            batch_size=4,
            validate_every=3,
            threads=1,
            device=device,
            out=str(tmp_path / device),
        )
        finished = list(longshort.train_labels(config, examples, examples))[-1]
        assert isinstance(finished, Finished)
        found[device] = finished.heldout.nats_per_label
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb in several processes, as the README does."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "longshort", *arguments]
    return subprocess.run([sys.executable, *start], capture_output=True, text=True, timeout=240)


def test_a_process_for_each_gpu(text_file: Path, tmp_path: Path) -> None:
    for device, number in (("cuda", torch.cuda.device_count()), ("cpu", 2)):
        out = tmp_path / device
        flags = ["--hidden", "8", "--steps", "4", "--batch-size", str(2 * number), "--device", device, "--threads", "1"]
        done = torchrun(number, "train", str(text_file), "--out", str(out), *flags)
        assert done.returncode == 0, done.stderr
        assert len(losses(out)) == 4
    number = torch.cuda.device_count() + 1
    out = tmp_path / "more"
    done = torchrun(number, "train", str(text_file), "--out", str(out), "--batch-size", str(number), "--device", "cuda")
    assert done.returncode != 0
    assert f"{number} processes here, but PyTorch sees {number - 1}" in done.stderr
    assert not out.exists()
