"""The command line: one function a verb, and the only place that prints.

Results go to standard output, everything else (progress, notes, errors) to standard error. Exit status: 0 done,
1 failure, 2 usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import json as jsonlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

import longshort
from longshort import durable
from longshort.config import TrainConfig, is_own_cell
from longshort.errors import LongshortError, MissingExtraError, OutputError, UsageError
from longshort.flags import Corpus, DataDir, Int, Json, OwnCell, TrainFlags
from longshort.interruption import Interrupted, Interruption

_RANK = os.environ.get("RANK", "0").removeprefix("0")
"""Number of this process among those that torchrun has started; empty of the first, and where there is only one."""

app = App(
    name="longshort",
    version=longshort.__version__,
    help="Train and run small LSTM, GRU and RNN language models on an ordinary CPU.",
    result_action="return_value",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)


# ------------------------------------------------------------------------------------------------- the verbs


@app.command
def demo(
    *,
    minutes: Annotated[float, Parameter(help="Time for training.")] = 1.0,
    out: Annotated[str | None, Parameter(help="Run directory to make.")] = None,
) -> None:
    """Train a minute on text that is on this machine already, write samples, and say what to do next."""
    from longshort import loop

    _say("A character model learns English from Python's own documentation, which is on this machine already.")
    path = Path(out) if out else loop.free_directory("longshort-demo")
    run = _train({"corpus": "builtin", "out": str(path)}, minutes)
    _say("\nWhat it writes, given the first words:\n")
    for number, prompt in enumerate(("The ", "If the argument ", "class ")):
        _generate_to_screen(run, prompt, 200, {"temperature": 0.7}, stream=number)
        print(flush=True)
    place, me = shlex.quote(str(run)), _program()
    _say("Next:")
    for command, meaning in (
        (f"{me} generate {place} --prompt 'The ' --temperature 0.5", "more, at a lower temperature"),
        (f"{me} eval {place} --split valid", "the held-out figure once more"),
        (f"{me} train MY-TEXT.txt --minutes 5", "a model of your own text"),
        (f"{me} compare --recipe lecture", "RNN, GRU and LSTM, from scratch and from the library"),
    ):
        _say(f"  {command:<{len(me) + 58}} {meaning}")


@app.command
def train(
    *text: Annotated[
        str, Parameter(help="Text files, UTF-8, or gzip of it; directories of .txt files; - for standard input.")
    ],
    minutes: Annotated[
        float | None, Parameter(help="The one dial: measure this machine, choose size and steps for this time.")
    ] = None,
    recipe: Annotated[str | None, Parameter(help="Named settings: lecture, shakespeare.")] = None,
    config: Annotated[str | None, Parameter(help="TOML file of options; flags are stronger.")] = None,
    flags: Annotated[TrainFlags | None, Parameter(name="*")] = None,
) -> None:
    """Train a model on a text and keep it in a run directory."""
    from longshort import recipes

    given = {name: value for name, value in vars(flags).items() if value is not None} if flags else {}
    if text:
        given["texts"] = text
    toml = recipes.load_toml(config) if config else {}
    for source in (given, toml):
        if source.get("cell") is not None:
            source["cell"] = _cell(str(source["cell"]))
    settings = recipes.combine(given, toml, recipe)
    _say_next(_train(settings, minutes))


@app.command
def resume(
    run: Annotated[str, Parameter(help="A run directory.")],
    /,
    *text: Annotated[str, Parameter(help="Where the text is now, if it has moved.")],
    steps: Annotated[
        Int | None, Parameter(help="Steps in all, more or fewer than planned: the rate falls to its lowest there.")
    ] = None,
    data_dir: DataDir = None,
    cell: OwnCell = None,
) -> None:
    """Go on with a run that was stopped, bit for bit; with --steps also with one that was finished."""
    _cell(cell)
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}.")
    _need_torch("resume")
    from longshort import processes, training

    with processes.join() as team, Interruption() as interruption:
        _show(training.resume(run, steps, text, data_dir, interruption.wanted, team), interruption)
    _say_next(Path(run))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *text: Annotated[str, Parameter(help="Text files or directories; - for standard input.")],
    corpus: Corpus = None,
    data_dir: DataDir = None,
    split: Annotated[
        Literal["valid"] | None, Parameter(help="Take the run's own held-out part instead of TEXT.")
    ] = None,
    block: Annotated[Int | None, Parameter(help="Zero state at the start of every block of this many tokens.")] = None,
    lanes: Annotated[
        Int | None, Parameter(help="Overlapping parts that are read side by side; by the text's length if not given.")
    ] = None,
    dynamic: Annotated[
        bool,
        Parameter(help="The model goes on learning from what it has predicted.", negative="", show_default=False),
    ] = False,
    rate: Annotated[
        float | None, Parameter(help="Size of its steps then (default: measured to be good on one text).")
    ] = None,
    cell: OwnCell = None,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text: state carried through the text, or zero at every block."""
    from longshort import checkpoint
    from longshort.evaluation import evaluate
    from longshort.text import corpus as corpora
    from longshort.text import encoding

    _cell(cell)
    if lanes is not None and lanes < 1:
        raise UsageError(f"--lanes must be at least 1, not {lanes}.")
    if dynamic and (block or lanes):
        raise UsageError("--dynamic reads the text in order, once: --block and --lanes do not go with it.")
    if rate is not None and not dynamic:
        raise UsageError("--rate is how fast a model learns while it reads.", "Add --dynamic.")
    if dynamic:
        _need_torch("eval --dynamic")
    load = _language_model if dynamic else _reader
    if split is not None:
        if text or corpus:
            raise UsageError("--split valid is the run's own text; TEXT and --corpus do not go with it.")
        if not checkpoint.is_run(Path(model)):
            raise UsageError(f"{model} is not a run, so it has no held-out part.", "Give a TEXT, or a run directory.")
        _need_torch("eval --split")
        from longshort import training

        config = training.run_config(Path(model))
        if config.lines and (block or lanes):
            raise UsageError(f"{model} was trained on lines: --block and --lanes do not go with --split valid.")
        _set_threads(config.threads)
        reader = load(model)
        part, name = training.heldout_part(Path(model), reader.tokenizer, _path(data_dir)), "held-out part"
        lanes = lanes or (config.eval_lanes if block is None else None)
    else:
        source = corpora.find(corpora.keep_standard_input(text), corpus, _path(data_dir))
        reader = load(model)
        lines = reader.config.lines and not block and not lanes
        part = encoding.encode(source, encoding.survey(source), reader.tokenizer, 0, lines)[1]
        name = source.name
    if dynamic:
        from longshort.dynamic import Learning, evaluate_dynamically

        found = evaluate_dynamically(reader, part, Learning() if rate is None else Learning(rate=rate))
    else:
        found = evaluate(reader, reader.tokenizer, part, lanes=lanes, block=block)
    if json:
        _print_json({"model": model, "text": name, **found.to_dict()})
        return
    print(f"{found.nats_per_token:.4f} nats a token   {found.bits_per_character:.4f} bits a character   ", end="")
    print(f"{found.bits_per_byte:.4f} bits a byte   perplexity {found.perplexity:.4f}")
    print(f"{found.tokens:,} tokens of {name}; {found.protocol}", end="")
    print(f"; {found.skipped:,} outside the vocabulary skipped" if found.skipped else "")


