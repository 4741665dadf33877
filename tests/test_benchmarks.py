"""What `bench layers` measures and how; how long anything took is never asserted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from longshort import kernels, machine, native, precision
from longshort.bench import grids, layers, ledger, peers, timing
from longshort.bench.grids import GRIDS, Case, Grid
from longshort.bench.layers import Settings
from longshort.bench.timing import Side, Timing
from longshort.errors import LongshortError, UsageError
from test_cli import complaint, out_of

TINY = Grid(((2, 1, 8), (2, 3, 8)), threads=(1,))


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GRIDS, "quick", TINY)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(peers, "GEMM_SIZE", 100)


def quiet(ours: Side, peer: Side, gemm: Side) -> Timing:
    """Call everything once, and give made-up figures: ours takes 1 s, the peer 2 s, the product 1 ms."""
    for side in (ours, peer, gemm):
        side.prepare()
        side.call()
    return Timing(ours=[1.0] * 5, peer=[2.0] * 5, gemm=[1e-3] * 6, repetitions=(3, 2))


# --------------------------------------------------------------------------------------------------------- the clock


class Script:
    """A clock that only moves when something is called, and a list of what was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, seconds: Callable[[], float], preparing: float = 0.0) -> Side:
        def spend(entry: str, length: float) -> None:
            self.calls.append(entry)
            self.now += length

        return Side(lambda: spend(name, seconds()), lambda: spend(f"{name} prepares", preparing))

    def clock(self) -> float:
        return self.now


def test_blocks_alternate_and_preparing_is_outside_the_clock() -> None:
    script = Script()
    steps = iter((0.0, 0.0, 2.0, 100.0))  # jiffies: stolen and total, before and after
    found = timing.interleave(
        script.side("ours", lambda: 1.0, preparing=9.0),
        script.side("peer", lambda: 3.0),
        script.side("gemm", lambda: 0.5),
        blocks=3,
        block_seconds=20.0,
        clock=script.clock,
        ticks=lambda: (next(steps), next(steps)),
    )
    assert found.ours == [1.0] * 3
    assert found.peer == [3.0] * 3
    assert found.gemm == [0.5] * 4
    assert found.repetitions == (2, 7)
    assert found.stolen == pytest.approx(0.02)
    timed = [name for name in script.calls if not name.endswith("prepares")]
    ours, peer = ["ours"] * 2, ["peer"] * 7
    warm = ["ours"] * 2 + ["peer"] * 2 + ["gemm"]  # two calls are enough where they are long
    gemm = ["gemm"]
    assert timed == [*warm, *gemm, *ours, *peer, *gemm, *peer, *ours, *gemm, *ours, *peer, *gemm]
    assert script.calls.count("ours prepares") == timed.count("ours")


def test_each_look_at_the_machine_asks_how_far_its_cores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    one = script.side("", lambda: 1.0)
    figures = iter([1e-7, None, 3e-8, 2e-8])
    monkeypatch.setattr(native, "handover", lambda: next(figures))
    found = timing.interleave(one, one, one, blocks=3, block_seconds=1.0, clock=script.clock)
    assert found.handovers == [1e-7, 3e-8, 2e-8]


def test_a_block_is_the_median_of_its_calls() -> None:
    script = Script()
    lengths = iter([1.0, 1.0, *([1.0, 50.0, 2.0] * 5)])
    one = script.side("", lambda: 1.0)
    found = timing.interleave(
        script.side("ours", lambda: next(lengths)), one, one, block_seconds=3.0, clock=script.clock
    )
    assert found.ours == [2.0] * 5


def test_a_slow_first_call_does_not_decide_the_repetitions() -> None:
    script = Script()
    lengths = iter([30.0, *[0.1] * 1000])
    one = script.side("", lambda: 0.1)
    found = timing.interleave(
        script.side("ours", lambda: next(lengths)), one, one, block_seconds=1.0, clock=script.clock
    )
    assert found.repetitions == (10, 10)


def test_spread_by_hand() -> None:
    assert timing.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((4 - 2) / 3)
    assert timing.spread([1.0, 1.0, 1.0, 1.0, 90.0]) == 0.0  # one disturbed block is no noise


def test_the_neighbour_lives_as_long_as_the_context() -> None:
    with timing.busy_neighbour() as process:
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_stolen_time_is_a_part_of_all_time() -> None:
    stolen, total = timing.stolen_ticks()
    assert 0 <= stolen <= total


# -------------------------------------------------------------------------------------------------- cases and summary


