"""The verbs that compare and measure: `compare` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from longshort import durable
from longshort.bench.grids import OPTIONS
from longshort.cli import console
from longshort.cli.flags import Corpus, DataDir, Int, Json
from longshort.config import TrainConfig
from longshort.errors import UsageError


def compare(
    text: Annotated[str | None, Parameter(help="A text file; the built-in text if not given.")] = None,
    *,
    recipe: Annotated[
        Literal["lecture", "depth"],
        Parameter(help="lecture: cells and implementations; depth: layers against width, weights and seconds equal."),
    ] = "lecture",
    cells: Annotated[
        str | None, Parameter(help="Cells, separated by commas (default: rnn,gru,lstm; of depth lstm).")
    ] = None,
    implementations: Annotated[
        str | None,
        Parameter(
            help="lecture: scratch, torch, native, reference, or your own copy of the textbook such as ./mine.py "
            "(default: scratch,torch and, where there are native kernels, native)."
        ),
    ] = None,
    layers: Annotated[str | None, Parameter(help="depth: numbers of layers (default: 1,2,4).")] = None,
    kinds: Annotated[
        str | None, Parameter(help="depth: plain, residual, layer_norm, both (default: all of them).")
    ] = None,
    hidden: Annotated[
        Int | None, Parameter(help="depth: units of the one layer whose number of weights all have (default: 256).")
    ] = None,
    seconds: Annotated[float | None, Parameter(help="depth: of training, for each stack (default: 60).")] = None,
    seeds: Annotated[Int, Parameter(help="Runs of each, with seeds 0, 1, ...")] = 1,
    epochs: Annotated[Int | None, Parameter(help="lecture: other than 160.")] = None,
    threads: Annotated[Int | None, Parameter(help="Processor threads.")] = None,
    corpus: Corpus = None,
    data_dir: DataDir = None,
    plot: Annotated[str | None, Parameter(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
    json: Json = False,
) -> None:
    """Compare cells and implementations on the lecture's workload, or depth with width, in quality and in seconds."""
    console.need_torch("compare")
    import torch

    from longshort import comparison
    from longshort.cli import screen
    from longshort.text import corpus as corpora

    of_lecture = {"implementations": implementations, "epochs": epochs}
    of_depth = {"layers": layers, "kinds": kinds, "hidden": hidden, "seconds": seconds}
    for name, value in (of_depth if recipe == "lecture" else of_lecture).items():
        if value is not None:
            raise UsageError(f"--{name} is not for --recipe {recipe}.", "Leave it out, or take the other recipe.")
    for name, value in (("seeds", seeds), ("epochs", epochs), ("threads", threads), ("hidden", hidden)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}.")
    if threads is not None and threads > 1024:
        raise UsageError(f"--threads must be at most 1024, not {threads}.")
    if plot is not None:
        console.check_plot(plot)
    console.set_threads(threads)
    if recipe == "depth":
        place = {"texts": (text,) if text is not None else (), "corpus": corpus or (None if text else "builtin")}
        _compare_depths({**place, "data_dir": data_dir}, cells, layers, kinds, hidden, seconds, seeds, plot, json)
        return
    loaded = corpora.load(
        [text] if text is not None else (), corpus or (None if text is not None else "builtin"), console.path(data_dir)
    )
    named = console.names(implementations) or comparison.IMPLEMENTATIONS
    chosen = {
        "cells": [console.load_cell(name) for name in console.names(cells) or ["rnn", "gru", "lstm"]],
        "implementations": named,
        "seeds": seeds,
        "epochs": epochs,
    }
    with screen.Ticker() as ticker:
        result = comparison.result(loaded, threads=torch.get_num_threads(), report=ticker.report, **chosen)
    _show(result, json, plot)


def _show(result: dict[str, Any], json: bool, plot: str | None) -> None:
    """Print what a comparison found, as its recipe is shown, and draw it if that is asked for."""
    from longshort import plots
    from longshort.cli import tables

    depth = result["recipe"] == "depth"
    if json:
        console.print_json(result)
    else:
        (tables.print_depths if depth else tables.print_comparison)(result)
    if plot is not None:
        (plots.depths if depth else plots.comparison)(result, plot)
        console.say(f"Curves: {plot}")


