"""What PyTorch offers around a training loop does with our layers what it does with PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import longshort
from longshort import calls, native
from longshort.buffers import Saved
from recurrent import PAIRS, same

pruning: Any = prune
skip_init: Any = nn.utils.skip_init

needs_native = pytest.mark.skipif(not native.targets(), reason="there are no native kernels here")
ONE_AND_MANY: pytest.MarkDecorator = pytest.mark.parametrize(
    "shape", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["one layer", "four"]
)


def pair(ours: Any, theirs: Any, **arguments: Any) -> tuple[Any, Any]:
    layer, peer = ours(7, 16, **arguments), theirs(7, 16, **arguments)
    layer.load_state_dict(peer.state_dict())
    return layer, peer


def gradients(layer: nn.Module, output: Any) -> list[Tensor]:
    layer.zero_grad()
    output.square().sum().backward()
    return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]


@needs_native
@ONE_AND_MANY
@pytest.mark.parametrize("ours", [ours for ours, _ in PAIRS])
def test_hooks_have_all_that_a_forward_pass_saves(ours: Any, shape: dict[str, Any]) -> None:
    layer, x = ours(7, 16, **shape), torch.randn(5, 3, 7)
    expected = gradients(layer, layer(x)[0])
    sizes = []

    def pack(tensor: Tensor) -> Any:
        sizes.append(tensor.numel())
        return tensor.numpy(force=True).copy()

    waiting = len(Saved._free)
    with saved_tensors_hooks(pack, torch.from_numpy):
        output = layer(x)[0]
    row = calls.saved_floats_a_row(layer.cell, 16, calls.library.ls_active_target(), False)
    assert sum(size >= 5 * 3 * row for size in sizes) >= (4 if shape else 1)
    assert output.grad_fn.num_hooked == (4 if shape else 1)  # one node for all layers and directions
    assert not hasattr(output.grad_fn, "saved")
    for found, wanted in zip(gradients(layer, output), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(Saved._free) == waiting


@needs_native
@pytest.mark.parametrize("unpack", [lambda t: t[..., :1], lambda t: t.double()], ids=["smaller", "of another type"])
@ONE_AND_MANY
def test_a_hook_that_gives_back_something_else_is_refused(shape: dict[str, Any], unpack: Any) -> None:
    layer = longshort.GRU(7, 16, **shape)
    with saved_tensors_hooks(lambda tensor: tensor, unpack):
        output = layer(torch.randn(5, 3, 7))[0]
    with pytest.raises(RuntimeError, match="must give back what it took"):
        output.sum().backward()


@pytest.mark.parametrize("ours", [ours for ours, _ in PAIRS])
def test_gradients_of_gradients_of_what_hooks_have(ours: Any) -> None:
    layer = ours(7, 16)
    found = []
    for hooks in (nullcontext(), save_on_cpu()):
        x = torch.linspace(-1, 1, 105).view(5, 3, 7).requires_grad_()
        with hooks:
            (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))
    same(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@ONE_AND_MANY
def test_activation_checkpointing(shape: dict[str, Any], use_reentrant: bool) -> None:
    layer = longshort.LSTM(7, 16, recurrent_dropout=0.3, zoneout=0.1, layer_norm=True, **shape)
    x = torch.randn(5, 3, 7, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(layer, layer(x)[0])
    torch.manual_seed(1)
    output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    for found, wanted in zip(gradients(layer, output), expected, strict=True):
        assert torch.equal(found, wanted)


@needs_native
@ONE_AND_MANY
def test_a_profile_shows_the_kernels(shape: dict[str, Any]) -> None:
    layer, x = longshort.GRU(7, 16, **shape), torch.randn(5, 3, 7)
    with torch.autograd.profiler.profile() as profile:
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    layers = 2 if shape else 1  # a call has both directions of one
    assert counts["longshort::gru"] == 2 * layers
    assert counts["longshort::gru_backward"] == layers


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_weights_that_are_pruned_or_loaded_by_assignment(ours: Any, theirs: Any) -> None:
    layer, peer = pair(ours, theirs)
    x = torch.randn(5, 3, 7)
    for each in (layer, peer):
        pruning.l1_unstructured(each, "weight_hh_l0", 0.5)
    same(layer(x), peer(x))
    for each in (layer, peer):
        pruning.remove(each, "weight_hh_l0")
    same(layer(x), peer(x))
    with torch.device("meta"):
        empty = ours(7, 16)
    empty.load_state_dict(peer.state_dict(), assign=True)
    same(empty(x), peer(x))
    made = skip_init(ours, 7, 16)
    made.load_state_dict(peer.state_dict())
    same(made(x), peer(x))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_data_parallel_and_sharded_layers(group: None, ours: Any, theirs: Any) -> None:
    layer, peer = pair(ours, theirs)
    x = torch.randn(5, 3, 7)
    expected = gradients(peer, peer(x)[0])
    parallel = nn.parallel.DistributedDataParallel(layer)
    same(gradients(layer, parallel(x)[0]), expected)
    sharded, _ = pair(ours, theirs)
    sharded.load_state_dict(peer.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    found: Any = gradients(sharded, sharded(x)[0])
    same([gradient.full_tensor() for gradient in found], expected)
