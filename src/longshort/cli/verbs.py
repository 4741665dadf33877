"""The command line: one function a verb (`generate` is in `writing.py`, `inspect` in `inspecting.py`, `compare` and
`bench` in `measuring.py`).

Exit status: 0 done, 1 failure, 2 usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, ArgumentCollection, Group, Parameter

import longshort
from longshort import durable
from longshort.cli import console, inspecting, measuring, models, writing
from longshort.cli.flags import Corpus, DataDir, Int, Json, OwnCell, TrainFlags, Weights
from longshort.config import TrainConfig, flag_of
from longshort.errors import LongshortError, MissingExtraError, UsageError
from longshort.interruption import Interrupted, Interruption


def _refuse_empty(arguments: ArgumentCollection) -> None:
    """Refuse a flag whose value is empty, before any work starts; only a prompt may be."""
    for argument in arguments:
        given = [token.value for token in argument.tokens if token.keyword and token.implicit_value is cyclopts.UNSET]
        if "" in given and argument.name != "--prompt":
            raise console.empty(argument.name)


app = App(
    name="longshort",
    version=longshort.__version__,
    help="Train and run small LSTM, GRU and RNN language models on an ordinary CPU.",
    result_action="return_value",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    group_parameters=Group("Parameters", validator=_refuse_empty),
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

    console.say("A character model learns English from Python's own documentation, which is on this machine already.")
    path = Path(out) if out is not None else loop.free_directory("longshort-demo")
    run = _train({"corpus": "builtin", "out": str(path)}, minutes)
    console.say("\nWhat it writes, given the first words:\n")
    for number, prompt in enumerate(("The ", "If the argument ", "class ")):
        writing.to_screen(run, prompt, 200, {"temperature": 0.7}, stream=number)
        print(flush=True)
    place, me = shlex.quote(str(run)), console.program()
    console.say("Next:")
    for command, meaning in (
        (f"{me} generate {place} --prompt 'The ' --temperature 0.5", "more, at a lower temperature"),
        (f"{me} eval {place} --split valid", "the held-out figure once more"),
        (f"{me} inspect {place} --corpus builtin", "its gates, and which unit follows what"),
        (f"{me} serve {place}", "both in a browser"),
        (f"{me} train MY-TEXT.txt --minutes 5", "a model of your own text"),
        (f"{me} compare --recipe lecture", "RNN, GRU and LSTM, from scratch and from the library"),
    ):
        console.say(f"  {command:<{len(me) + 58}} {meaning}")


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
    toml = recipes.load_toml(config) if config is not None else {}
    for source in (given, toml):
        if source.get("cell") is not None:
            source["cell"] = console.load_cell(str(source["cell"]))
    settings = recipes.combine(given, toml, recipe)
    if recipe is not None and minutes is not None:
        raise UsageError(f"--recipe {recipe} says how long it trains: --minutes does not go with it.")
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
    console.load_own_cell(cell)
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}.")
    console.need_torch("resume")
    from longshort import processes, training

    with (
        processes.join() as team,
        Interruption() as interruption,
        contextlib.closing(training.resume(run, steps, text, data_dir, interruption.wanted, team)) as events,
    ):
        _show(next(events), events, interruption)
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

    console.load_own_cell(cell)
    if lanes is not None and lanes < 1:
        raise UsageError(f"--lanes must be at least 1, not {lanes}.")
    if block is not None and not 1 <= block <= _LONGEST_BLOCK:
        raise UsageError(f"--block must be from 1 to {_LONGEST_BLOCK}, not {block}.")
    if dynamic and (block or lanes):
        raise UsageError("--dynamic reads the text in order, once: --block and --lanes do not go with it.")
    if rate is not None and not dynamic:
        raise UsageError("--rate is how fast a model learns while it reads.", "Add --dynamic.")
    if dynamic:
        console.need_torch("eval --dynamic")
    load = models.language_model if dynamic else models.reader
    if split is not None:
        if text or corpus:
            raise UsageError("--split valid is the run's own text; TEXT and --corpus do not go with it.")
        if not checkpoint.is_run(Path(model)):
            raise UsageError(f"{model} is not a run, so it has no held-out part.", "Give a TEXT, or a run directory.")
        console.need_torch("eval --split")
        from longshort import training

        config = training.run_config(Path(model))
        if config.lines and (block or lanes):
            raise UsageError(f"{model} was trained on lines: --block and --lanes do not go with --split valid.")
        console.set_threads(config.threads)
        reader = load(model)
        part, name = training.heldout_part(Path(model), reader.tokenizer, console.path(data_dir)), "held-out part"
        sha256 = checkpoint.open_run(model).config()["text_sha256"]
        lanes = lanes or (config.eval_lanes if block is None else None)
    else:
        with corpora.standard_input_kept(text) as texts:
            source = corpora.find(texts, corpus, console.path(data_dir))
            reader = load(model)
            lines = reader.config.lines and not block and not lanes
            survey = encoding.survey(source)
            part = encoding.encode(source, survey, reader.tokenizer, 0, lines)[1]
            name, sha256 = source.name, survey.sha256
    if dynamic:
        from longshort.dynamic import Learning, evaluate_dynamically

        found = evaluate_dynamically(reader, part, Learning() if rate is None else Learning(rate=rate))
    else:
        found = evaluate(reader, reader.tokenizer, part, lanes=lanes, block=block)
    from longshort.cli import screen

    if json:
        console.print_json({"model": model, "text": name, "text_sha256": sha256, **found.to_dict()})
        return
    print(f"{found.nats_per_token:.4f} nats a token   {found.bits_per_character:.4f} bits a character   ", end="")
    print(f"{found.bits_per_byte:.4f} bits a byte   perplexity {found.perplexity:.4f}")
    print(f"{found.tokens:,} tokens of {name}{screen.left_out(found.skipped)}; {found.protocol}")


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
    weights: Weights = "float32",
    cell: OwnCell = None,
    json: Annotated[
        bool, Parameter(help="Print a JSON object a line and nothing else.", negative="", show_default=False)
    ] = False,
) -> None:
    """Say how odd each line is: bits per character, each line from a zero state, in the order of the file."""
    from longshort import scoring
    from longshort.cli import screen
    from longshort.text import corpus

    console.load_own_cell(cell)
    if top is not None and top < 1:
        raise UsageError(f"--top must be at least 1, not {top}.")

    def lines() -> Iterator[str]:
        for line in corpus.lines(file):
            yield line
            sys.stdout.flush()  # before more is waited for: a live log is answered also into a pipe

    scored = scoring.score(models.decoder(model, weights), lines(), ahead=ahead)
    for found in scored if top is None else scoring.oddest(scored, top):
        if json:
            print(console.as_json(found.to_dict()))
        elif top is None:
            print(f"{found.bits_per_character:.4f}")
        else:
            print(screen.marked_line(found, colour=sys.stdout.isatty()))


@app.command
def export(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *,
    out: Annotated[str | None, Parameter(help="The file (default: the model's name with .onnx, here).")] = None,
    json: Json = False,
) -> None:
    """Write a model as an ONNX file, which other runtimes run without longshort, and compare both."""
    from longshort import onnx_files

    path = Path(out) if out is not None else Path(f"{Path(model).resolve().name}.onnx")
    if path.suffix != ".onnx":
        raise UsageError(f"The file is written as ONNX, not {str(path)!r}.", "End the name of --out in .onnx.")
    found = onnx_files.export_onnx(onnx_files.load(model), path)
    if json:
        console.print_json({"model": model, **found.to_dict()})
        return
    print(f"{found.file}: {found.bytes / 1e6:.1f} MB, ONNX operators of version {found.opset}")
    for kind, arrays in (("in", found.inputs), ("out", found.outputs)):
        print(f"{kind:<4}", ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in arrays.items()))
    if found.checked_with is None:
        console.say("longshort: not compared with the model, as there is no runtime: pip install onnxruntime")
    else:
        print(f"{found.checked_with} gives the same, to {found.largest_difference:.1e}.")


@app.command
def publish(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *,
    out: Annotated[
        str | None, Parameter(help="Directory to make (default: the model's name with -model, here).")
    ] = None,
    weights: Annotated[
        Literal["float32", "float16"], Parameter(help="As they are written; float16 is half as large.")
    ] = "float32",
    json: Json = False,
) -> None:
    """Write a model as a directory to hand on: weights, tokenizer, checksums, and a card that says what it is."""
    from longshort import publication
    from longshort.decoder import load_decoder

    path = Path(out) if out is not None else Path(f"{Path(model).resolve().name}-model")
    publication.publish(model, path, weights=weights)
    size = sum(file.stat().st_size for file in path.iterdir())
    if json:
        console.print_json({"model": model, "out": str(path), "weights": weights, "bytes": size})
        return
    print(f"{path}: {size / 1e6:.1f} MB; {path / 'README.md'} says what it is: read it, and add what is missing.")
    if weights != "float32":
        with contextlib.suppress(UsageError):  # of what only PyTorch can run, and of models that label, it is not known
            exact = load_decoder(model)
            if exact.writes:
                models.tell_cost(exact, load_decoder(path), weights)


@app.command
def serve(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *,
    host: Annotated[
        str, Parameter(help="Address to listen on. Any but this machine's own wants a token in LONGSHORT_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[Int, Parameter(help="0 for one that is free.")] = 8000,
    allow_host: Annotated[
        tuple[str, ...], Parameter(help="A name under which it is asked; may be given several times.", negative="")
    ] = (),
    weights: Weights = "float32",
    cell: OwnCell = None,
) -> None:
    """Answer over HTTP, in the shape of OpenAI's completions, and with a page that writes and looks inside."""
    from longshort.machine import version_of

    for package in ("FastAPI", "uvicorn"):
        if version_of(package.lower()) is None:
            raise MissingExtraError(package, "serve", "longshort serve")
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, not {port}.")
    console.load_own_cell(cell)
    from longshort.serving import server

    rules = server.rules(host, allow_host)
    loaded = models.decoder(model, weights)
    name = os.fsencode(Path(model).resolve().name).decode("utf-8", "replace")  # JSON holds no other bytes
    with Interruption() as interruption, interruption.deferred():
        server.serve(
            loaded, name, host, port, rules, interruption, lambda address: console.say(f"{name} answers at {address}")
        )
    raise Interrupted(interruption.signal or signal.SIGTERM, "stopped.")