def test_the_grids_are_those_that_were_agreed_on() -> None:
    sizes = {name: len(grid.shapes) * len(grid.threads) for name, grid in GRIDS.items() if name != "quick"}
    assert sizes == {"marks": 48, "full": 240, "options": 9, "projection": 36, "stacks": 24}
    assert len(Settings(grid="marks").resolved().cases()) == 48 * 3 * 2


@pytest.mark.parametrize("cell", grids.CELLS)
def test_operations_are_those_of_the_weights(cell: str) -> None:
    """Each weight is multiplied and added once a step and row; training does that three times."""
    weights = sum(w.numel() for name, w in peers._TORCH[cell](8, 8).named_parameters() if "weight" in name)
    case = Case(cell, "infer", 5, 3, 8, threads=1)
    assert case.operations() == 2 * 5 * 3 * weights
    assert replace(case, mode="train").operations() == 6 * 5 * 3 * weights
    assert replace(case, option="lengths").lengths() == [3, 4, 5]
    assert replace(case, option="lengths").operations() == 2 * 12 * weights


@pytest.mark.parametrize("option", [*grids.SHARED, "coupled_gates"])
def test_operations_of_options_that_have_other_weights(option: str) -> None:
    case = Case("lstm", "infer", 5, 3, 8, threads=1, option=option)
    weights = sum(w.numel() for name, w in peers.our_layer(case).named_parameters() if "weight" in name)
    assert case.operations() == 2 * 5 * 3 * weights


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("mode", grids.MODES)
@pytest.mark.parametrize("option", grids.SHARED)
def test_options_of_pytorch_compute_the_same(option: str, mode: str, seen: list[tuple[str, torch.Tensor]]) -> None:
    case = Case("lstm", mode, 4, 3, 8, threads=1, option=option, peer="torch.nn")
    ours, other, kernel = peers.contestants(case)
    with peers.gradients(case):
        for side in (ours, other):
            side.prepare()
            side.call()
    (_, found), (_, expected) = seen
    assert kernel in kernels.available()
    assert found.shape == (4, 3, {"proj_size": 4, "bidirectional": 16}.get(option, 8))
    torch.testing.assert_close(found, expected)


def test_the_summary_by_hand() -> None:
    ratios = {
        Case("lstm", "train", 35, 1, 64, threads=2): 2.0,
        Case("gru", "train", 35, 1, 64, threads=2): 5.0,
        Case("lstm", "train", 128, 3, 64, threads=2): 8.0,
        Case("lstm", "train", 35, 20, 64, threads=2): 0.95,
        Case("lstm", "train", 1, 20, 64, threads=2): 0.5,
    }
    lstm, gru = grids.summary(GRIDS["marks"], ratios)
    assert (lstm["cell"], lstm["mode"], lstm["threads"], lstm["peer"]) == ("lstm", "train", 2, "torch.nn")
    assert lstm["bands"] == [
        {"band": "T >= 35, B <= 3", "cases": 2, "ratio": pytest.approx(4.0), "mark": 2.5},
        {"band": "T >= 35, B 20-32", "cases": 1, "ratio": pytest.approx(0.95), "mark": 1.5},
        {"band": "T = 1", "cases": 1, "ratio": pytest.approx(0.5), "mark": 3.0},
    ]
    assert lstm["worst"] == {"ratio": 0.5, "T": 1, "B": 20, "H": 64}
    assert (lstm["cases"], lstm["below_1"], lstm["below_0.9"]) == (4, 2, 1)
    assert gru["bands"] == [{"band": "T >= 35, B <= 3", "cases": 1, "ratio": pytest.approx(5.0), "mark": 6.0}]
    assert all(band["mark"] is None for group in grids.summary(GRIDS["full"], ratios) for band in group["bands"])
    single = {replace(case, threads=1): ratio for case, ratio in ratios.items()}
    assert all(band["mark"] is None for group in grids.summary(GRIDS["marks"], single) for band in group["bands"])


# ------------------------------------------------------------------------------------------------------ the two sides


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """Which kernel was forced in every call of a side, and the outputs."""
    found: list[tuple[str, torch.Tensor]] = []
    make = peers._run

    def noted(layer: nn.Module, hx: Any, **given: Any) -> peers.Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            output = make(layer, hx, **given)(x)
            found.append((kernels.active(), output))
            return output

        return run

    monkeypatch.setattr(peers, "_run", noted)
    return found