def _compare_depths(
    place: dict[str, Any],
    cells: str | None,
    layers: str | None,
    kinds: str | None,
    hidden: int | None,
    seconds: float | None,
    seeds: int,
    plot: str | None,
    json: bool,
) -> None:
    import torch

    from longshort import depth
    from longshort.cli import screen
    from longshort.training import Prepared

    seconds = 60.0 if seconds is None else seconds
    if not 0 < seconds < 1e6:
        raise UsageError(f"--seconds must be a positive number, not {seconds:g}.")
    depths = [console.whole(word, "--layers") for word in console.names(layers)] or [1, 2, 4]
    if wrong := [number for number in depths if not 1 <= number <= 64]:
        raise UsageError(f"--layers must be numbers from 1 to 64, not {wrong[0]}.")
    chosen: dict[str, Any] = {"layers": depths, "kinds": console.names(kinds) or list(depth.KINDS)}
    chosen |= {"cells": [console.load_cell(name) for name in console.names(cells) or ["lstm"]], "seeds": seeds}
    chosen |= {"hidden": hidden or 256, "seconds": seconds, "threads": torch.get_num_threads()}
    with screen.Ticker() as ticker:
        found = depth.result(Prepared(TrainConfig(**place)), report=ticker.report_depth, **chosen)
    _show(found, json, plot)