@app.command
def generate(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *,
    prompt: Annotated[str, Parameter(help="What the model reads before it writes.")] = "",
    length: Annotated[Int, Parameter(help="Symbols to write.")] = 500,
    temperature: Annotated[
        float | None, Parameter(help="Below 1 more conservative, above 1 more random (default: 0.8).")
    ] = None,
    top_k: Annotated[Int | None, Parameter(help="Sample from the K most probable symbols only.")] = None,
    top_p: Annotated[float | None, Parameter(help="Sample from the fewest symbols that hold this probability.")] = None,
    greedy: Annotated[
        bool, Parameter(help="Always the most probable symbol.", negative="", show_default=False)
    ] = False,
    seed: Annotated[Int, Parameter(help="Decides what is sampled.")] = 0,
    stop: Annotated[
        tuple[str, ...], Parameter(help="End before this text; may be given several times.", negative="")
    ] = (),
    state: Annotated[
        str | None, Parameter(help="File to go on from, if it is there, and to leave the state in afterwards.")
    ] = None,
    samples: Annotated[Int, Parameter(help="Write so many texts, side by side.")] = 1,
    weights: Annotated[
        Literal["float32", "int8"], Parameter(help="int8 takes a quarter of the memory, and says what it costs.")
    ] = "float32",
    cell: OwnCell = None,
    json: Json = False,
) -> None:
    """Write text: warm the state on the prompt, then sample symbol by symbol."""
    _cell(cell)
    if length < 0:
        raise UsageError(f"--length must be at least 0, not {length}.")
    if samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}.")
    if state is not None and samples > 1:
        raise UsageError("--state keeps one text; --samples does not go with it.")
    if "" in stop:
        raise UsageError("--stop is empty.", "An unset shell variable looks like this.")
    from longshort import generation
    from longshort.screen import visible

    if greedy and not (temperature is None and top_k is None and top_p is None):
        raise UsageError("--greedy takes the most probable symbol; temperature, top-k and top-p do not go with it.")
    given = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if json or samples > 1:
        texts = [""] * samples
        for number, piece in _pieces(model, prompt, length, sampling, stop, range(samples), weights, state):
            texts[number] += piece
    if json:
        written = {"text": texts[0]} if samples == 1 else {"texts": texts}
        settings = generation.Sampling(**sampling).to_dict()
        _print_json({"model": model, "prompt": prompt, **written, "length": length, "stop": list(stop), **settings})
    elif samples > 1:
        for number, text in enumerate(texts, start=1):
            print(f"--- {number}", visible(prompt + text), sep="\n")
    else:
        _generate_to_screen(model, prompt, length, sampling, stop, weights=weights, state=state)