PEERS = [(cell, peer) for cell in grids.CELLS for peer in ("torch.nn", "plain", "eager")] + [("lstm", "torchscript")]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("cell", "peer"), PEERS)
@pytest.mark.parametrize("mode", grids.MODES)
def test_both_sides_compute_the_same(cell: str, peer: str, mode: str, seen: list[tuple[str, torch.Tensor]]) -> None:
    case = Case(cell, mode, 5, 3, 8, threads=1, peer=peer)
    ours, other, kernel = peers.contestants(case, "torch")
    assert kernel == "torch"
    with kernels.use("torch"), peers.gradients(case):
        for side in (ours, other):
            side.prepare()
            side.call()
    (ran, found), (beside, expected) = seen
    assert (ran, beside) == ("torch", "reference" if peer == "eager" else "torch")
    assert found.requires_grad == expected.requires_grad == (mode == "train")
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("peer", GRIDS["options"].peers)
@pytest.mark.parametrize("option", grids.OPTIONS)
@pytest.mark.parametrize("mode", grids.MODES)
def test_options_and_loops_compute_the_same(
    option: str, peer: str, mode: str, seen: list[tuple[str, torch.Tensor]]
) -> None:
    peers.check_option("lstm", option)
    case = Case("lstm", mode, 4, 3, 8, threads=1, option=option, peer=peer)
    ours, other, _ = peers.contestants(case)
    with peers.gradients(case):
        for side in (ours, other):
            side.prepare()
            side.call()
    (_, found), (_, expected) = seen
    drawn = option in ("recurrent_dropout", "zoneout")
    if peer != "plain" and (mode == "infer" or not drawn):
        torch.testing.assert_close(found, expected)
    elif mode == "train" or option != "recurrent_dropout":
        assert not torch.equal(found, expected)  # the option acts


def test_before_each_training_call_gradients_go_and_weights_are_written() -> None:
    layer = nn.LSTM(4, 4)
    x, dy = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    side = peers._training(lambda x: layer(x)[0], layer.parameters(), x, dy)
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    grads = []
    for _ in range(2):
        side.prepare()
        assert all(tensor.grad is None for tensor in (x, *layer.parameters()))
        side.call()
        grads.append([tensor.grad for tensor in (x, *layer.parameters())])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    assert before == {name: p.data_ptr() for name, p in layer.named_parameters()}


