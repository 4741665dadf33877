"""What the command line shows: live progress on a terminal, plain lines elsewhere, tables.

Everything that a model or a file can put into a line goes through `visible` first.
"""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longshort.config import flag_of

if TYPE_CHECKING:
    from longshort.comparison import Row
    from longshort.config import TrainConfig
    from longshort.depth import Row as Stack
    from longshort.ledger import Row as BenchmarkRow
    from longshort.recipes import Plan
    from longshort.scoring import LineScore
    from longshort.training import Event, Finished, Looked, Progress, Skipped, Started
    from longshort.workloads import Row as WorkloadRow

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
                f"perplexity {h.perplexity:.4f}\n({h.tokens:,} tokens; {h.protocol})"
            )
        return words


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

    def _say(self, words: str, last: bool) -> None:
        if self._console.is_terminal:
            self._console.file.write(f"\r{visible(words)}\x1b[K")
            self._console.file.flush()
        elif last:
            self._console.print(words, markup=False)


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print the table of `compare`: medians over the seeds."""
    console = _console()
    text = result["text"]
    console.print(
        f"{visible(text['name'])}: {text['train_characters']:,} characters to train on, {text['symbols']} symbols; "
        f"{text['heldout_characters']:,} that follow held out; {result['seeds']} seed{'s' * (result['seeds'] > 1)}, "
        f"{result['threads']} threads",
        markup=False,
    )
    epochs = list(result["rows"][0]["train_perplexity"]) if result["rows"] else []
    columns = [str(epoch) for epoch in epochs]
    columns[:1] = [f"epoch {name}" for name in columns[:1]]
    names = ("cell", "implementation", "parameters", *columns, "held-out", "best (epoch)", "s/epoch", "tokens/s")
    table = _table(*names, left=2)
    for group in summary(result["rows"]):
        figures = [f"{group['train_perplexity'][e]:.2f}" for e in epochs]
        table.add_row(
            group["cell"].upper(),
            visible(group["implementation"]),
            f"{group['parameters']:,}",
            *figures,
            _or_dash(group["heldout_perplexity"], ".1f"),
            "-" if group["heldout_best"] is None else f"{group['heldout_best']:.1f} ({group['heldout_best_epoch']})",
            f"{group['seconds_per_epoch']:.3f}",
            f"{group['tokens_per_second']:,.0f}",
        )
    for cell, figures in result.get("lecture", {}).items():
        table.add_row(cell.upper(), "the lecture, 2019", *("", *figures, "", "", "", "")[: len(epochs) + 5])
    for baseline in result["baselines"]:
        blanks = [""] * max(len(epochs) - 1, 0)
        counted = [f"{baseline['train_perplexity']:.2f}"] if epochs else []
        held_out = _or_dash(baseline["heldout_perplexity"], ".1f")
        table.add_row(f"{baseline['order']}-gram", "counts", "", *blanks, *counted, held_out, "", "", "")
    console.print(table)
    console.print(
        "Perplexity while training, median over the seeds; held-out: at the end and at its best, state carried."
    )
    for group in summary(result["rows"]):
        for sample in group["samples"]:
            console.print(
                f"{group['cell'].upper():5}{visible(group['implementation'])}: {visible(sample)}", markup=False
            )


def print_depths(result: Mapping[str, Any]) -> None:
    """Print the table of `compare --recipe depth`: medians over the seeds."""
    console, text = _console(), result["text"]
    console.print(
        f"{visible(text['name'])}: {text['characters']:,} characters, {text['symbols']} symbols, the last "
        f"{text['heldout_tokens']:,} held out; {result['seconds']:g} s of training each, "
        f"{result['seeds']} seed{'s' * (result['seeds'] > 1)}, {result['threads']} threads",
        markup=False,
    )
    names = ("cell", "layers", "kind", "hidden", "parameters", "steps", "tokens/s", "held-out bits/character")
    table = _table(*names, left=3)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["cell"], row["layers"], row["kind"]), []).append(row)
    for (cell, layers, kind), rows in groups.items():
        middle = {
            n: statistics.median(r[n] for r in rows) for n in ("steps", "tokens_per_second", "bits_per_character")
        }
        table.add_row(
            visible(cell.upper()),
            str(layers),
            kind,
            str(rows[0]["hidden"]),
            f"{rows[0]['parameters']:,}",
            f"{middle['steps']:,.0f}",
            f"{middle['tokens_per_second']:,.0f}",
            f"{middle['bits_per_character']:.3f}",
        )
    console.print(table)
    console.print("Trained in turns; medians over the seeds; the held-out text read with the state carried.")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a cell and implementation: medians over the seeds, and the first seed's samples."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["implementation"]), []).append(row)
    found = []
    for (cell, implementation), members in groups.items():
        held_out = [m["heldout_perplexity"] for m in members if m["heldout_perplexity"] is not None]
        looks = members[0]["heldout_curve"] if held_out else {}
        curve = {epoch: statistics.median(m["heldout_curve"][epoch] for m in members) for epoch in looks}
        epochs = members[0]["train_perplexity"]
        found.append(
            {
                "cell": cell,
                "implementation": implementation,
                "parameters": members[0]["parameters"],
                "train_perplexity": {e: statistics.median(m["train_perplexity"][e] for m in members) for e in epochs},
                "heldout_perplexity": statistics.median(held_out) if held_out else None,
                "heldout_best": min(curve.values(), default=None),
                "heldout_best_epoch": min(curve, key=lambda epoch: curve[epoch], default=None),
                "seconds_per_epoch": statistics.median(m["seconds_per_epoch"] for m in members),
                "tokens_per_second": statistics.median(m["tokens_per_second"] for m in members),
                "samples": members[0]["samples"],
            }
        )
    return found


def print_benchmark(result: Mapping[str, Any], worst: int | None = None) -> None:
    """Print the tables of `bench`.

    Args:
        result: of `benchmarks.result`.
        worst: how many cases to show, those with the smallest ratios; if None all, where they fit on a screen.
    """
    console = _console()
    machine = result["machine"]
    console.print(
        f"{visible(machine['processor'])}, {machine['cores']} cores, longshort {machine['longshort']}, "
        f"PyTorch {machine['torch']} ({result['torch_code']}), {result['date']}",
        markup=False,
    )
    rows = result["rows"]
    if worst is not None:
        rows = sorted(rows, key=lambda row: float(row["ratio"]))[:worst]
    if worst is not None or len(rows) <= _CASES_ON_A_SCREEN:
        console.print(_case_table(rows))
    bands = list(dict.fromkeys(band["band"] for group in result["summary"] for band in group["bands"]))
    table = _table(*_KIND, *bands, "worst", "below 1", "below 0.9", left=len(_KIND))
    for group in result["summary"]:
        found = {band["band"]: band for band in group["bands"]}
        low = group["worst"]
        table.add_row(
            *_kind(group),
            *(_against_mark(found[name]) if name in found else "" for name in bands),
            f"{low['ratio']:.2f} at {low['T']} x {low['B']} x {low['H']}",
            f"{group['below_1']} of {group['cases']}",
            f"{group['below_0.9']} of {group['cases']}",
        )
    console.print(table)
    console.print("The peer's time divided by ours, geometric mean of each band (in brackets: the mark to be reached).")
    if result["noisy"]:
        console.print(f"{result['noisy']} of {len(result['rows'])} cases were noisy to the last.")


def print_profiles(found: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Print where the time of training steps goes; `found`: of `workloads.profiles`."""
    table = _table("milliseconds a step", *(name for name, _ in found), left=1)
    for part in found[0][1]:
        table.add_row(
            part, *(f"{1e3 * parts[part]:.2f}  {parts[part] / sum(parts.values()):>4.0%}" for _, parts in found)
        )
    table.add_section()
    table.add_row("in all", *(f"{1e3 * sum(parts.values()):.2f}  100%" for _, parts in found))
    _console().print(table)


