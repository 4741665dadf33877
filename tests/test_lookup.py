"""Rows of a large matrix, beside PyTorch's: values, gradients, gradients of gradients, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longshort import buffers, kernels, lookup, symbols

V, E = 4096, 256


@pytest.fixture
def weight() -> Tensor:
    assert V * E >= buffers.LARGE  # smaller ones are PyTorch's own
    return torch.randn(V, E, requires_grad=True)


def gradient(weight: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad((x * torch.arange(x.numel()).view(x.shape)).sum() / 1000, weight)[0]


@pytest.mark.parametrize("shape", [(0,), (7,), (300, 9)])
def test_values_and_gradients(weight: Tensor, shape: tuple[int, ...]) -> None:
    ids = torch.randint(V, shape) // 3 * 3  # many of them more than once
    ours, theirs = lookup.rows(ids, weight), F.embedding(ids, weight)
    assert torch.equal(ours, theirs)
    assert ours.grad_fn is not None
    found, wanted = gradient(weight, ours), gradient(weight, theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients(weight: Tensor) -> None:
    ids, u = torch.tensor([5, 5, 0, V - 1]), torch.randn(V, E)
    found = []
    for x in (lookup.rows(ids, weight), F.embedding(ids, weight)):
        (first,) = torch.autograd.grad((x**3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad((first * u).sum(), weight)[0])
    torch.testing.assert_close(*found)
    assert found[0][5].abs().sum() > 0


def test_a_matrix_that_has_changed_and_many_gradients_at_once(weight: Tensor) -> None:
    ids = torch.tensor([5, 5, 0])
    x, wanted = lookup.rows(ids, weight), F.embedding(ids, weight)
    with torch.no_grad():
        weight.add_(1)
    many = torch.randn(4, 3, E)
    torch.testing.assert_close(
        *(torch.autograd.grad(each, weight, many, is_grads_batched=True)[0] for each in (x, wanted))
    )


def test_the_gradients_memory_is_that_of_the_last_one_and_clean(weight: Tensor) -> None:
    buffers.drop()
    first = gradient(weight, lookup.rows(torch.tensor([1, 2]), weight))
    place = first.data_ptr()
    del first
    second = gradient(weight, lookup.rows(torch.tensor([2, 3]), weight))
    assert second.data_ptr() == place
    assert second.any(1).nonzero().flatten().tolist() == [2, 3]


def test_unknown_symbols_and_transforms(weight: Tensor) -> None:
    ids = torch.tensor([[3, V], [V - 1, 3]])
    x = symbols.embed(ids, weight)
    assert type(x.grad_fn).__name__ == "MaskedFillBackward0"
    assert not x[0, 1].any()
    wanted = gradient(weight, x)
    assert wanted[V - 1].any()
    assert not wanted[V - 2].any()

    def loss(weight: Tensor) -> Tensor:
        x = symbols.embed(ids, weight)
        return (x * torch.arange(x.numel()).view(x.shape)).sum() / 1000

    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), wanted)
    with kernels.use("reference"):
        torch.testing.assert_close(gradient(weight, symbols.embed(ids, weight)), wanted)