@app.command
def score(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    file: Annotated[str, Parameter(help="A text file, or gzip of it; - for standard input.")] = "-",
    /,
    *,
    top: Annotated[
        Int | None, Parameter(help="Show only the N oddest lines, the oddest first, the odd part marked.")
    ] = None,
    ahead: Annotated[Int, Parameter(help="Most lines read before the first is answered; 1 for a live log.")] = 2048,
    cell: OwnCell = None,
    json: Annotated[
        bool, Parameter(help="Print a JSON object a line and nothing else.", negative="", show_default=False)
    ] = False,
) -> None:
    """Say how odd each line is: bits per character, each line from a zero state, in the order of the file."""
    from longshort import scoring, screen
    from longshort.text import corpus

    _cell(cell)
    if top is not None and top < 1:
        raise UsageError(f"--top must be at least 1, not {top}.")
    scored = scoring.score(_decoder(model), corpus.lines(file), ahead=ahead)
    for found in scored if top is None else scoring.oddest(scored, top):
        if json:
            print(jsonlib.dumps(found.to_dict()))
        elif top is None:
            print(f"{found.bits_per_character:.4f}")
        else:
            print(screen.marked_line(found, colour=sys.stdout.isatty()))


@app.command
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
            help="lecture: scratch, torch, native, reference, or your own copy of the textbook such as ./mine.py."
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
    _need_torch("compare")
    import torch

    from longshort import comparison, screen
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
        _check_plot(plot)
    _set_threads(threads)
    if recipe == "depth":
        place = {"texts": (text,) if text is not None else (), "corpus": corpus or (None if text else "builtin")}
        _compare_depths({**place, "data_dir": data_dir}, cells, layers, kinds, hidden, seconds, seeds, plot, json)
        return
    loaded = corpora.load(
        [text] if text is not None else (), corpus or (None if text is not None else "builtin"), _path(data_dir)
    )
    named = _names(implementations) or comparison.IMPLEMENTATIONS
    chosen = {
        "cells": [_cell(name) for name in _names(cells) or ["rnn", "gru", "lstm"]],
        "implementations": named,
        "seeds": seeds,
        "epochs": epochs,
    }
    with screen.Ticker() as ticker:
        result = comparison.result(loaded, threads=torch.get_num_threads(), report=ticker.report, **chosen)
    if json:
        _print_json(result)
    else:
        screen.print_comparison(result)
    if plot is not None:
        from longshort import plots

        plots.comparison(result, plot)
        _say(f"Curves: {plot}")


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

    from longshort import depth, plots, screen
    from longshort.training import Prepared

    seconds = 60.0 if seconds is None else seconds
    if not 0 < seconds < 1e6:
        raise UsageError(f"--seconds must be a positive number, not {seconds:g}.")
    numbers = _names(layers) or ["1", "2", "4"]
    if wrong := [number for number in numbers if not number.isdecimal() or not 1 <= int(number) <= 64]:
        raise UsageError(f"--layers must be numbers from 1 to 64, separated by commas; not {wrong[0]!r}.")
    chosen: dict[str, Any] = {"layers": [int(number) for number in numbers], "hidden": hidden or 256, "seeds": seeds}
    chosen |= {"cells": [_cell(name) for name in _names(cells) or ["lstm"]]}
    chosen |= {"kinds": _names(kinds) or list(depth.KINDS), "threads": torch.get_num_threads(), "seconds": seconds}
    with screen.Ticker() as ticker:
        found = depth.result(Prepared(TrainConfig(**place)), report=ticker.report_depth, **chosen)
    if json:
        _print_json(found)
    else:
        screen.print_depths(found)
    if plot is not None:
        plots.depths(found, plot)
        _say(f"Picture: {plot}")