app.command(writing.generate)
app.command(inspecting.inspect)
app.command(measuring.compare)
app.command(measuring.bench)


@app.command
def doctor(*, json: Json = False) -> None:
    """Say what this machine has, which kernels run, what is missing and how to get it."""
    from longshort import machine, native
    from longshort.cli import tables

    kernels = list(longshort.kernels.available()) if machine.version_of("torch") else []
    report = machine.description()  # after PyTorch is there, whose threads the kernels then run in
    report["handover_seconds"] = native.handover()
    report["kernels"] = kernels
    report["advice"] = machine.advice()
    if json:
        console.print_json(report)
    else:
        tables.print_doctor(report)


# --------------------------------------------------------------------------------------------- what they share


def _train(settings: Mapping[str, Any], minutes: float | None) -> Path:
    """Train with everything that is set, show it, and return the run directory."""
    console.need_torch("train")
    from longshort import checkpoint, processes, recipes, training
    from longshort.cli import screen
    from longshort.text import corpus

    config = TrainConfig.from_dict(settings)
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == "":  # as a TOML file may have it
            raise console.empty(flag_of(field))
    if config.out is not None:
        checkpoint.require_new_run(config.out)
    else:
        durable.require_writable_directory(Path.cwd())
    run: Path | None = None
    prepared = None
    with (
        corpus.standard_input_kept(config.texts, lambda: run is not None and checkpoint.is_run(run)) as texts,
        processes.join() as team,
        Interruption() as interruption,
    ):
        if texts != config.texts:
            kept = next(path for path, before in zip(texts, config.texts, strict=True) if path != before)
            console.say(f"What standard input gave is kept for the run: {kept}")
            settings = {**settings, "texts": texts}
            config = TrainConfig.from_dict(settings)
        if minutes is not None and team.size > 1:
            raise UsageError("--minutes measures one process, and here are several.", "Give --steps and sizes instead.")
        if minutes is not None:
            begin = time.perf_counter()
            recipes.check_budget(minutes, settings)
            console.say(f"Measuring this machine for a run of {minutes:g} minute{'' if minutes == 1 else 's'} ...")
            prepared = training.Prepared(config)
            plan = recipes.plan(minutes, settings, prepared, since=begin)
            config = plan.config
            console.say(screen.describe_plan(plan))
        with contextlib.closing(training.train(config, prepared, interruption.wanted, team)) as events:
            started: Any = next(events)
            run = started.run
            _show(started, events, interruption)
            return run


