"""What the command line shows while it works: live progress on a terminal, plain lines elsewhere.

Everything that a model or a file can put into a line goes through `visible` first.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longshort.config import flag_of

if TYPE_CHECKING:
    from longshort.bench.grids import Case
    from longshort.bench.ledger import Row as BenchmarkRow
    from longshort.bench.workloads import Row as WorkloadRow
    from longshort.comparison import Row
    from longshort.config import TrainConfig
    from longshort.depth import Row as Stack
    from longshort.recipes import Plan
    from longshort.scoring import LineScore
    from longshort.training import Event, Finished, Looked, Progress, Skipped, Started

_SAMPLE_CHARACTERS = 240
_SECONDS_BETWEEN_SAMPLES = 2.0
_PICTURES = {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\n\t"}
_PICTURES |= {0x7F: "\N{SYMBOL FOR DELETE}"}
# C1 controls, and marks that turn the direction of writing: a terminal obeys them, so they are replaced.
_PICTURES |= dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}"
)


def visible(text: str) -> str:
    """Return `text` with every control character but newline and tab replaced by a picture of it."""
    return text.translate(_PICTURES)


def marked_line(found: LineScore, colour: bool) -> str:
    """Return the score of a line, its number and its text, the odd part marked by colour or by >>> and <<<."""
    from longshort.scoring import odd_part

    start, end = odd_part(found)
    opened, closed = ("\x1b[1;31m", "\x1b[0m") if colour else (">>>", "<<<")
    parts = [visible(part).replace("\n", "␊") for part in (found.text[:start], found.text[start:end], found.text[end:])]
    return f"{found.bits_per_character:8.4f}  {found.line:>7}  {parts[0]}{opened}{parts[1]}{closed}{parts[2]}"


def describe_model(event: Started) -> str:
    """Return a line on the text and a line on the model."""
    config, text = event.config, event.text
    symbols = "one-hot" if not config.embedding else f"embedding {config.embedding}"
    epochs = (config.steps or 0) / event.steps_per_epoch
    parameters = f"{event.model.num_parameters:,} parameters"
    return (
        f"{visible(text.name)}: {text.characters:,} characters, {event.train_tokens:,} tokens to train on, "
        f"{event.tokenizer.size} symbols, SHA-256 {text.sha256[:12]}\n"
        f"{config.cell.upper()} {config.layers} x {config.hidden}, {symbols}, {parameters};\n"
        f"{config.steps:,} steps of {config.batch_size} x {config.seq_len} ({epochs:.1f} epochs), "
        f"{config.threads} thread{'' if config.threads == 1 else 's'}{_processes(event)}; "
        f"{visible(str(event.run))}{_origin(event)}"
    )


def _processes(event: Started) -> str:
    return f" in each of {event.processes} processes" if event.processes > 1 else ""


def _origin(event: Started) -> str:
    """Return a line on where training starts from, if not from new weights."""
    config, words = event.config, []
    if event.resumed_at is not None and event.resumed_at >= (config.steps or 0):
        words.append("has made all its steps; a larger --steps goes on from there")
    elif event.resumed_at is not None:
        words.append(f"goes on after step {event.resumed_at:,}")
    elif config.from_model is not None:
        words.append(f"starts from {visible(config.from_model)}")
        if event.unknown_tokens:
            words.append(f"{event.unknown_tokens:,} tokens outside its vocabulary are read, never predicted")
    if event.vectors is not None:
        found = f"{event.vectors:,} of {event.tokenizer.size:,} symbols begin with a vector of"
        words.append(f"{found} {visible(str(config.vectors))}{', which stays' if config.freeze_embedding else ''}")
    return "\n" + "; ".join(words) if words else ""


def describe_plan(plan: Plan) -> str:
    """Return what the dial measured, what it chose, and the command that repeats it without measuring."""
    config = plan.config
    sizes = ", ".join(f"{hidden}: {1000 * seconds:.0f} ms" for hidden, seconds in plan.seconds_per_step.items())
    return (
        f"A step by hidden units: {sizes}. Chosen: {config.hidden} units, {config.steps:,} steps.\n"
        f"The same run again: {command_of(config)}"
    )


def command_of(config: TrainConfig) -> str:
    """Return the command that trains as `config` says: its texts, and every option that is not the default."""
    words = ["longshort", "train", *config.texts]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("texts", "out"):
            words += [flag_of(field)] if value is True else [flag_of(field), str(value)]
    return visible(shlex.join(words))


class TrainView:
    """Shows a training run: a live display on a terminal, otherwise a line now and then. Use as a context."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._started: Started | None = None
        self._progress: Progress | None = None
        self._looked: Looked | None = None
        self._sample = ""
        self._next_sample = 0.0
        self._last_line = 0.0

    def __enter__(self) -> TrainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, event: Event) -> None:
        """Show one event."""
        from longshort import training

        if isinstance(event, training.Started):
            self._started = event
            self._console.print(describe_model(event), markup=False)
            if self._console.is_terminal:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
        elif isinstance(event, training.Progress):
            self._progress = event
        elif isinstance(event, training.Looked):
            self._looked = event
        elif isinstance(event, training.Skipped):
            self._console.print(_skipped(event))
        if isinstance(event, training.Finished | training.Stopped):
            self.__exit__(None, None, None)
            if isinstance(event, training.Finished):
                self._console.print(self._last_words(event), markup=False)
        elif self._live is not None:
            self._write_sample()
            self._live.update(self._display(), refresh=True)
        elif not isinstance(event, training.Started):
            self._write_line(event)

    def _write_sample(self) -> None:
        """Sample anew from the model in training, now and then; no random number of the training is used."""
        from longshort.generation import Sampling, generate

        started = self._started
        begin = time.monotonic()
        if started is None or self._progress is None or begin < self._next_sample:
            return
        sampling = Sampling(temperature=0.7, seed=self._progress.step)
        self._sample = "".join(generate(started.model, started.tokenizer, "", _SAMPLE_CHARACTERS, sampling))
        # Sampling takes time from the training: at most a thirtieth of it.
        self._next_sample = time.monotonic() + max(_SECONDS_BETWEEN_SAMPLES, 30 * (time.monotonic() - begin))

    def _display(self) -> Group:
        progress, looked, started = self._progress, self._looked, self._started
        if progress is None or started is None:
            return Group(Text("first steps ..."))
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=progress.steps, completed=progress.step, width=30)
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
        table.add_row(bar, f"{progress.step:,}/{progress.steps:,}", speed, f"{_clock(progress.seconds_left)} left")
        words = Text(f"training {_figures(progress.nats_per_token)}")
        if looked is not None:
            words.append(f"   held-out {_figures(looked.heldout.nats_per_token)} at step {looked.step:,}")
        return Group(table, words, Text(), Text(visible(self._sample), style="dim"))

    def _write_line(self, event: Event) -> None:
        from longshort import training

        if isinstance(event, training.Looked):
            mark = "  best so far" if event.best else ""
            self._console.print(f"step {event.step:,}: held-out {_figures(event.heldout.nats_per_token)}{mark}")
        elif isinstance(event, training.Progress) and time.monotonic() - self._last_line >= 5:
            self._last_line = time.monotonic()
            self._console.print(
                f"step {event.step:,}/{event.steps:,}: training {_figures(event.nats_per_token)}  "
                f"{event.tokens_per_second:,.0f} tokens/s  {_clock(event.seconds_left)} left"
            )

    def _last_words(self, event: Finished) -> str:
        early = " (stopped early)" if event.stopped_early else ""
        words = f"{event.step:,} steps{early} in {_clock(event.seconds)}"
        words += "." if event.heldout is None else f"; the best weights are of step {event.best_step:,}."
        if event.heldout is not None:
            h = event.heldout
            words += (
                f"\nheld-out: {h.nats_per_token:.4f} nats a token, {h.bits_per_character:.4f} bits a character, "
                f"perplexity {h.perplexity:.4f}\n({h.tokens:,} tokens{left_out(h.skipped)}; {h.protocol})"
            )
        return words