@app.command
def bench(
    what: Annotated[Literal["layers", "train", "generate", "score"], Parameter(help="What to measure.")],
    /,
    *,
    grid: Annotated[
        str, Parameter(help="quick (a minute), marks (the project's own), full (hours), or options (of our LSTM).")
    ] = "quick",
    cells: Annotated[str | None, Parameter(help="Cells, separated by commas (default: lstm,gru,rnn).")] = None,
    modes: Annotated[str | None, Parameter(help="train, infer, or both (default: train,infer).")] = None,
    threads: Annotated[
        str | None, Parameter(help="Numbers of threads, separated by commas (default: 2; of full: 1,2).")
    ] = None,
    options: Annotated[
        str | None, Parameter(help="With --grid options, some of: layer_norm,recurrent_dropout,zoneout,lengths.")
    ] = None,
    kernel: Annotated[str, Parameter(help="Force one of our kernels; doctor lists them.")] = "auto",
    isa: Annotated[Literal["avx2"] | None, Parameter(help="Hold PyTorch and us to these vector instructions.")] = None,
    neighbour: Annotated[
        bool, Parameter(help="Measure beside a process that keeps a core busy.", negative="", show_default=False)
    ] = False,
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

    Ratios, spreads, share of the rate of a large matrix product.
    """
    from longshort import machine

    if profile:
        if what != "train" or out is not None:
            raise UsageError("--profile is for bench train, and prints a table: --out does not go with it.")
        if grid != "quick" or cells or modes or options or isa or worst or neighbour or kernel != "auto":
            raise UsageError("--profile goes with --threads and --json only.")
        _profile(_threads_of_workloads(threads), json)
        return
    if what != "layers":
        given = {
            "grid": grid != "quick",
            "cells": cells,
            "modes": modes,
            "options": options,
            "isa": isa,
            "worst": worst,
        }
        given |= {"kernel": kernel != "auto", "neighbour": neighbour}
        _bench_workloads(what, [name for name, value in given.items() if value], threads, out, json)
        return
    if worst is not None and worst < 1:
        raise UsageError(f"--worst must be at least 1, not {worst}.")
    if out == "":
        raise UsageError("--out is empty.", "An unset shell variable looks like this.")
    named: dict[str, Any] = {
        "cells": tuple(_names(cells)),
        "modes": tuple(_names(modes)),
        "options": tuple(_names(options)),
    }
    numbers = tuple(_whole(word, "--threads") for word in _names(threads))
    _need_torch("bench")
    if isa is not None:
        machine.hold_to(isa)
    from longshort import benchmarks, screen

    how: dict[str, Any] = {"threads": numbers, "kernel": kernel, "isa": isa, "neighbour": neighbour}
    settings = benchmarks.Settings(grid=grid, **named, **how)
    with screen.Ticker() as ticker:
        result = benchmarks.result(settings, _path(out), ticker.report_case)
    if json:
        _print_json(result)
    else:
        screen.print_benchmark(result, worst)


def _bench_workloads(what: str, refused: list[str], threads: str | None, out: str | None, json: bool) -> None:
    if refused:
        raise UsageError(f"--{refused[0]} goes with bench layers, not with bench {what}.", "Leave it out.")
    number = _threads_of_workloads(threads)
    if out == "":
        raise UsageError("--out is empty.", "An unset shell variable looks like this.")
    _need_torch("bench")
    from longshort import ledger, screen, workloads

    if out is not None:
        durable.require_writable_directory(Path(out).absolute().parent)
    with screen.Ticker() as ticker:
        result = workloads.result(what, number, ticker.report_workload)
    if out is not None:
        ledger.write(Path(out), result)
    if json:
        _print_json(result)
    else:
        screen.print_workloads(result)


def _threads_of_workloads(given: str | None) -> int:
    number = _whole(given or "2", "--threads")
    if not 1 <= number <= 1024:
        raise UsageError(f"--threads must be from 1 to 1024, not {number}.")
    return number


def _profile(threads: int, json: bool) -> None:
    _need_torch("bench")
    from longshort import native, screen, workloads

    if not native.targets():
        raise UsageError(f"--profile shows what our kernels take. {native.reason()}")
    with screen.Ticker() as ticker:
        found = workloads.profiles(threads, ticker.report_profile)
    if json:
        _print_json({"threads": threads, "seconds": dict(found)})
    else:
        screen.print_profiles(found)


@app.command
def doctor(*, json: Json = False) -> None:
    """Say what this machine has, which kernels run, what is missing and how to get it."""
    from longshort import machine, screen

    report = machine.description()
    report["kernels"] = list(longshort.kernels.available()) if machine.version_of("torch") else []
    report["advice"] = machine.advice()
    if json:
        _print_json(report)
    else:
        screen.print_doctor(report)


# --------------------------------------------------------------------------------------------- what they share


def _train(settings: Mapping[str, Any], minutes: float | None) -> Path:
    """Train with everything that is set, show it, and return the run directory."""
    _need_torch("train")
    from longshort import checkpoint, processes, recipes, screen, training
    from longshort.text import corpus

    config = TrainConfig.from_dict(settings)
    if config.out == "":
        raise UsageError("--out is empty.", "An unset shell variable looks like this.")
    if config.out is not None:
        checkpoint.require_new_run(config.out)
    texts = corpus.keep_standard_input(config.texts)
    if texts != config.texts:
        kept = next(path for path, before in zip(texts, config.texts, strict=True) if path != before)
        _say(f"What standard input gave is kept for the run: {kept}")
        settings = {**settings, "texts": texts}
        config = TrainConfig.from_dict(settings)
    prepared = None
    with processes.join() as team, Interruption() as interruption:
        if minutes is not None and team.size > 1:
            raise UsageError("--minutes measures one process, and here are several.", "Give --steps and sizes instead.")
        if minutes is not None:
            begin = time.perf_counter()
            recipes.check_budget(minutes, settings)
            _say(f"Measuring this machine for a run of {minutes:g} minute{'' if minutes == 1 else 's'} ...")
            prepared = training.Prepared(config)
            plan = recipes.plan(minutes, settings, prepared, since=begin)
            config = plan.config
            _say(screen.describe_plan(plan))
        return _show(training.train(config, prepared, interruption.wanted, team), interruption)


def _follow() -> int:
    """Train under the lead of process 0, silently, and return the exit status: it knows what is to be done."""
    _need_torch("train")
    from longshort import processes, training

    with processes.join() as team, Interruption() as interruption, interruption.deferred():
        return training.follow(team, interruption.wanted)


def _show(events: Generator[Any, None, None], interruption: Interruption) -> Path:
    """Show a training run as it goes on, and return its directory; Interrupted where it was stopped and has saved."""
    from longshort import screen, training

    run = Path()
    with screen.TrainView() as view, contextlib.closing(events):
        started = next(events)
        with interruption.deferred():
            for event in itertools.chain((started,), events):
                view.show(event)
                run = event.run if isinstance(event, training.Started) else run
    if isinstance(event, training.Stopped):
        place = shlex.quote(str(run))
        saved = f"step {event.step:,} of {event.steps:,} is saved. Go on with: {_launcher()} resume {place}"
        words = f"stopped; {saved if event.step else 'no step was made.'}"
        raise Interrupted(interruption.signal or signal.SIGTERM, words)  # of another process, if not of this one
    return run


def _say_next(run: Path) -> None:
    from longshort import training

    place = shlex.quote(str(run))
    use = f"score {place} FILE --top 5" if training.run_config(run).lines else f"generate {place}"
    _say(f"Next: {_program()} {use}    {_program()} eval {place} --split valid")


def _pieces(
    model: str | Path,
    prompt: str,
    length: int,
    settings: Mapping[str, Any],
    stop: tuple[str, ...] = (),
    streams: Iterable[int] = (0,),
    weights: str = "float32",
    state: str | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (number, piece) of what `model` writes, a text for each of the streams."""
    from longshort.continuation import Continuation
    from longshort.generation import Request, Sampling, generate_many

    rest: dict[str, Any] = {"prompt": prompt, "length": length, "sampling": Sampling(**settings), "stop": stop}
    loaded = _decoder(model) if weights == "float32" else _rounded(model, weights)
    if state is not None:
        durable.require_writable_directory(Path(state).parent)
        rest["after"] = Continuation.load(state, loaded) if os.path.lexists(state) else None
    requests = [Request(**rest, stream=stream) for stream in streams]
    ends: dict[int, Continuation] = {}
    unseen = sorted({c for c in prompt if (loaded.tokenizer.encode(c) == loaded.tokenizer.size).any()})
    pieces = generate_many(loaded, loaded.tokenizer, requests, None if state is None else ends)
    if unseen and len(unseen) < len(set(prompt)):
        shown = ", ".join(repr(c) for c in unseen[:8])
        _say(f"longshort: the model never saw {shown}{' ...' if len(unseen) > 8 else ''}; read as <unk>.")
    yield from pieces
    if state is not None:
        ends[0].save(state, loaded)


def _generate_to_screen(
    model: str | Path,
    prompt: str,
    length: int,
    settings: Mapping[str, Any],
    stop: tuple[str, ...] = (),
    stream: int = 0,
    weights: str = "float32",
    state: str | None = None,
) -> None:
    from longshort.screen import visible

    started = False
    pieces = _pieces(model, prompt, length, settings, stop, (stream,), weights, state)
    for _, piece in itertools.chain(pieces, ((0, ""),)):
        sys.stdout.write(visible(piece if started else prompt + piece))
        sys.stdout.flush()
        started = True
    print(flush=True)


def _decoder(model: str | Path) -> Any:
    """Return the torch-free decoder of `model`, or where only PyTorch can run its cell, a `LanguageModel`."""
    from longshort.decoder import load_decoder

    try:
        return load_decoder(model)
    except UsageError:
        loaded = _language_model(model)
        if loaded is None:
            raise
        return loaded


def _reader(model: str | Path) -> Any:
    """Return what reads texts quickest: a decoder on native kernels, else PyTorch, else a decoder on NumPy."""
    loaded = _decoder(model)
    return loaded if getattr(loaded, "writes", True) else _language_model(model) or loaded


def _rounded(model: str | Path, weights: str) -> Any:
    """Return a decoder with rounded weights, and say what they cost."""
    from longshort.decoder import load_decoder
    from longshort.generation import cost_in_bits

    exact = load_decoder(model)
    loaded = exact.rounded(weights)
    cost = cost_in_bits(exact, loaded)
    _say(f"longshort: {weights} weights cost {cost:.4f} bits a character (on 16 texts that the model wrote).")
    return loaded


def _language_model(model: str | Path) -> Any:
    """Return the `LanguageModel` at `model`; None where PyTorch is not installed."""
    from longshort.machine import version_of

    if version_of("torch") is None:
        return None
    from longshort.model import load_language_model

    return load_language_model(model)


def _need_torch(verb: str) -> None:
    from longshort.machine import version_of

    if version_of("torch") is None:
        raise MissingExtraError("PyTorch", "train", f"longshort {verb}")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _program() -> str:
    """Return what a user types to run this program, which may not be on their PATH, as in a fresh clone's .venv."""
    if shutil.which("longshort") or Path(sys.argv[0]).name != "longshort":
        return "longshort"
    return shlex.quote(min(sys.argv[0], os.path.relpath(sys.argv[0]), key=len))


def _launcher() -> str:
    """Return what starts this program as it was started, with as many processes."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return _program() if number == "1" else f"torchrun --nproc-per-node {number} -m longshort"


def _cell(given: str | None) -> str:
    """Return the name of a cell, which if it is one of the user's own is loaded from its file."""
    if given is None or not is_own_cell(given):
        return given or ""
    _need_torch("--cell FILE.py:NAME")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("A cell of your own trains in one process.", "Start it without torchrun.")
    from longshort import own_cells

    return own_cells.load_cell(given)


def _path(given: str | None) -> Path | None:
    return Path(given) if given is not None else None


def _names(given: str | None) -> list[str]:
    """Return what a list of names holds; nothing if none was given."""
    if given is None:
        return []
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UsageError(f"A list of names separated by commas was wanted, not {given!r}.")
    return names


def _whole(word: str, flag: str) -> int:
    if not word.isdecimal():
        raise UsageError(f"{flag} takes whole numbers separated by commas, not {word!r}.")
    return int(word)


def _check_plot(path: str) -> None:
    """Refuse a picture that could not be written after the runs have taken their minutes."""
    from longshort.machine import version_of

    if version_of("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot", "A picture")
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"The picture {path!r} has an unknown format.", "End its name in .png, .svg or .pdf.")
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a directory" if Path(path).is_dir() else "its directory is missing or read-only"
        raise OutputError(f"The picture {path!r} cannot be written: {reason}.", "Choose another --plot.")