def print_workloads(result: Mapping[str, Any]) -> None:
    """Print the table of `bench train`, `generate` or `score`; `result`: of `workloads.result`."""
    console = _console()
    machine = result["machine"]
    console.print(
        f"{visible(machine['processor'])}, {machine['cores']} cores, {result['threads']} threads, longshort "
        f"{machine['longshort']}, PyTorch {machine['torch']} ({result['torch_code']}), {result['date']}",
        markup=False,
    )
    table = _table(result["benchmark"], "beside", "ours", "spread", "peer", "spread", "ratio", "of GEMM", "", left=2)
    for row in result["rows"]:
        table.add_row(
            *(row["name"], row["peer"]),
            f"{row['ours_per_second']:,.0f} {row['unit']}/s",
            f"{row['ours_spread']:.0%}",
            f"{row['peer_per_second']:,.0f} {row['unit']}/s",
            f"{row['peer_spread']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['gemm_share']:.0%}" if row["gemm_share"] else "-",
            "noisy" if row["noisy"] else "",
        )
    console.print(table)


_KIND = ("cell", "mode", "threads")
_CASES_ON_A_SCREEN = 40


def _case_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("T", "B", "H", "kernel", "ours", "spread", "peer", "spread", "ratio", "GFLOP/s", "of GEMM", "")
    table = _table(*_KIND, *names, left=len(_KIND))
    for row in rows:
        table.add_row(
            *_kind(row),
            *(str(row[name]) for name in ("T", "B", "H", "kernel")),
            _duration(row["ours_seconds"]),
            f"{row['ours_spread']:.0%}",
            _duration(row["peer_seconds"]),
            f"{row['peer_spread']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['gflops']:,.1f}",
            f"{row['gemm_share']:.0%}",
            "noisy" if row["noisy"] else "",
        )
    return table


def _kind(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the first columns of a row or a group: cell with option and peer, mode, threads."""
    cell = row["cell"].upper()
    what = cell if row["option"] == "none" else f"{cell} {row['option']} / {row['peer']}"
    return what, row["mode"], str(row["threads"])


def _against_mark(band: Mapping[str, Any]) -> str:
    mark = "" if band["mark"] is None else f" ({band['mark']:.3g})"
    return f"{band['ratio']:.2f}{mark}"


def _table(*names: str, left: int) -> Table:
    """Return an empty table; all columns but the first `left` are figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def print_doctor(report: Mapping[str, Any]) -> None:
    """Print what `doctor` found."""
    console = _console()
    table = Table.grid(padding=(0, 3))
    for name, value in report.items():
        if name != "advice":
            shown = (
                ", ".join(value) if isinstance(value, list) else str(value) if value is not None else "not installed"
            )
            table.add_row(name.replace("_", " "), visible(shown or "none"))
    console.print(table)
    for line in report["advice"] or ["Nothing is missing."]:
        console.print(line, markup=False)


def _console() -> Console:
    # A pipe gets tables as wide as they are, whatever the width of the terminal behind it.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _figures(nats: float) -> str:
    return f"{nats:.4f} nats ({nats / 0.6931471805599453:.3f} bits)"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    """Return a time with three digits, in seconds, ms or us."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