def bench(
    what: Annotated[Literal["layers", "kernels", "train", "generate", "score"], Parameter(help="What to measure.")],
    /,
    *,
    grid: Annotated[
        str,
        Parameter(
            help="quick (a minute), marks (the project's own), full (hours), options (of our LSTM), "
            "projection (LSTMs with proj_size), or stacks (two directions, two layers)."
        ),
    ] = "quick",
    cells: Annotated[str | None, Parameter(help="Cells, separated by commas (default: lstm,gru,rnn).")] = None,
    modes: Annotated[str | None, Parameter(help="train, infer, or both (default: train,infer).")] = None,
    shapes: Annotated[
        str | None,
        Parameter(help="Of kernels: steps x rows x units (default: 1x1x256,35x1x256,35x20x256,35x64x256)."),
    ] = None,
    threads: Annotated[
        str | None, Parameter(help="Numbers of threads, separated by commas (default: 2; of full: 1,2).")
    ] = None,
    options: Annotated[str | None, Parameter(help=f"With --grid options, some of: {','.join(OPTIONS)}.")] = None,
    kernel: Annotated[str, Parameter(help="Force one of our kernels; doctor lists them.")] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"],
        Parameter(help="Of train, generate, score: ours, beside PyTorch's float32 and the same of PyTorch's."),
    ] = "float32",
    isa: Annotated[Literal["avx2"] | None, Parameter(help="Hold PyTorch and us to these vector instructions.")] = None,
    neighbour: Annotated[
        bool, Parameter(help="Measure beside a process that keeps a core busy.", negative="", show_default=False)
    ] = False,
    autocast: Annotated[
        bool, Parameter(help="Both sides under PyTorch's autocast to bfloat16.", negative="", show_default=False)
    ] = False,
    matmul_precision: Annotated[
        Literal["highest", "high", "medium"],
        Parameter(help="Of both sides, as torch.set_float32_matmul_precision takes it."),
    ] = "highest",
    worst: Annotated[Int | None, Parameter(help="Show only this many cases, those where we do worst.")] = None,
    profile: Annotated[
        bool, Parameter(help="Of train: where the time of our step goes.", negative="", show_default=False)
    ] = False,
    out: Annotated[
        str | None, Parameter(help="File for the result, after every case; the same command again continues it.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure us beside PyTorch, in turns, with the same weights: layers, or whole steps of training, writing, scoring.

    Ratios, spreads, share of the rate of a large matrix product. `kernels`: a layer by every implementation that this
    machine can run, and how exact each is.
    """
    from longshort import machine

    if shapes is not None and what != "kernels":
        raise UsageError(f"--shapes goes with bench kernels, not with bench {what}.", "Leave it out.")
    if profile:
        if what != "train":
            raise UsageError(f"--profile goes with bench train, not with bench {what}.")
        if out is not None:
            raise UsageError("--profile prints a table: --out does not go with it.")
        rest = (cells, modes, options, isa, worst, neighbour, autocast)
        if any(rest) or (grid, kernel, matmul_precision) != ("quick", "auto", "highest"):
            raise UsageError("--profile goes with --threads, --precision and --json only.")
        _profile(_threads_of_workloads(threads), precision, json)
        return
    if what != "layers":
        given = {"grid": grid != "quick", "options": options, "isa": isa, "worst": worst, "kernel": kernel != "auto"}
        given |= {"neighbour": neighbour, "autocast": autocast, "matmul-precision": matmul_precision != "highest"}
        for name, value in given.items():
            if value:
                raise UsageError(f"--{name} goes with bench layers, not with bench {what}.", "Leave it out.")
        if what == "kernels":
            if precision != "float32":
                raise UsageError("--precision goes with bench train, generate and score; kernels have all of them.")
            _bench_kernels(cells, modes, shapes, threads, out, json)
        else:
            if cells or modes:
                raise UsageError(f"--cells and --modes go with bench layers and kernels, not with bench {what}.")
            _bench_workloads(what, threads, precision, out, json)
        return
    if precision != "float32":
        hint = "Leave it out." if precision == "int8" else f"Give --kernel {precision} here."
        raise UsageError("--precision goes with bench train, generate and score.", hint)
    if worst is not None and worst < 1:
        raise UsageError(f"--worst must be at least 1, not {worst}.")
    named: dict[str, Any] = {
        "cells": tuple(console.names(cells)),
        "modes": tuple(console.names(modes)),
        "options": tuple(console.names(options)),
    }
    numbers = tuple(console.whole(word, "--threads") for word in console.names(threads))
    console.need_torch("bench")
    if isa is not None:
        machine.hold_to(isa)
    from longshort.bench import layers
    from longshort.cli import screen, tables

    how: dict[str, Any] = {
        "threads": numbers,
        "kernel": kernel,
        "isa": isa,
        "neighbour": neighbour,
        "autocast": autocast,
        "matmul_precision": matmul_precision,
    }
    settings = layers.Settings(grid=grid, **named, **how)
    with screen.Ticker() as ticker:
        result = layers.result(settings, console.path(out), ticker.report_case)
    if json:
        console.print_json(result)
    else:
        tables.print_benchmark(result, worst)


def _bench_kernels(
    cells: str | None, modes: str | None, shapes: str | None, threads: str | None, out: str | None, json: bool
) -> None:
    number = _threads_of_workloads(threads)
    console.need_torch("bench")
    from longshort.bench import implementations
    from longshort.cli import screen, tables

    chosen: dict[str, Any] = {"cells": console.names(cells) or ["lstm"], "modes": console.names(modes)}
    chosen["shapes"] = [implementations.read_shape(word) for word in console.names(shapes)]
    if out is not None:
        durable.require_writable_directory(Path(out).absolute().parent)
    with screen.Ticker() as ticker:
        result = implementations.result(
            **{name: value for name, value in chosen.items() if value},
            threads=number,
            report=ticker.report_implementations,
        )
    _give(result, out, json, tables.print_implementations)


def _bench_workloads(what: str, threads: str | None, precision: str, out: str | None, json: bool) -> None:
    number = _threads_of_workloads(threads)
    console.need_torch("bench")
    from longshort.bench import workloads
    from longshort.cli import screen, tables

    if out is not None:
        durable.require_writable_directory(Path(out).absolute().parent)
    with screen.Ticker() as ticker:
        result = workloads.result(what, number, ticker.report_workload, precision)
    _give(result, out, json, tables.print_workloads)


def _give(result: dict[str, Any], out: str | None, json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Write a result into its file, and print it."""
    from longshort.bench import ledger

    if out is not None:
        ledger.write(Path(out), result)
    if json:
        console.print_json(result)
    else:
        show(result)


def _threads_of_workloads(given: str | None) -> int:
    number = console.whole(given or "2", "--threads")
    if not 1 <= number <= 1024:
        raise UsageError(f"--threads must be from 1 to 1024, not {number}.")
    return number


def _profile(threads: int, precision: str, json: bool) -> None:
    console.need_torch("bench")
    from longshort import native
    from longshort.bench import workloads
    from longshort.cli import screen, tables

    if not native.targets():
        raise UsageError(f"--profile shows what our kernels take. {native.reason()}")
    with screen.Ticker() as ticker:
        found = workloads.profiles(threads, ticker.report_profile, precision)
    if json:
        console.print_json({"threads": threads, "precision": precision, "seconds": dict(found)})
    else:
        tables.print_profiles(found)
