"""Targets whose products are of bfloat16: against the same equations in float64 with rounded factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longshort
from longshort import checkpoint, kernels, native, training
from longshort.cli import main
from longshort.config import LabelTrainConfig, TrainConfig
from longshort.decoder import Decoder
from longshort.errors import ConfigError, UsageError
from longshort.generation import Request, Sampling, cost_in_bits, generate_many
from longshort.text.tokenizers import CharTokenizer

LAYERS: dict[str, Callable[..., Any]] = {"lstm": longshort.LSTM, "gru": longshort.GRU, "rnn": longshort.RNN}
needs_target = pytest.mark.skipif(not native.bfloat16(), reason="this processor has no products of bfloat16")


EVERY_TARGET = pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name not in native.supported(), reason=f"this processor lacks {name}")
        )
        for name in native.LOWER
    ],
)
ERROR = {**dict.fromkeys(native.BFLOAT16, 4e-3), native.HALVES: 1e-5}
"""What rounding the factors makes of a result, of its largest value."""


class RoundedProduct(torch.autograd.Function):
    """x W^T in float64 in both directions, of factors of bfloat16: of as many as there are parts of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(x, weight)
        return rounded_product(x, weight.T, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (d,) = grads
        x, weight = ctx.saved_tensors
        return rounded_product(d, weight, ctx.parts), rounded_product(d.T, x, ctx.parts), None


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def rounded_product(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return what is left of a b: of two parts of each factor all products but that of the smaller ones."""
    high = rounded(a) @ rounded(b)
    if parts == 1:
        return high
    low_a, low_b = rounded(a - rounded(a)), rounded(b - rounded(b))
    return high + low_a @ rounded(b) + rounded(a) @ low_b


def run_rounded(cell: str, x_TBI: Tensor, h: Tensor, weights: list[Tensor], parts: int) -> Tensor:
    """Return the outputs of a layer, as its equations give them with rounded factors. An LSTM's c starts at h."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = RoundedProduct.apply(x, weight, parts)  # type: ignore[no-untyped-call]
        return found

    w_ih, w_hh, b_ih, b_hh = weights
    c = h
    outputs = []
    for x in x_TBI:
        from_x, from_h = product(x, w_ih) + b_ih, product(h, w_hh) + b_hh
        if cell == "lstm":
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            (r, z, n), (hr, hz, hn) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            z = (z + hz).sigmoid()
            h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
        else:
            h = (from_x + from_h).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def both(cell: str, I: int, H: int, T: int, B: int, kernel: str, target: str) -> list[tuple[Tensor, Tensor]]:
    """Return pairs: outputs and every gradient of a kernel, and of the equations with the factors of a target."""
    torch.manual_seed(I + 100 * H + T)
    layer = LAYERS[cell](I, H)
    x, loss, h = torch.randn(T, B, I), torch.randn(T, B, H), torch.rand(B, H)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    with kernels.use(kernel):
        y = layer(ours, (h[None], h[None]) if cell == "lstm" else h[None])[0]
        (y * loss).sum().backward()
    weights = [p.detach().double().requires_grad_() for p in layer.parameters()]
    wanted = run_rounded(cell, theirs, h.double(), weights, parts=1 + (target == native.HALVES))
    torch.autograd.backward((wanted * loss.double()).sum())
    found = [y.detach(), ours.grad, *(p.grad for p in layer.parameters())]
    return [
        (a.double(), b) for a, b in zip(found, [wanted.detach(), theirs.grad, *(w.grad for w in weights)], strict=True)
    ]


def distances(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [(a - b).abs().flatten() / b.abs().max() for a, b in pairs]


@EVERY_TARGET
@pytest.mark.parametrize("cell", LAYERS)
@settings(max_examples=25, deadline=None)
@given(I=st.integers(1, 70), H=st.integers(1, 70), T=st.integers(2, 6), B=st.integers(5, 40))
def test_outputs_and_gradients_are_those_of_rounded_factors(
    target: str, cell: str, I: int, H: int, T: int, B: int
) -> None:
    # With an error of 1e-7 a number in the middle of two of bfloat16 goes to the other one now and then: most results
    # are equal nevertheless, and none is further away than that. Where a result has few values, one such number reaches
    # all of them: they are counted among all the others.
    found = distances(both(cell, I, H, T, B, target, target))
    for distance in [torch.cat(found), *(distance for distance in found if distance.numel() >= 30)]:
        assert distance.median() < 0.075 * ERROR[target]
    # A gradient of one number can be the small sum of large ones, and has no larger one beside it to be a share of.
    assert max(float(distance.max()) for distance in found if distance.numel() > 1) < 2.5 * ERROR[target]


@EVERY_TARGET
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize(("T", "B"), [(1, 70), (12, 24)])
def test_the_factors_are_rounded_and_nothing_else_is(target: str, cell: str, T: int, B: int) -> None:
    near = distances(both(cell, 48, 40, T, B, target, target))
    exact = distances(both(cell, 48, 40, T, B, kernels.NATIVE, target))
    times = 30 if target in native.BFLOAT16 else 2  # the error of float32 itself is nearer to that of two parts
    for of_bfloat16, of_float32 in zip(near[:-2], exact[:-2], strict=True):
        assert times * of_bfloat16.mean() < of_float32.mean() < 5 * ERROR[target]


@EVERY_TARGET
@pytest.mark.parametrize(("T", "B", "H"), [(9, 33, 600), (40, 17, 200)])
def test_sums_that_are_cut_into_pieces(target: str, T: int, B: int, H: int) -> None:
    """More units than are summed at once, more steps than a chunk has."""
    torch.manual_seed(0)
    layer, x = longshort.GRU(600, H), torch.randn(T, B, 600)
    found = []
    for kernel in (target, kernels.NATIVE):
        with kernels.use(kernel):
            layer.zero_grad()
            y = layer(x)[0]
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in layer.parameters())])
    for ours, exact in zip(*found, strict=True):
        distance = (ours - exact).abs().mean() / exact.abs().max()
        assert ERROR[target] / 4000 < distance < ERROR[target] / 4