def _follow() -> int:
    """Train under the lead of process 0, silently, and return the exit status: it knows what is to be done."""
    console.need_torch("train")
    from longshort import processes, training

    with processes.join() as team, Interruption() as interruption, interruption.deferred():
        return training.follow(team, interruption.wanted)


def _show(started: Any, events: Iterator[Any], interruption: Interruption) -> None:
    """Show a training run as it goes on, from its first event; Interrupted where it was stopped and has saved."""
    from longshort import training
    from longshort.cli import screen

    with screen.TrainView() as view, interruption.deferred():
        for event in itertools.chain((started,), events):
            view.show(event)
    if isinstance(event, training.Stopped):
        place = shlex.quote(str(started.run))
        saved = f"step {event.step:,} of {event.steps:,} is saved. Go on with: {console.launcher()} resume {place}"
        words = f"stopped; {saved if event.step else 'no step was made.'}"
        raise Interrupted(interruption.signal or signal.SIGTERM, words)  # of another process, if not of this one


def _say_next(run: Path) -> None:
    from longshort import training

    place, me, config = shlex.quote(str(run)), console.program(), training.run_config(run)
    use = f"score {place} FILE --top 5" if config.lines else f"generate {place}"
    more = f"    {me} eval {place} --split valid" if config.heldout else ""
    console.say(f"Next: {me} {use}{more}")


