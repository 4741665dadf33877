"""Symbols in, loss out: the table that takes the place of x, and the loss that is its own gradient."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import need_target
from longshort import calls, head, kernels, native, native_backend, ops, training
from longshort.cells import Stack
from longshort.config import TrainConfig
from longshort.options import read_lengths
from longshort.structures import ForwardArgs, LossArgs, Shape, Tokens
from longshort.text.tokenizers import CharTokenizer
from recurrent import same

pytestmark = pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
MANY_ROWS: dict[str, Any] = {"T": 20, "B": 24, "V": 9, "H": 37, "layers": 2, "with_lengths": False, "seed": 0}
FLOAT32_TARGETS = [name for name in native.built_targets() if name not in native.LOWER]
CELLS = ["lstm", "gru", "rnn", "rnn_relu"]


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
@settings(max_examples=25)
@example(cell="lstm", **MANY_ROWS)  # threads divide them
@example(cell="gru", **MANY_ROWS)
@given(
    cell=st.sampled_from(CELLS),
    T=st.integers(1, 9),
    B=st.integers(1, 12),
    V=st.integers(1, 9),
    H=st.integers(1, 37),
    layers=st.integers(1, 2),
    with_lengths=st.booleans(),
    seed=st.integers(0, 99),
)
def test_symbols_give_what_one_hot_rows_give(
    target: str, cell: str, T: int, B: int, V: int, H: int, layers: int, with_lengths: bool, seed: int
) -> None:
    need_target(target)
    torch.manual_seed(seed)
    stack = Stack(cell, V, H, layers)
    ids = torch.randint(V + 1, (T, B))
    x = F.pad(torch.eye(V), (0, 0, 0, 1))[ids]
    lengths = read_lengths(torch.randint(T + 1, (B,)), T, B) if with_lengths else None
    weights = _of_layers(stack, layers)
    state = tuple(torch.rand(layers, B, H).requires_grad_() for _ in stack.state_sizes)
    number = calls.TARGETS[target]

    def run(**given: Any) -> Any:
        first = weights[0] if "ids" not in given else weights[0][:, :0]
        source = x if "ids" not in given else F.pad(weights[0].T, (0, 0, 0, 1))
        y, after = native_backend.run_native(
            stack, source, state, [first, *weights[1:]], target=number, grad=True, sequences=lengths, **given
        )
        loss = (y * torch.linspace(-1, 1, H)).sum() + sum((tensor * 0.7).sum() for tensor in after)
        return y, after, torch.autograd.grad(loss, [*weights, *state], allow_unused=False)

    same(run(ids=ids), run())


def _of_layers(stack: Stack, layers: int) -> list[torch.Tensor]:
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        shapes += Stack(
            stack.cell, stack.hidden_size if layer else stack.input_size, stack.hidden_size, 1
        ).weight_shapes
    return [(torch.rand(shape) - 0.5).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients_go_through_the_equations(cell: str) -> None:
    torch.manual_seed(0)
    stack = Stack(cell, 4, 6, 1)
    weights, ids = _of_layers(stack, 1), torch.randint(4, (3, 2))
    table = F.pad(weights[0].detach().T, (0, 0, 0, 1)).requires_grad_()
    flat = [weights[0][:, :0], *weights[1:]]
    y, _ = native_backend.run_native(stack, table, None, flat, grad=True, ids=ids)
    with kernels.use("reference"):
        (first,) = torch.autograd.grad(y.square().sum(), table, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), table)
    x = F.pad(torch.eye(4), (0, 0, 0, 1))[ids].double()
    leaf = table[:-1].detach().double().requires_grad_()

    def by_one_hot() -> torch.Tensor:
        from longshort import backends

        w = [leaf.T, *[weight.detach().double() for weight in weights[1:]]]
        return backends.run_reference(stack, x, None, w)[0].square().sum()

    (expected,) = torch.autograd.grad(by_one_hot(), leaf, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), leaf)
    same(first[:-1], expected.float(), 1e-4)
    same(second[:-1], expected_second.float(), 1e-4)


def loss_of(
    h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float, target: str, threads: int = 1
) -> list[Tensor]:
    """Return nats and the three gradients, as the library makes them in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        nats, gradients = ops.cross_entropy(h, weight, bias, targets, scale, calls.TARGETS[target])
    finally:
        torch.set_num_threads(before)
    return [torch.tensor(nats, dtype=torch.float64), *gradients]


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
@settings(max_examples=40)
@given(
    N=st.integers(0, 40) | st.integers(500, 530),
    V=st.integers(1, 70),
    H=st.integers(1, 70),
    size=st.sampled_from([0.01, 1.0, 300.0]),
    tokens=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_the_loss_and_its_gradients_are_exact(
    target: str, N: int, V: int, H: int, size: float, tokens: int, seed: int
) -> None:
    need_target(target)
    torch.manual_seed(seed)
    given = torch.randn(N, H), torch.randn(V, H) * size / H**0.5, torch.randn(V)
    targets = torch.randint(-1, V, (N,))
    exact = [tensor.double().requires_grad_() for tensor in given]
    loss = F.cross_entropy(F.linear(*exact), targets, ignore_index=-1, reduction="sum")
    expected = torch.autograd.grad(loss / tokens, exact)
    found = loss_of(*given, targets, 1 / tokens, target)
    assert float(found[0]) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6 * max(size, 1) * max(N, 1))
    for ours, theirs in zip(found[1:], expected, strict=True):
        largest = max(float(theirs.abs().max()) if theirs.numel() else 0.0, size / tokens)
        assert float((ours - theirs).abs().max() if ours.numel() else 0.0) < 1e-5 * largest * max(size, 1)
    assert not found[1][targets < 0].any()