def left_out(skipped: int) -> str:
    """Return what is said of symbols that a figure leaves out, as the model cannot predict them."""
    return f", without {skipped:,} outside the vocabulary" if skipped else ""


def _skipped(event: Skipped) -> str:
    return (
        f"step {event.step:,} was skipped: the loss is {event.nats_per_token:g} and the gradients' norm "
        f"{event.gradient_norm:g} ({event.skipped_steps} skipped so far)"
    )


class Ticker:
    """Says on standard error how far `compare` or `bench` is: a line that is overwritten, or off a terminal lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._console.file.write("\r\x1b[K")

    def report(self, row: Row, epoch: int, epochs: int) -> None:
        """Say how far one run of `compare` is."""
        words = (
            f"{row.implementation} {row.cell} seed {row.seed}: epoch {epoch}/{epochs}, perplexity {row.curve[-1]:.3f}"
        )
        self._say(words, last=epoch == epochs)

    def report_depth(self, row: Stack, percent: int) -> None:
        """Say how far one stack of `compare --recipe depth` is."""
        bits = f", {row.curve[-1][1]:.3f} bits a character" if row.curve else ""
        words = f"{row.cell}, {row.layers} x {row.hidden}, {row.kind}, seed {row.seed}: {percent} %{bits}"
        self._say(words, last=percent == 100)

    def report_case(self, row: BenchmarkRow, done: int, cases: int) -> None:
        """Say what one case of `bench` gave."""
        noisy = " (noisy)" if row.noisy else ""
        self._say(f"{done}/{cases} {row.case}: {row.ratio:.2f}{noisy}", last=True)

    def report_profile(self, name: str, done: int, kinds: int) -> None:
        """Say which kind of training steps has been profiled."""
        self._say(f"{done}/{kinds} {name}", last=True)

    def report_workload(self, row: WorkloadRow, done: int, rows: int) -> None:
        """Say what one workload of `bench` gave."""
        self._say(f"{done}/{rows} {row.name} beside {row.peer}: {row.ratio:.2f}{' (noisy)' * row.noisy}", last=True)

    def report_implementations(self, case: Case, fastest: str, done: int, cases: int) -> None:
        """Say which implementation was the fastest in one case of `bench kernels`."""
        self._say(f"{done}/{cases} {case}: {fastest}", last=True)

    def _say(self, words: str, last: bool) -> None:
        if self._console.is_terminal:
            self._console.file.write(f"\r{visible(words)}\x1b[K")
            self._console.file.flush()
        elif last:
            self._console.print(words, markup=False)


def _figures(nats: float) -> str:
    return f"{nats:.4f} nats ({nats / 0.6931471805599453:.3f} bits)"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