_LONGEST_BLOCK = 2**31 - 1
"""More would be more than any text has; products with it stay below 2**63."""


def _with_standard_input(verb: str, words: list[str]) -> list[str]:
    """Return the words of a verb with `/dev/stdin` for `-` where that is a text, not the value of a flag.

    The parser would take a lone hyphen for a flag without a name.
    """
    if "-" not in words:
        return words
    flags = app[verb].assemble_argument_collection()

    def takes_a_value(word: str) -> bool:
        try:
            return word.startswith("--") and flags.match(word)[2] is cyclopts.UNSET
        except ValueError:  # no flag of this verb
            return False

    before = ["", *words]
    return [
        "/dev/stdin" if word == "-" and not takes_a_value(last) else word
        for last, word in zip(before, words, strict=False)
    ]


@console.streams()
def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    # Before PyTorch is loaded: a waiting thread spins briefly, then sleeps. GNU OpenMP's own choice (300,000 turns) is
    # ruinous beside a busy process, not spinning at all costs half the speed on a quiet machine (docs/log.md).
    # `bench` leaves it: PyTorch's layers are measured as their other users have them.
    given = sys.argv[1:] if arguments is None else arguments
    verb = given[:1]
    if verb in (["train"], ["eval"], ["score"], ["inspect"]):
        given = _with_standard_input(verb[0], given)
    if "OMP_WAIT_POLICY" not in os.environ and verb != ["bench"]:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_args, **_kwargs: console.complain(f"warning: {message}")
    try:
        # Of the processes that torchrun has started, the first one knows the command; the others do as it says.
        if verb in (["train"], ["resume"], ["demo"]) and console.RANK and os.environ.get("WORLD_SIZE", "1") != "1":
            return _follow()
        app(given, exit_on_error=False, print_error=False)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except cyclopts.CycloptsError as error:
        page = ["longshort", *(verb if verb and verb[0] in app else ()), "--help"]
        console.complain(f"{error}\nSee: {' '.join(page)}")
        return 2
    except LongshortError as error:
        console.complain(str(error))
        return error.exit_code
    except Interrupted as error:
        console.say(f"longshort: {error.words}")
        return error.exit_code
    except KeyboardInterrupt:
        console.say("longshort: interrupted.")
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has had enough. Nothing more can be written, not even at exit.
        console.give_up(sys.stdout)
        return 0
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no exception of its own for this on a CPU.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        console.complain("There is not enough memory.\nUse a smaller text, --batch-size, --seq-len or --hidden.")
        return 1
    except OSError as error:
        console.complain(f"{error.strerror or error}: {error.filename or ''}")
        try:
            sys.stdout.flush()
        except OSError:  # it is what cannot be written
            console.give_up(sys.stdout)
        return 1
    return 0
