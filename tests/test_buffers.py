"""Memory that goes from one backward pass to the next is never anybody else's."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

import longshort
from longshort import buffers, kernels, native, native_layers, packing, quick
from longshort.buffers import Gradients, Saved

pytestmark = pytest.mark.skipif(not native.targets(), reason="no native kernels here")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is kept yet, and small gradients will be too."""
    monkeypatch.setattr(Gradients, "LEAST", 1)
    Gradients.drop()
    yield
    Gradients.drop()


def place(tensor: Tensor) -> int:
    return tensor.data_ptr()


def test_what_nobody_has_is_given_again() -> None:
    weight = torch.zeros(40, 30)
    first = Gradients.like(weight)
    at = place(first)
    assert first.shape == (40, 30)
    assert first.is_contiguous()
    assert place(Gradients.like(torch.zeros(30, 40))) != at  # another shape
    del first
    assert place(Gradients.like(weight)) == at


@pytest.mark.parametrize(
    "share",
    [
        lambda t: t,
        lambda t: t[3:5, 2],
        lambda t: t.numpy(),
        lambda t: t.detach(),
        lambda t: t.untyped_storage(),
        lambda t: nn.Parameter(t),
        from_dlpack,
    ],
)
def test_what_somebody_has_is_not(share: Callable[[Tensor], Any]) -> None:
    weight = torch.zeros(40, 30)
    first = Gradients.like(weight)
    at, held = place(first), share(first)
    del first
    second = Gradients.like(weight)
    assert place(second) != at
    del held, second
    assert at in {place(kept) for kept in [Gradients.like(weight), Gradients.like(weight)]}


def test_memory_that_was_moved_is_not_given_again() -> None:
    weight = torch.zeros(40, 30)
    first: Any = Gradients.like(weight)
    first.share_memory_()
    at = place(first)
    del first
    assert all(place(Gradients.like(weight)) != at for _ in range(3))


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gradients, "MOST_BYTES", 10_000)
    small, large = torch.zeros(1000), torch.zeros(2501)
    at = place(Gradients.like(small))
    Gradients.like(large)  # more than all: plain memory
    assert place(Gradients.like(small)) == at
    held = [Gradients.like(small) for _ in range(3)]
    assert len({place(tensor) for tensor in held}) == 3
    kept = sum(tensor.nbytes for entries in Gradients._kept.values() for tensor, *_ in entries)
    assert kept == Gradients._bytes <= 10_000


def test_little_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gradients, "LEAST", 1000)
    Gradients.like(torch.zeros(999))
    assert not Gradients._kept
    Gradients.like(torch.zeros(1000))
    assert Gradients._kept


def test_inference_tensors_are_not_kept() -> None:
    weight = torch.zeros(40, 30)
    with torch.inference_mode():
        Gradients.like(weight)
    assert not Gradients._kept
    assert not Gradients.like(weight).is_inference()


def test_without_a_count_of_uses_all_memory_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (None, lambda storage: 1):
        monkeypatch.setattr(buffers, "_uses", count)
        buffers._alone.cache_clear()
        held = Gradients.like(torch.zeros(40, 30))
        assert not Gradients._kept
        assert held.shape == (40, 30)
    buffers._alone.cache_clear()