def loop(layer: peers.ScriptedLSTM, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """The same layer on `nn.LSTMCell`, or where that lacks the option on its equations, in evaluation."""
    weights = {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters() if name.endswith("_l0")}
    h, c = state[0][0], state[1][0]
    outputs = []
    if layer.option in ("layer_norm", "peephole", "coupled_gates"):
        norms: Any = layer.norms or [nn.Identity()] * 3
        norm_x, norm_h, norm_c = norms
        look_i, look_f, look_o = (weights.get(f"weight_c{gate}", 0) for gate in "ifo")
        for x_BI in x:
            gates = norm_x(x_BI @ weights["weight_ih"].T) + weights["bias_ih"]
            gates = gates + norm_h(h @ weights["weight_hh"].T) + weights["bias_hh"]
            *of_i, f, g, o = gates.split(8, dim=1)
            f = (f + look_f * c).sigmoid()
            c = f * c + ((of_i[0] + look_i * c).sigmoid() if of_i else 1 - f) * g.tanh()
            h = (o + look_o * c).sigmoid() * norm_c(c).tanh()
            outputs.append(h)
        return torch.stack(outputs), h, c
    cell = nn.LSTMCell(8, 8)
    cell.load_state_dict(weights)
    for t, x_BI in enumerate(x):
        h_new, c_new = cell(x_BI, (h, c))
        if layer.option == "zoneout":
            h_new = 0.9 * h_new + 0.1 * h
        valid = (layer.lengths > t).unsqueeze(1)
        h, c = torch.where(valid, h_new, h), torch.where(valid, c_new, c)
        outputs.append(torch.where(valid, h, 0))
    return torch.stack(outputs), h, c


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("option", ["none", *grids.OPTIONS])
def test_the_scripted_loop_is_an_lstm(option: str) -> None:
    torch.manual_seed(0)
    lengths = Case("lstm", "infer", 5, 3, 8, threads=1, option=option).lengths()
    layer = peers.ScriptedLSTM(8, option, lengths)
    x, state = torch.randn(5, 3, 8), (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    layer.eval()
    for name, parameter in layer.named_parameters():
        if "norms" in name or "weight_c" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        output, (h, c) = layer(x, state)
        expected = loop(layer, x, state)
    for found, wanted in zip((output, h[0], c[0]), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    layer.train()
    layer(x, state)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    trained = layer(x, state)[0]
    assert torch.equal(trained, output) == (option not in ("recurrent_dropout", "zoneout"))


def test_an_option_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class LSTM(nn.LSTM):
        def __init__(self, width: int, hidden: int, *, zoneout: float = 0.0) -> None:
            super().__init__(width, hidden)

    monkeypatch.setitem(peers._OURS, "lstm", LSTM)
    peers.check_option("lstm", "none")
    peers.check_option("lstm", "zoneout")
    for option in ("layer_norm", "lengths"):
        with pytest.raises(UsageError, match=f"LSTM has no option '{option}' yet"):
            Settings(grid="options", options=(option,)).resolved()


# ------------------------------------------------------------------------------------------------------ the rows


def test_rows_hold_what_is_promised() -> None:
    found = layers.result(Settings(), measure=quiet)
    assert len(found["rows"]) == 2 * 3 * 2
    assert (found["missing"], found["noisy"]) == (0, 0)
    assert found["command"] == "longshort bench layers"
    assert torch.__version__.startswith(found["machine"]["torch"].split("+")[0])
    row = next(r for r in found["rows"] if (r["cell"], r["mode"], r["B"]) == ("lstm", "train", 3))
    assert row == {
        "cell": "lstm",
        "mode": "train",
        "T": 2,
        "B": 3,
        "H": 8,
        "threads": 1,
        "option": "none",
        "peer": "torch.nn",
        "kernel": row["kernel"],
        "ours_seconds": 1.0,
        "peer_seconds": 2.0,
        "ratio": 2.0,
        "ours_spread": 0.0,
        "peer_spread": 0.0,
        "gflops": pytest.approx(3 * 2 * 2 * 3 * 32 * 16 / 1e9),
        "gemm_gflops": pytest.approx(2.0),
        "gemm_share": pytest.approx(3 * 2 * 2 * 3 * 32 * 16 / 2e9),
        "gemm_spread": 0.0,
        "stolen": 0.0,
        "noisy": False,
        "attempts": 1,
        "ours_blocks": [1.0] * 5,
        "peer_blocks": [2.0] * 5,
        "repetitions": [3, 2],
        "handover_seconds": 0.0,
    }
    json.dumps(found, allow_nan=False)


def test_the_ratio_is_that_of_the_medians() -> None:
    case = Case("rnn", "infer", 1, 1, 8, threads=1)
    timed = Timing(ours=[1.0, 2.0, 3.0, 4.0, 9.0], peer=[6.0] * 5, gemm=[1.0] * 6)
    row = ledger.Row.of(case, timed, kernel="torch", attempts=1, gemm_size=8)
    assert (row.ours_seconds, row.peer_seconds, row.ratio) == (3.0, 6.0, 2.0)
    assert row.ours_spread == pytest.approx(2 / 3)
    assert row.case == case
    assert not row.noisy
    for disturbed in (replace(timed, stolen=0.05), replace(timed, gemm=[1.0, 1.0, 1.0, 2.0, 2.0, 2.0])):
        assert ledger.Row.of(case, disturbed, kernel="torch", attempts=1, gemm_size=8).noisy
    seen = replace(timed, handovers=[3e-8, 2e-7, 4e-8])
    assert ledger.Row.of(case, seen, kernel="torch", attempts=1, gemm_size=8).handover_seconds == 4e-8


def test_noisy_rows_are_measured_again_at_the_end_and_the_quieter_is_kept() -> None:
    stolen = {1: 0.5, 2: 0.4, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.6, 7: 0.7}  # by the number of the measurement
    count = 0

    def measure(ours: Side, peer: Side, gemm: Side) -> Timing:
        nonlocal count
        count += 1
        return replace(quiet(ours, peer, gemm), stolen=stolen[count])

    settings = Settings(cells=("lstm",))
    seen: list[tuple[Case, int]] = []
    found = layers.result(settings, report=lambda row, done, cases: seen.append((row.case, done)), measure=measure)
    first, second, third, fourth = settings.resolved().cases()
    # The first two of four are noisy; measured again, the first is quiet, the second noisy three times in all.
    order = [first, second, third, fourth, first, second, second]
    assert seen == list(zip(order, (1, 2, 3, 4, 4, 4, 4), strict=True))
    rows = found["rows"]
    assert [(row["noisy"], row["attempts"]) for row in rows] == [(False, 2), (True, 3), (False, 1), (False, 1)]
    assert rows[1]["stolen"] == 0.4
    assert found["noisy"] == 1


def test_autocast_is_of_both_sides() -> None:
    def measure(ours: Side, peer: Side, gemm: Side) -> Timing:
        under.append(torch.is_autocast_enabled("cpu"))
        for side in (ours, peer):
            side.prepare()
            side.call()
        return quiet(ours, peer, gemm)

    for autocast in (False, True):
        under: list[bool] = []
        settings = Settings(cells=("lstm",), autocast=autocast)
        found = layers.result(settings, measure=measure)
        assert set(under) == {autocast}
        assert found["command"].endswith("--autocast") == autocast
        if best := native.bfloat16():
            assert ({row["kernel"] for row in found["rows"]} == {best}) == autocast


class Watching(TorchFunctionMode):
    """Notes how exact products have to be, whenever PyTorch is called."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(precision.allowed())
        return func(*args, **(kwargs or {}))


def test_the_precision_of_products_is_of_both_sides_and_not_of_the_machines_rate() -> None:
    def measure(ours: Side, peer: Side, gemm: Side) -> Timing:
        for name, side in (("ours", ours), ("peer", peer), ("gemm", gemm)):
            with Watching(watched[name]):
                side.call()
        return quiet(ours, peer, gemm)

    for setting, allowed in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
        watched: dict[str, list[str]] = {"ours": [], "peer": [], "gemm": []}
        found = layers.result(Settings(cells=("rnn",), modes=("infer",), matmul_precision=setting), measure=measure)
        assert set(watched["ours"]) == set(watched["peer"]) == {allowed}
        assert set(watched["gemm"]) == {"ieee"}
        assert found["command"].endswith(f"--matmul-precision {setting}") == (setting != "highest")
        assert precision.allowed() == "ieee"


def test_beside_a_neighbour_a_varying_product_is_no_noise() -> None:
    def measure(ours: Side, peer: Side, gemm: Side) -> Timing:
        return replace(quiet(ours, peer, gemm), gemm=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    found = layers.result(Settings(cells=("rnn",), neighbour=True), measure=measure)
    assert (found["noisy"], found["rows"][0]["attempts"]) == (0, 1)
    assert layers.result(Settings(cells=("rnn",)), measure=measure)["noisy"] == 4


# ------------------------------------------------------------------------------------------------- the file and resume


class Stopped(BaseException):
    """As from a key or a kill."""


def test_an_interrupted_file_is_continued() -> None:
    out, settings, count = Path("out.json"), Settings(cells=("lstm", "gru")), 0

    def measure(ours: Side, peer: Side, gemm: Side) -> Timing:
        nonlocal count
        count += 1
        if count == 4:
            raise Stopped
        return quiet(ours, peer, gemm)

    threads = torch.get_num_threads()
    with pytest.raises(Stopped):
        layers.result(settings, out, measure=measure)
    assert torch.get_num_threads() == threads
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert (len(saved["rows"]), saved["missing"], saved["format_version"]) == (3, 5, 1)
    found = layers.result(settings, out, measure=measure)
    assert count == 4 + 5
    assert found["rows"][:3] == saved["rows"]
    assert [Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)}) for row in found["rows"]] == (
        settings.resolved().cases()
    )
    assert json.loads(out.read_text(encoding="utf-8")) == {"format_version": 1, **found}
    assert layers.result(settings, out, measure=measure) == found
    assert count == 4 + 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved["settings"].update(grid="full"), "another settings.grid: full there, quick here"),
        (lambda saved: saved["settings"].update(threads=[1, 2]), "another settings.threads: .1, 2. there, .1. here"),
        (lambda saved: saved["machine"].update(torch="2.10.0"), "another machine.torch: 2.10.0 there"),
        (lambda saved: saved["machine"].update(processor="other"), "another machine.processor: other there"),
        (lambda saved: saved["library"].update(sha256="12"), "another library.sha256: 12 there"),
        (lambda saved: saved["environment"].update(OMP_NUM_THREADS="7"), "another environment.OMP_NUM_THREADS"),
        (lambda saved: saved.pop("rows"), "is not a benchmark that can be continued"),
        (lambda saved: saved["rows"][0].pop("ratio"), "is not a benchmark that can be continued"),
    ],
)
def test_a_file_of_another_measurement_is_refused_and_left_alone(
    change: Callable[[dict[str, Any]], None], words: str
) -> None:
    out, settings = Path("out.json"), Settings(cells=("rnn",), modes=("infer",))
    layers.result(settings, out, measure=quiet)
    saved = json.loads(out.read_text(encoding="utf-8"))
    change(saved)
    out.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(LongshortError, match=words):
        layers.result(settings, out, measure=quiet)
    assert json.loads(out.read_text(encoding="utf-8")) == saved


# ------------------------------------------------------------------------------------------------- the command line


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    printed = out_of(capsys, "bench", "layers", "--cells", "rnn", "--modes", "infer", "--json", "--out", "o.json")
    found = json.loads(printed)
    assert found["format_version"] == 1
    assert found["command"] == "longshort bench layers --cells rnn --modes infer"
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["ours_seconds"])
        assert min(row["ours_blocks"]) <= row["ours_seconds"] <= max(row["ours_blocks"])
        assert len(row["ours_blocks"]) == len(row["peer_blocks"]) == timing.BLOCKS
        assert math.isfinite(row["gemm_share"])
    assert json.loads(Path("o.json").read_text(encoding="utf-8")) == found


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "interleave", quiet)
    shown = out_of(capsys, "bench", "layers", "--cells", "lstm")
    assert shown.count("LSTM  train") == 3  # two cases and a summary
    assert machine.processor() in shown
    shown = out_of(capsys, "bench", "layers", "--cells", "lstm,gru", "--worst", "1")
    assert shown.count("LSTM  train") == 2
    monkeypatch.setitem(GRIDS, "marks", replace(GRIDS["marks"], shapes=((35, 1, 8), (1, 3, 8))))
    shown = out_of(capsys, "bench", "layers", "--grid", "marks", "--modes", "train")
    assert "T >= 35, B <= 3" in shown
    assert "2.00 (2.5)" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layer"], "layers"),
        ([], "WHAT"),
        (["layers", "--grid", "huge"], "no grid called 'huge' here; there are quick, marks, full, options"),
        (["layers", "--cells", "lstm,lsmt"], "no cell called 'lsmt'"),
        (["layers", "--cells", "lstm,lstm"], "named twice"),
        (["layers", "--cells", ","], "list of names"),
        (["layers", "--modes", "learn"], "no mode called 'learn'"),
        (["layers", "--threads", "two"], "--threads takes whole numbers"),
        (["layers", "--threads", "0"], "--threads must be from 1 to 1024, not 0"),
        (["layers", "--kernel", "fast"], "no kernel called 'fast'"),
        (["layers", "--options", "zoneout"], "goes with --grid options"),
        (
            ["layers", "--grid", "options", "--autocast"],
            "is measured beside torch.nn, and --grid options has other peers",
        ),
        (["train", "--autocast"], "--autocast goes with bench layers"),
        (["train", "--precision", "int8"], "float32 or bfloat16, not in int8"),
        (["train", "--profile", "--precision", "int8"], "float32 or bfloat16, not in int8"),
        (["layers", "--precision", "int8"], "--precision goes with bench train, generate and score"),
        (["train", "--matmul-precision", "high"], "--matmul-precision goes with bench layers"),
        (["train", "--profile", "--matmul-precision", "high"], "--profile goes with --threads"),
        (["layers", "--matmul-precision", "low"], "--matmul-precision"),
        (["layers", "--grid", "options", "--cells", "gru"], "no cell called 'gru' here; there are lstm"),
        (["layers", "--grid", "options", "--options", "peepholes"], "no option called 'peepholes'"),
        (["layers", "--isa", "avx9"], "--isa"),
        (["layers", "--isa", "avx2"], "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"),
        (["layers", "--worst", "0"], "--worst must be at least 1"),
        (["layers", "--out", ""], "--out is empty"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in complaint(capsys, 2, "bench", *arguments)
    assert not list(Path().iterdir())


def test_a_place_that_cannot_be_written_is_told_before_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file.txt").write_text("x", encoding="utf-8")
    assert "file.txt" in complaint(capsys, 1, "bench", "layers", "--out", "file.txt/o.json")
    assert "not a benchmark" in complaint(capsys, 1, "bench", "layers", "--out", "file.txt")


def test_avx2_is_set_before_pytorch_is_loaded() -> None:
    program = (
        "import sys; from longshort import machine; machine.hold_to('avx2'); assert 'torch' not in sys.modules\n"
        "import torch; print(torch.backends.cpu.get_cpu_capability())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("AVX2", "DEFAULT")