def _print_json(content: Mapping[str, Any]) -> None:
    print(json.dumps({"format_version": 1, **content}, indent=2, allow_nan=False))


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _complain(words: str) -> None:
    """Print an error: control characters made visible, three lines at most."""
    from longshort.screen import visible

    name = f"longshort (process {_RANK})" if _RANK else "longshort"
    lines = [line for line in visible(words).split("\n") if line.strip()]
    _say("\n".join([f"{name}: {lines[0]}", *lines[1:3]]) if lines else f"{name}: failed")


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    # Before PyTorch is loaded: a waiting thread spins briefly, then sleeps. GNU OpenMP's own choice (300,000 turns) is
    # ruinous beside a busy process, not spinning at all costs half the speed on a quiet machine (docs/log.md).
    # `bench` leaves it: PyTorch's layers are measured as their other users have them.
    given = sys.argv[1:] if arguments is None else arguments
    verb = given[:1]
    if verb in (["train"], ["eval"], ["score"]):  # the parser would take a lone hyphen for a flag without a name
        given = ["/dev/stdin" if word == "-" else word for word in given]
    if "OMP_WAIT_POLICY" not in os.environ and verb != ["bench"]:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_args, **_kwargs: _complain(f"warning: {message}")
    try:
        # Of the processes that torchrun has started, the first one knows the command; the others do as it says.
        if verb in (["train"], ["resume"], ["demo"]) and _RANK and os.environ.get("WORLD_SIZE", "1") != "1":
            return _follow()
        app(given, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _complain(f"{error}\nSee: longshort --help")
        return 2
    except LongshortError as error:
        _complain(str(error))
        return error.exit_code
    except Interrupted as error:
        _say(f"longshort: {error.words}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("longshort: interrupted.")
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has had enough. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no exception of its own for this on a CPU.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        _complain("There is not enough memory.\nUse a smaller text, --batch-size, --seq-len or --hidden.")
        return 1
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename or ''}")
        return 1
    return 0