class Step(torch.autograd.Function):
    """A weight whose gradient is filled with a number."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.value = value
        ctx.save_for_backward(weight)
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return Gradients.like(ctx.saved_tensors[0]).fill_(ctx.value), None


@settings(max_examples=40)
@given(actions=st.lists(st.sampled_from(["backward", "drop", "keep", "forget", "grad"]), max_size=30))
def test_gradients_stay_what_they_were(actions: list[str]) -> None:
    weight = nn.Parameter(torch.zeros(8, 4))
    held: list[tuple[Tensor, float]] = []
    step: Any = Step.apply
    total, value = 0.0, 0.0
    for action in actions:
        value += 1.0
        if action == "backward":
            step(weight, value).backward()
            total += value
        elif action == "drop":
            weight.grad, total = None, 0.0
        elif action == "keep" and weight.grad is not None:
            held.append((weight.grad[2:4] if len(held) % 2 else weight.grad.detach(), total))
            weight.grad, total = None, 0.0
        elif action == "forget":
            held = held[1:]
        elif action == "grad":
            (found,) = torch.autograd.grad(step(weight, value), weight)
            held.append((found, value))
        assert weight.grad is None or torch.equal(weight.grad, torch.full((8, 4), total))
        for tensor, known in held:
            assert torch.equal(tensor, torch.full_like(tensor, known))


@pytest.mark.parametrize("saved", [False, True])
def test_several_threads_get_memory_of_their_own(saved: bool) -> None:
    weight = torch.zeros(64, 16)
    wrong: list[Any] = []

    def run(number: int) -> None:
        for _ in range(400):
            owners = [Saved(1024) if saved else None for _ in range(3)]
            mine = [(owner.tensor if owner else Gradients.like(weight)).fill_(number) for owner in owners]
            wrong.extend(tensor for tensor in mine if tensor.ne(number).any())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_training_loop_uses_the_same_memory_at_each_step(bidirectional: bool) -> None:
    layer = longshort.GRU(5, 7, bidirectional=bidirectional)
    x = torch.randn(4, 3, 5)
    places = []
    with kernels.use(native.targets()[0]):
        for _ in range(3):
            layer.zero_grad()
            layer(x)[0].sum().backward()
            places.append({place(p.grad) for p in layer.parameters() if p.grad is not None})
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == len(list(layer.parameters()))


def test_of_what_is_saved_only_so_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saved, "_free", [])
    monkeypatch.setattr(Saved, "LEAST", 1000)
    monkeypatch.setattr(Saved, "MOST_BYTES", 4 * 3500)

    def after(*floats: int) -> list[int]:
        """Return what waits after as many were saved, and went one after the other."""
        saved = [Saved(number) for number in floats]
        while saved:
            del saved[0]
        return [tensor.numel() for tensor in Saved._free]

    assert after(1500, 1600) == [1500, 1600]
    assert Saved(1400).tensor.numel() == 1500
    assert after(2400) == [2400], "the newest, if both are too much"
    assert after(3600) == [], "more than may wait"
    assert after(*range(10, 22)) == [*range(14, 22)]


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="this system does not count a thread's page faults")
def test_scratch_of_a_size_that_nobody_asks_for_makes_room() -> None:
    def weights(H: int) -> native_layers.Weights:
        return native_layers.Weights(np.zeros((4 * H, 1), np.float32), np.zeros((4 * H, H), np.float32))

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        native_layers.forward("lstm", x_TBI, small, out=out_TBH, threads=1)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    kernels.empty_cache()
    x_TBI, small, out_TBH = np.zeros((3, 12, 1), np.float32), weights(1280), np.empty((3, 12, 1280), np.float32)
    native_layers.forward("lstm", x_TBI, weights(2600), threads=1)  # 216 MB of scratch, of 256 that may wait
    first = faults()
    assert min(faults() for _ in range(3)) < first / 4
    kernels.empty_cache()


def test_all_that_is_kept_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saved, "_free", [])
    layer, x = longshort.LSTM(40, 30), torch.randn(5, 4, 40)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())))

    before, again = gradients(), gradients()
    with torch.no_grad():
        y = layer(x)[0]
    del again
    assert Saved._free
    assert Gradients._kept
    assert packing._packed
    kernels.empty_cache()
    assert not [*Saved._free, *Gradients._kept, *packing._packed]
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))
    with torch.no_grad():
        assert torch.equal(layer(x)[0], y)


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("steps", [64, 63])
def test_large_outputs_and_gradients_lie_in_large_pages(
    monkeypatch: pytest.MonkeyPatch, quickly: bool, steps: int
) -> None:
    asked: list[int] = []
    given = buffers.prefer_large_pages

    def ask(tensor: Tensor) -> Tensor:
        asked.append(place(tensor))
        return given(tensor)

    monkeypatch.setattr(buffers, "prefer_large_pages", ask)
    monkeypatch.setattr(quick, "prefer_large_pages", ask)
    monkeypatch.setattr(buffers, "LARGE", 64 * 8 * 16)
    monkeypatch.setattr(quick, "LARGE", 64 * 8 * 16)
    layer, x = longshort.GRU(16, 16), torch.randn(steps, 8, 16, requires_grad=True)
    y = layer(x)[0] if quickly else layer(x, return_gates=True)[0]
    assert (place(y) in asked) == (steps == 64 or not quickly)  # the other way looks at the size there
    y.sum().backward()
    assert x.grad is not None
    assert (place(x.grad) in asked) == (steps == 64 or not quickly)