@pytest.mark.parametrize("target", [*FLOAT32_TARGETS, *native.LOWER])
@pytest.mark.parametrize("V", [65, 40_000])
def test_the_loss_has_the_same_bits_in_any_number_of_threads(target: str, V: int) -> None:
    """Of many symbols several chunks are made: 40,000 of them have 209 rows each."""
    need_target(target)
    torch.manual_seed(0)
    N = 1100 if V < 100 else 250
    given = torch.randn(N, 50), torch.randn(V, 50), torch.randn(V), torch.randint(-1, V, (N,))
    found = [loss_of(*given, 0.5, target, threads) for threads in (1, 2, 3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    leaves = [tensor.requires_grad_() for tensor in given[:3]]
    loss = F.cross_entropy(F.linear(*leaves), given[3], ignore_index=-1, reduction="sum")
    limit = 1e-5 if target in FLOAT32_TARGETS else 1e-4 if target == native.HALVES else 2e-2
    for ours, theirs in zip(found[0][1:], torch.autograd.grad(loss / 2, leaves), strict=True):
        assert float((ours - theirs).abs().max()) < limit * float(theirs.abs().max())


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_output_layer_learns_as_pytorchs_does(factor: float) -> None:
    torch.manual_seed(0)
    h, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((9, 5), (7, 5), (7,)))
    targets = torch.tensor([0, 6, -1, 3, 3, -1, 2, 1, 5])
    found = []
    for kernel in ("native", "torch"):
        with kernels.use(kernel):
            loss = head.cross_entropy(h, weight, bias, targets, 7)
            assert ("_LongshortCrossEntropy" in str(loss.grad_fn)) == (kernel == "native")
            found.append([loss, *torch.autograd.grad(loss * factor, [h, weight, bias])])
    same(found[0], found[1])
    with torch.no_grad():
        same(head.cross_entropy(h, weight, bias, targets, 7), found[0][0])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    torch.manual_seed(0)
    h, weight, bias = torch.randn(20, 8), torch.randn(30, 8), torch.randn(30)
    h[3, 5], h[7, 0] = value, value
    targets = torch.randint(30, (20,))
    targets[7] = -1
    nats, (dh, *_) = ops.cross_entropy(h, weight, bias, targets, 1.0)
    exact = F.cross_entropy(F.linear(h, weight, bias), targets, ignore_index=-1, reduction="none")
    assert math.isfinite(nats) == bool(exact.isfinite().all())
    others = [row for row in range(20) if row != 3]
    assert dh[others].isfinite().all()
    assert not dh[7].any(), "a row without a target has no gradient, whatever it holds"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"embedding": 0, "optimizer": "sgd", "lr": 1.0, "single_bias": True},
        {"cell": "gru", "layers": 2, "dropout": 0.3},
        {"embedding": 20, "hidden": 20, "tied": True, "weight_decay": 0.01},
        {"lines": True, "seq_len": 5},
    ],
)
def test_a_run_has_the_losses_that_it_has_without_native_kernels(given: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("abc de\n"), size=3000))
    losses = []
    for kernel in ("native", "torch", "reference"):
        with kernels.use(kernel):
            config = TrainConfig(
                **({"hidden": 20, "embedding": 9, "batch_size": 6, "seq_len": 12, "seed": seed} | given)
            )
            tokenizer = CharTokenizer(text)
            stepper = training.TextStepper(training.make_model(config, tokenizer), config, 60)
            sampler = _sampler(config, tokenizer, text)
            losses.append([stepper.step(n, sampler.batch(n))[:2] for n in range(60)])
    for other in losses[1:]:
        np.testing.assert_allclose(losses[0], other, rtol=2e-3)
        np.testing.assert_allclose(losses[0][:5], other[:5], rtol=2e-5)


