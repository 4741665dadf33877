"""PyTorch's switches of how exact products of float32 are to be, and which of our targets runs then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import longshort
from longshort import head, kernels, machine, native, precision

pytestmark = pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
BACKENDS: Any = torch.backends
EVERY_SWITCH = {
    "bf16": [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: setattr(BACKENDS.mkldnn.rnn, "fp32_precision", "bf16"),
        lambda: setattr(BACKENDS.mkldnn, "fp32_precision", "bf16"),
    ],
    "tf32": [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "tf32"),
        lambda: setattr(BACKENDS.mkldnn.rnn, "fp32_precision", "tf32"),
        lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    ],
}
needs_halves = pytest.mark.skipif(native.HALVES not in native.supported(), reason=f"no {native.HALVES} here")


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """PyTorch's switches as they were found. Once its own tests are loaded, they are set in such a context alone."""
    with BACKENDS.__allow_nonbracketed_mutation():
        yield
        torch.set_float32_matmul_precision("highest")
        for place in (BACKENDS, BACKENDS.mkldnn, BACKENDS.mkldnn.rnn, BACKENDS.mkldnn.matmul):
            place.fp32_precision = "none"
        assert precision.allowed() == "ieee"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of `precision`, another processor with certain targets."""

    def choose(*targets: str, name: str = "", active: int = 0) -> None:
        precision._vectors_are_fast.cache_clear()
        monkeypatch.setattr(native, "supported", lambda: targets)
        monkeypatch.setattr(native, "active_target", lambda: targets[active])
        monkeypatch.setattr(machine, "processor", lambda: name)

    yield choose
    precision._vectors_are_fast.cache_clear()


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("wanted", EVERY_SWITCH)
def test_every_switch_is_followed(wanted: str, number: int) -> None:
    assert precision.allowed() == "ieee"
    EVERY_SWITCH[wanted][number]()
    assert precision.allowed() == wanted


def test_the_switch_of_recurrent_layers_goes_before_that_of_products() -> None:
    torch.set_float32_matmul_precision("medium")
    BACKENDS.mkldnn.rnn.fp32_precision = "ieee"
    assert precision.allowed() == "ieee"
    assert precision.target(35, 64, 256) is None


XEON = ("avx512", "avx2", "baseline", "amx", "amx_bf16x3", "amx_bf16", "avx512_bf16")


def test_what_runs_is_no_less_exact_than_allowed_and_what_the_processor_has(on: Any) -> None:
    whole = 35, 64, 256
    for setting, xeon, epyc, old_xeon in (
        ("highest", None, None, None),
        ("high", "amx_bf16x3", None, None),
        ("medium", "amx_bf16", "avx512_bf16", None),
    ):
        torch.set_float32_matmul_precision(setting)
        on(*XEON, name="Intel(R) Xeon(R) Processor")
        assert precision.target(*whole) == xeon
        on("avx512", "avx2", "baseline", "avx512_bf16", name="AMD EPYC 9R14")
        assert precision.target(*whole) == epyc
        on("avx512", "avx2", "baseline", "avx512_bf16", name="Intel(R) Xeon(R) Platinum 8380H")
        assert precision.target(*whole) == old_xeon, "its vectors multiply bfloat16 no faster"
        on("avx2", "baseline")
        assert precision.target(*whole) is None
        on(*XEON, active=1)
        assert precision.target(*whole) is None, "LONGSHORT_TARGET has chosen one"


def test_few_rows_and_few_units_stay_float32_where_that_is_faster(on: Any) -> None:
    on(*XEON)
    torch.set_float32_matmul_precision("high")
    assert precision.target(2, 12, 128) == "amx_bf16x3"
    assert precision.target(1, 48, 128) == "amx_bf16x3"
    for few in ((35, 11, 256), (1, 47, 256), (35, 64, 127)):
        assert precision.target(*few) is None
    torch.set_float32_matmul_precision("medium")
    assert precision.target(1, 1, 8) == "amx_bf16"


def test_a_pytorch_without_switches_has_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(precision, "_read", None)
    assert precision.allowed() == "ieee"
    assert precision.target(35, 64, 256) is None


def results(layer: Any, x: Any, **given: Any) -> list[Tensor]:
    """Return what a layer puts out with gradients and without, and all gradients."""
    layer.zero_grad()
    found = layer(x, **given)[0]
    y = found.data if hasattr(found, "data") and not isinstance(found, Tensor) else found
    y.square().sum().backward()
    with torch.no_grad():
        again = layer(x, **given)[0]
    return [y.detach(), again if isinstance(again, Tensor) else again.data, *(p.grad for p in layer.parameters())]


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"batch_first": True}),
    ("RNN", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"layer_norm": True}),
]


@needs_halves
@pytest.mark.parametrize(("name", "given"), CALLS, ids=str)
@pytest.mark.parametrize(("setting", "target"), [("high", native.HALVES), ("medium", "amx_bf16")])
def test_layers_run_what_the_switch_allows(setting: str, target: str, name: str, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = getattr(longshort, name)(30, 130, **given), torch.randn(14, 14, 30)
    exact = results(layer, x)
    with kernels.use(target):
        forced = results(layer, x)
    assert not same(forced, exact)
    torch.set_float32_matmul_precision(setting)
    choice = kernels.explain(layer, x)
    assert choice.name == target
    assert "fp32_precision allows" in choice.reason
    assert same(results(layer, x), forced)
    with kernels.use("native"):
        assert kernels.explain(layer, x).name == native.active_target()
        assert same(results(layer, x), exact), "what is forced goes before the switch"
    torch.set_float32_matmul_precision("highest")
    assert same(results(layer, x), exact)


@needs_halves
@pytest.mark.parametrize("kind", ["lengths", "packed", "unbatched", "few rows", "cell", "cell of few rows"])
def test_what_explain_tells_is_what_runs(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = longshort.LSTMCell(30, 130) if "cell" in kind else longshort.LSTM(30, 130)
    given: dict[str, Any] = {"lengths": [9, *[4] * 13]} if kind == "lengths" else {}
    x: Any = {
        "lengths": torch.randn(9, 14, 30),
        "packed": pack_sequence([torch.randn(n, 30) for n in range(20, 4, -1)]),
        "unbatched": torch.randn(14, 30),
        "few rows": torch.randn(14, 3, 30),
        "cell": torch.randn(50, 30),
        "cell of few rows": torch.randn(14, 30),
    }[kind]
    with kernels.use(native.HALVES):
        forced = results(layer, x, **given)
    exact = results(layer, x, **given)
    assert not same(forced, exact)
    torch.set_float32_matmul_precision("high")
    chosen = kernels.explain(layer, x, **given).name
    assert chosen == (native.HALVES if kind in ("lengths", "packed", "cell") else native.active_target())
    assert same(results(layer, x, **given), forced if chosen == native.HALVES else exact)


def test_explain_takes_what_no_layer_would() -> None:
    torch.set_float32_matmul_precision("high")
    assert kernels.explain(longshort.LSTM(30, 130), torch.zeros(30)).name == native.active_target()


@needs_halves
def test_a_backward_pass_is_as_exact_as_its_forward_pass() -> None:
    torch.manual_seed(0)
    layer, x = longshort.GRU(30, 130), torch.randn(14, 14, 30)
    exact = results(layer, x)
    torch.set_float32_matmul_precision("high")
    wanted = results(layer, x)
    layer.zero_grad()
    y = layer(x)[0]
    torch.set_float32_matmul_precision("highest")
    y.square().sum().backward()
    assert same([p.grad for p in layer.parameters()], wanted[2:])
    assert not same(wanted, exact)


@needs_halves
def test_a_compiled_layer_follows_the_switch_of_when_it_runs() -> None:
    torch.manual_seed(0)
    layer, x = longshort.LSTM(30, 130), torch.randn(14, 14, 30)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exact = results(layer, x)
    for setting in ("high", "highest"):
        torch.set_float32_matmul_precision(setting)
        found = results(layer, x)
        assert same(found, exact) == (setting == "highest")
        layer.zero_grad()
        y = compiled(x)[0]
        y.square().sum().backward()
        assert same([y.detach(), *(p.grad for p in layer.parameters())], [found[0], *found[2:]])


@needs_halves
def test_the_loss_follows_too() -> None:
    torch.manual_seed(0)
    h, weight, bias = torch.randn(300, 256), torch.randn(256, 256) / 16, torch.randn(256)
    targets = torch.randint(256, (300,))

    def gradients() -> list[Tensor]:
        leaves = h_NH, weight_VH, bias_V = [tensor.clone().requires_grad_() for tensor in (h, weight, bias)]
        return list(torch.autograd.grad(head.cross_entropy(h_NH, weight_VH, bias_V, targets, 300), leaves))

    exact = gradients()
    torch.set_float32_matmul_precision("high")
    for near, whole in zip(gradients(), exact, strict=True):
        assert 0 < float((near - whole).abs().max() / whole.abs().max()) < 3e-5


@needs_halves
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_infinity_saturates_and_nan_stays_in_its_row(name: str) -> None:
    torch.manual_seed(0)
    layer, x = getattr(longshort, name)(40, 130), torch.randn(6, 14, 40)
    x[2, 3, 5], x[4, 7, 0], x[1, 9, 8] = float("inf"), -float("inf"), float("nan")
    with torch.no_grad():
        exact = layer(x)[0]
        with kernels.use(native.HALVES):
            found = layer(x)[0]
    assert torch.equal(found.isnan(), exact.isnan())
    assert found[:, 9].isnan().any()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4, equal_nan=True)