OF_EVERY_CELL: list[dict[str, Any]] = [
    {"bidirectional": True, "num_layers": 2},
    {"layer_norm": True},
    {"recurrent_dropout": 0.3},
    {"zoneout": 0.3},
]
OF_LSTM: list[dict[str, Any]] = [
    {"peephole": True},
    {"coupled_gates": True},
    {"proj_size": 19},
    {"proj_size": 32, "layer_norm": True, "coupled_gates": True, "peephole": True, "zoneout": 0.2},
]


@EVERY_TARGET
@pytest.mark.parametrize(
    ("cell", "given"),
    [*((cell, given) for cell in LAYERS for given in OF_EVERY_CELL), *(("lstm", given) for given in OF_LSTM)],
    ids=str,
)
def test_options_and_lengths_stay_near_float32(target: str, cell: str, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[cell](30, 40, **given), torch.randn(9, 12, 30)
    lengths = [9, 0, 3, 9, 1, 5, 7, 9, 8, 2, 9, 9]
    found = {}
    for name in (target, "reference"):
        with kernels.use(name):
            torch.manual_seed(1)
            layer.zero_grad()
            y = layer(x, lengths=lengths)[0]
            y.square().sum().backward()
            found[name] = [y.detach(), *(p.grad for p in layer.parameters())]
    assert not found[target][0][3:, 2].any(), "past its end a row is 0"
    for ours, exact in zip(found[target], found["reference"], strict=True):
        distance = (ours - exact).abs() / exact.abs().max()
        assert ERROR[target] / 4000 < distance.mean() < 2.5 * ERROR[target]


def model(tmp_path: Path, **given: Any) -> Path:
    """Return a run of a few steps, with weights that have learned something."""
    settings: dict[str, Any] = {"corpus": "builtin", "steps": 60, "lr": 0.03, "hidden": 40, "embedding": 16}
    settings |= {"batch_size": 16, "seq_len": 32}
    out = tmp_path / "run"
    assert isinstance(list(training.train(TrainConfig(**settings | {"out": str(out)} | given)))[-1], training.Finished)
    return out


@needs_target
def test_a_decoder_costs_little_and_writes_the_same_alone_and_in_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = model(tmp_path, layers=2, cell="gru")
    exact, decoder = longshort.load(run), longshort.load(run, weights="bfloat16")
    assert 0 < cost_in_bits(exact, decoder) < 1e-3
    written = {}
    for threads in (1, 2):
        decoder.threads = threads
        requests = [Request(prompt="The", length=60, sampling=Sampling(seed=3), stream=i) for i in range(9)]
        texts = [""] * 9
        for i, piece in generate_many(decoder, decoder.tokenizer, requests):
            texts[i] += piece
        written[threads] = texts
        alone = "".join(piece for _, piece in generate_many(decoder, decoder.tokenizer, requests[4:5]))
        assert alone == texts[4]
    assert written[1] == written[2]
    assert main(["generate", str(run), "--weights", "bfloat16", "--length", "20"]) == 0
    assert "bfloat16 weights cost 0.0" in capsys.readouterr().err
    lines = tmp_path / "lines.txt"
    lines.write_text("The girl saw\nzzzz\n")
    assert main(["score", str(run), str(lines), "--weights", "bfloat16"]) == 0
    rounded = capsys.readouterr().out.split()
    assert main(["score", str(run), str(lines)]) == 0
    for ours, theirs in zip(rounded, capsys.readouterr().out.split(), strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.05)


@needs_target
def test_training_loses_nothing_that_three_seeds_would_show(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        for seed in range(3):
            out = tmp_path / f"{precision}-{seed}"
            model(out, seed=seed, precision=precision)
            found = checkpoint.open_run(out / "run").result()
            assert found is not None
            losses[precision, seed] = found["heldout"]["nats_per_token"]
    exact, rounded = (np.array([losses[p, seed] for seed in range(3)]) for p in ("float32", "bfloat16"))
    assert exact.max() < 3.1, "it has learned something"
    assert 0 < np.abs(exact - rounded).max() < 0.01


@needs_target
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("LSTM", {}),
        ("GRU", {}),
        ("RNN", {}),
        ("LSTM", {"proj_size": 4}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_autocast_is_these_products_with_the_types_of_pytorch(
    name: str, given: dict[str, Any], with_state: bool, kind: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, peer = getattr(longshort, name)(8, 16, **given), getattr(torch.nn, name)(8, 16, **given)
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12, 8, dtype=kind)
    state = [torch.randn(layer.num_layers * (1 + layer.bidirectional), 12, n) for n in (layer.proj_size or 16, 16)]
    hx: Any = (tuple(state) if name == "LSTM" else state[0]) if with_state else None

    def run(layer: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        output, after = layer(x, hx)
        found = [output, *(after if name == "LSTM" else [after])]
        loss = sum((each.float().square().sum() for each in found), torch.zeros(()))
        return found, list(torch.autograd.grad(loss, list(layer.parameters())))

    with torch.autocast("cpu", torch.bfloat16):
        choice = kernels.explain(layer, x)
        assert (choice.name, "autocast" in choice.reason) == (native.bfloat16(), True)
        found, gradients = run(layer, x)
        expected, _ = run(peer, x)
    with kernels.use("bfloat16"):
        exact, of_exact = run(layer, x.float())
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    for each, wanted, same in zip(found, expected, exact, strict=True):
        assert torch.equal(each, same.to(each.dtype))
        torch.testing.assert_close(each.float(), wanted.float(), rtol=0, atol=0.05)
    for gradient, wanted in zip(gradients, of_exact, strict=True):  # the loss saw outputs of fewer digits
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@needs_target
def test_autocast_with_options_and_lengths_stays_near_float32() -> None:
    torch.manual_seed(0)
    layer = longshort.LSTM(8, 16, layer_norm=True, recurrent_dropout=0.2, zoneout=0.1, peephole=True)
    x, given = torch.randn(5, 12, 8), {"lengths": [5, 4, 3] * 4}
    torch.manual_seed(1)
    exact = layer(x, **given)[0]
    for kind in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels.explain(layer, x, **given).name == native.bfloat16()
            output = layer(x.to(kind), **given)[0]
        assert output.dtype is torch.bfloat16
        torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.1 if kind is torch.bfloat16 else 0.05)


@needs_target
def test_under_autocast_the_equations_of_second_derivatives_stay_float32() -> None:
    torch.manual_seed(0)
    layer, x = longshort.GRU(4, 6), torch.randn(3, 12, 4, requires_grad=True)

    def twice() -> Tensor:
        y = layer(x)[0]
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        (found,) = torch.autograd.grad(dx.square().sum(), x)
        return found

    with kernels.use("reference"):
        exact = twice()
    with torch.autocast("cpu", torch.bfloat16):  # PyTorch's own last backward pass is under it; 0.011 with ours too
        found = twice()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.008 * float(exact.abs().max()))


def test_autocast_goes_elsewhere_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = longshort.LSTM(8, 16), torch.randn(5, 3, 8)
    with torch.autocast("cpu", torch.float16):
        assert kernels.explain(layer, x).name == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.explain(layer, x.double()).name == "torch"
        assert kernels.explain(longshort.LSTMCell(8, 16), x[0]).name == "torch"
        monkeypatch.setattr(native, "bfloat16", lambda: None)
        assert kernels.explain(layer, x).name == "torch"


@needs_target
def test_what_is_forced_is_told() -> None:
    layer, x = longshort.LSTM(4, 5), torch.zeros(2, 3, 4)
    assert kernels.explain(layer, x).name in kernels.available()
    with kernels.use("bfloat16"):
        assert kernels.active() == kernels.explain(layer, x).name == native.bfloat16()
        with kernels.use(kernels.active()):
            assert kernels.active() == native.bfloat16()
    assert not {*kernels.available(), *native.targets()} & {*native.LOWER}, "they give other results"
    assert native.active_target() not in native.LOWER


def test_where_there_is_none_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "bfloat16", lambda: None)
    missing = pytest.raises(UsageError, match=r"no products of bfloat16.*\n.*AVX512-BF16")
    with missing, kernels.use("bfloat16"):
        pass
    tokenizer = CharTokenizer("ab \n")
    config = TrainConfig(hidden=4, embedding=3, precision="bfloat16")
    weights = training.make_model(config, tokenizer).weights()
    with missing:
        Decoder(config.model(tokenizer.size), weights, tokenizer, "bfloat16")
    text = tmp_path / "text.txt"
    text.write_text("ab ab\n" * 50)
    assert main(["train", str(text), "--steps", "2", "--precision", "bfloat16", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_what_it_does_not_go_with_is_named() -> None:
    with pytest.raises(ConfigError, match="precision bfloat16 is for the kernels of a CPU, not for cuda"):
        TrainConfig(precision="bfloat16", device="cuda")
    with pytest.raises(ConfigError, match="precision bfloat16 is for the kernels of a CPU, not for cuda"):
        LabelTrainConfig(precision="bfloat16", device="cuda")
    with pytest.raises(ConfigError, match=r"native kernels, not for mine.py:Cell"):
        TrainConfig(precision="bfloat16", cell="mine.py:Cell")