def _sampler(config: TrainConfig, tokenizer: CharTokenizer, text: str) -> Any:
    from longshort.text.batches import SAMPLERS, Lines
    from longshort.text.encoding import encode_text

    part = encode_text(tokenizer, text, config.lines)
    rest = (config.batch_size, config.seq_len, config.seed, 0, 1)
    if config.lines:
        assert part.breaks is not None
        return Lines(part.ids, *rest, breaks=part.breaks, unknown=tokenizer.size)
    return SAMPLERS[config.sampler](part.ids, *rest, unknown=tokenizer.size)


def test_a_vocabulary_larger_than_the_batch_reads_its_embedding() -> None:
    text = "".join(map(chr, range(97, 97 + 200)))
    config = TrainConfig(hidden=8, embedding=4, batch_size=2, seq_len=3)
    tokenizer = CharTokenizer(text)
    model = training.make_model(config, tokenizer)
    ids, targets = torch.randint(201, (3, 2)), torch.randint(200, (3, 2))
    found = []
    for kernel in ("native", "reference"):
        with kernels.use(kernel):
            loss, _ = model.loss(ids, targets, None, 6)
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    same(found[0], found[1])


def test_what_does_not_fit_is_refused_by_the_library() -> None:
    library = native.need()
    ids, table, floats = np.zeros((2, 3), np.int64), np.zeros((5, 16), np.float32), np.zeros(1000, np.float32)
    address = floats.ctypes.data

    def forward(**changes: Any) -> int:
        shape = Shape(T=2, B=3, I=0, H=4, cell=3, num_threads=1, target=-1)
        args = ForwardArgs(shape=shape, weight_hh=address, y=address, y_step=12, y_row=4)
        args.tokens = Tokens(table=table.ctypes.data, ids=ids.ctypes.data, V=4)
        for name, value in changes.items():
            setattr(args.shape if name == "I" else args.tokens, name, value)
        return int(library.ls_forward(ctypes.byref(args), 1))

    assert forward(V=-1) == native.BAD_ARGUMENT
    assert forward(I=2) == native.BAD_ARGUMENT
    assert forward(ids=None) == native.BAD_ARGUMENT
    for bad in (-1, 5):
        ids[1, 2] = bad
        assert forward() == native.BAD_ARGUMENT
    ids[1, 2] = 4
    output = np.zeros(1000, np.float32)
    args = ForwardArgs(
        shape=Shape(T=2, B=3, I=0, H=4, cell=3, num_threads=1, target=-1),
        weight_hh=address,
        y=output.ctypes.data,
        y_step=12,
        y_row=4,
        tokens=Tokens(table=table.ctypes.data, ids=ids.ctypes.data, V=4),
    )
    assert library.ls_forward(ctypes.byref(args), 1) == native.OK
    room, targets = np.zeros(100, np.float32), np.array([0, 7])
    places = [address, address, address, targets.ctypes.data, *[room.ctypes.data] * 4]
    names = [field[0] for field in LossArgs._fields_ if field[1] is ctypes.c_void_p]
    fitting: dict[str, Any] = {"N": 2, "V": 8, "H": 3, "target": -1, "num_threads": 1, "scale": 1.0}
    fitting |= dict(zip(names, places, strict=True))
    assert library.ls_loss(ctypes.byref(LossArgs(**fitting))) == native.OK
    sizes = ({"N": -1}, {"V": 7}, {"V": 0}, {"H": 0}, {"H": -1}, {"target": 99}, {"num_threads": 0})
    for name, value in [*(pair for size in sizes for pair in size.items()), *((name, None) for name in names)]:
        assert library.ls_loss(ctypes.byref(LossArgs(**{**fitting, name: value}))) == native.BAD_ARGUMENT, name
    assert library.ls_loss(None) == native.BAD_ARGUMENT
