"""Tables of results, and what `doctor` found, on standard output.

Everything that a model or a file can put into a line goes through `screen.visible` first.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from longshort.cli.screen import visible
from longshort.config import is_own_cell


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print the table of `compare`: medians over the seeds."""
    console = output()
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
    table = new_table(*names, left=2)
    for group in summary(result["rows"]):
        figures = [f"{group['train_perplexity'][e]:.2f}" for e in epochs]
        table.add_row(
            _cell(group["cell"]),
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
                f"{_cell(group['cell']):4} {visible(group['implementation'])}: {visible(sample)}", markup=False
            )


def _cell(name: str) -> str:
    """Return how a cell is shown: one of a user's own, FILE.py:NAME, as it is called."""
    return visible(name) if is_own_cell(name) else name.upper()


def print_depths(result: Mapping[str, Any]) -> None:
    """Print the table of `compare --recipe depth`: medians over the seeds."""
    console, text = output(), result["text"]
    console.print(
        f"{visible(text['name'])}: {text['characters']:,} characters, {text['symbols']} symbols, the last "
        f"{text['heldout_tokens']:,} held out; {result['seconds']:g} s of training each, "
        f"{result['seeds']} seed{'s' * (result['seeds'] > 1)}, {result['threads']} threads",
        markup=False,
    )
    names = ("cell", "layers", "kind", "hidden", "parameters", "steps", "tokens/s", "held-out bits/character")
    table = new_table(*names, left=3)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["cell"], row["layers"], row["kind"]), []).append(row)
    for (cell, layers, kind), rows in groups.items():
        middle = {
            n: statistics.median(r[n] for r in rows) for n in ("steps", "tokens_per_second", "bits_per_character")
        }
        table.add_row(
            _cell(cell),
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
        result: of `layers.result`.
        worst: how many cases to show, those with the smallest ratios; if None all, where they fit on a screen.
    """
    console = output()
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
    table = new_table(*_KIND, *bands, "worst", "below 1", "below 0.9", left=len(_KIND))
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
    if handovers := [1e9 * row["handover_seconds"] for row in result["rows"] if row["handover_seconds"]]:
        console.print(
            f"A line of the cache went from core to core in {statistics.median(handovers):.0f} ns "
            f"({min(handovers):.0f} to {max(handovers):.0f})."
        )


def _with_headline(result: Mapping[str, Any]) -> Console:
    """Print on what, with how many threads and when a benchmark was run; return where its table is to follow."""
    console, machine = output(), result["machine"]
    console.print(
        f"{visible(machine['processor'])}, {machine['cores']} cores, {result['threads']} threads, longshort "
        f"{machine['longshort']}, PyTorch {machine['torch']} ({result['torch_code']}), {result['date']}",
        markup=False,
    )
    return console


def print_implementations(result: Mapping[str, Any]) -> None:
    """Print the tables of `bench kernels`; `result`: of `implementations.result`."""
    console = _with_headline(result)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["cell"], row["mode"]), []).append(row)
    for (cell, mode), rows in groups.items():
        shapes = list(dict.fromkeys((row["T"], row["B"], row["H"]) for row in rows))
        table = new_table(f"{cell.upper()}, {mode}", *("x".join(map(str, shape)) for shape in shapes), "error", left=1)
        fastest = {shape: min(row["seconds"] for row in rows if _shape(row) == shape) for shape in shapes}
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            own = [row for row in rows if row["kernel"] == kernel]
            times = [
                f"{'auto ' * row['auto']}{'* ' * (row['seconds'] == fastest[_shape(row)])}{_duration(row['seconds'])}"
                f" {row['spread']:>4.0%}"
                for row in own
            ]
            table.add_row(kernel, *times, f"{max(row['error'] for row in own):.0e}")
        console.print(table)
    console.print(
        "Steps x rows x units; a call's time and its spread. *: the fastest; auto: what runs where nothing is forced.\n"
        "Error: the largest difference from the equations in float64, as a share of the largest value.\n"
        "To force one: longshort.kernels.use(name). For a process: LONGSHORT_TARGET=name, of native kernels only."
    )


def _shape(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["T"], row["B"], row["H"]


def print_profiles(found: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Print where the time of training steps goes; `found`: of `workloads.profiles`."""
    table = new_table("milliseconds a step", *(name for name, _ in found), left=1)
    for part in found[0][1]:
        table.add_row(
            part, *(f"{1e3 * parts[part]:.2f}  {parts[part] / sum(parts.values()):>4.0%}" for _, parts in found)
        )
    table.add_section()
    table.add_row("in all", *(f"{1e3 * sum(parts.values()):.2f}  100%" for _, parts in found))
    output().print(table)


def print_workloads(result: Mapping[str, Any]) -> None:
    """Print the table of `bench train`, `generate` or `score`; `result`: of `workloads.result`."""
    console = _with_headline(result)
    table = new_table(result["benchmark"], "beside", "ours", "spread", "peer", "spread", "ratio", "of GEMM", "", left=2)
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
    table = new_table(*_KIND, *names, left=len(_KIND))
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


def new_table(*names: str, left: int) -> Table:
    """Return an empty table; all columns but the first `left` are figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def print_doctor(report: Mapping[str, Any]) -> None:
    """Print what `doctor` found."""
    console = output()
    table = Table.grid(padding=(0, 3))
    for name, value in report.items():
        if name == "handover_seconds":
            if value is not None:
                table.add_row("core to core", f"{1e9 * value:.0f} ns, which a line of the cache takes just now")
        elif name != "advice":
            shown = "not installed" if value is None else str(value)
            if isinstance(value, list):
                shown = ", ".join(value) or "none"
            table.add_row(name.replace("_", " "), visible(shown))
    console.print(table)
    for line in report["advice"] or ["Nothing is missing."]:
        console.print(line, markup=False)


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Leave to `verbs.main` what happens where the reader has gone: it is no error."""
        raise BrokenPipeError


def output() -> Console:
    """Return what prints on standard output."""
    # A pipe gets tables as wide as they are, whatever the width of the terminal behind it.
    return _Output(highlight=False, width=None if sys.stdout.isatty() else 200)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    """Return a time with three digits, in seconds, ms or us."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
