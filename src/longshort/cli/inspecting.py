"""The verb that looks inside: `inspect`, and how what it found is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from longshort import durable
from longshort.cli import console, models
from longshort.cli.flags import DataDir, Int, Json, OwnCell
from longshort.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longshort.inspection import Inspection

_EXCERPT = 480
_BARS = "▁▂▃▄▅▆▇█"


class _Unit(NamedTuple):
    layer: int
    unit: int
    name: str
    """Of what is shown: a gate, a tensor of the state, or `tanh c`."""


def inspect(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    file: Annotated[str | None, Parameter(help="A text file, or gzip of it; - for standard input.")] = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(help="Read this instead of FILE.", allow_leading_hyphen=True)] = None,
    corpus: Annotated[
        str | None, Parameter(help="A named corpus instead of FILE: builtin, timemachine, tinyshakespeare.")
    ] = None,
    data_dir: DataDir = None,
    length: Annotated[Int, Parameter(help="Most characters to read, from the start.")] = 20_000,
    unit: Annotated[
        str | None, Parameter(help="Show what one unit had at every symbol: LAYER:NUMBER, both from 0, such as 0:17.")
    ] = None,
    value: Annotated[
        str | None, Parameter(help="Of that unit: a gate such as f, or h, c, 'tanh c' (default: tanh c, else h).")
    ] = None,
    plot: Annotated[
        str | None, Parameter(help="Draw the gates of 100 symbols into this file (.png, .svg, .pdf).")
    ] = None,
    layer: Annotated[Int | None, Parameter(help="Of which layer to draw them (default: the last).")] = None,
    out: Annotated[
        str | None, Parameter(help="Write every gate and state of every symbol into this file (.npz, for NumPy).")
    ] = None,
    cell: OwnCell = None,
    json: Json = False,
) -> None:
    """Show what a model has inside while it reads: gates, how long it remembers, what its units follow."""
    from longshort.inspection import inspect

    console.load_own_cell(cell)
    if length < 1:
        raise UsageError(f"--length must be at least 1, not {length}.")
    if value is not None and unit is None:
        raise UsageError("--value is what to show of a unit.", "Add --unit LAYER:NUMBER.")
    if layer is not None and plot is None:
        raise UsageError("--layer is the one that is drawn.", "Add --plot FILE.")
    if plot is not None:
        console.check_plot(plot)
    if out is not None and Path(out).suffix != ".npz":
        raise UsageError(f"The arrays are written as .npz, not {out!r}.", "End the name of --out in .npz.")
    name, text = _text(file, prompt, corpus, data_dir, length)
    loaded = models.reader(model)
    if out is not None:
        durable.require_writable_directory(Path(out).absolute().parent)
    last = loaded.config.layers - 1
    drawn = last if layer is None else layer
    if not 0 <= drawn <= last:
        raise UsageError(f"--layer must be from 0 to {last}, not {drawn}.")
    found = inspect(loaded, loaded.tokenizer, text)
    chosen = None if unit is None else _chosen(found, unit, value)
    if out is not None:
        found.save(out)
    if plot is not None:
        from longshort import plots

        plots.gates(found, drawn, plot)
    if json:
        of_unit = {} if chosen is None else {"unit": _values(found, chosen)}
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # of what was read
        console.print_json({"model": model, "text": name, "text_sha256": sha256, **found.to_dict(), **of_unit})
    elif chosen is not None:
        _print_unit(found, chosen, 0, len(found.symbols))
    else:
        _print(found, name)
    for kind, path in (("Gates", plot), ("Arrays", out)):
        if path is not None:
            console.say(f"{kind}: {path}")


def _text(
    file: str | None, prompt: str | None, corpus: str | None, data_dir: str | None, length: int
) -> tuple[str, str]:
    """Return the name and the beginning of what is to be read."""
    from longshort.text import corpus as corpora

    if sum(given is not None for given in (file, prompt, corpus)) != 1:
        raise UsageError("One text is wanted: FILE, --prompt or --corpus.")
    if data_dir is not None and corpus is None:
        raise UsageError("--data-dir holds named corpora.", "Give --corpus, or leave it out.")
    if prompt is not None:
        return "the prompt", prompt[:length]
    if file is not None:
        name, pieces = Path(file).name, corpora.pieces(file)
    else:
        source = corpora.find((), corpus, console.path(data_dir))
        name, pieces = source.name, source.pieces()
    text = ""
    for piece in pieces:
        text += piece
        if len(text) >= length:
            break
    return name, text[:length]


def _chosen(found: Inspection, unit: str, value: str | None) -> _Unit:
    """Return the unit that the user's words name."""
    layers, units = len(found.layers), found.layers[0]["h"].shape[1]
    layer, _, number = unit.partition(":")
    if not (layer.isdecimal() and number.isdecimal() and int(layer) < layers and int(number) < units):
        raise UsageError(
            f"--unit must be LAYER:NUMBER, from 0:0 to {layers - 1}:{units - 1}, not {unit!r}.",
        )
    names = [*found.layers[0], *(["tanh c"] if "c" in found.layers[0] else [])]
    if value is not None and value not in names:
        raise UsageError(f"A unit of this model has {', '.join(names)}, not {value!r}.")
    return _Unit(int(layer), int(number), value or found.value)


def _values(found: Inspection, chosen: _Unit) -> Mapping[str, object]:
    return {**chosen._asdict(), "values": [float(value) for value in found.unit(*chosen)]}


# ------------------------------------------------------------------------------------------------- on the screen


def _print(found: Inspection, name: str) -> None:
    """Print how the gates behave, how long units remember, what they follow; and one that must remember on the text."""
    from longshort.cli.screen import visible
    from longshort.cli.tables import new_table, output

    screen = output()
    nats = f", {found.nats_per_token:.4f} nats each" if found.nats_per_token is not None else ""
    size = f"{len(found.layers)} x {found.layers[0]['h'].shape[1]}"
    count = f"{len(found.symbols):,} symbol{'s' * (len(found.symbols) != 1)}"
    what = f"{visible(found.cell.upper())} {size}, {count} of {visible(name)}"
    screen.print(f"{what}{nats}", markup=False)
    table = new_table("layer", "", "mean", "below 0.1", "above 0.9", left=2)
    for gate in found.gates():
        mean, shut = (f"{gate.mean:.2f}", f"{gate.shut:.0%}") if gate.shut is not None else (f"±{gate.mean:.2f}", "")
        table.add_row(str(gate.layer), visible(gate.name), mean, shut, f"{gate.open:.0%}")
    screen.print(table)
    for memory in found.memories():
        low, middle, high, most = memory.quantiles().values()
        if middle < 1:  # the text has ended before
            continue
        longest = int(memory.half_life.argmax())
        screen.print(
            f"Layer {memory.layer}: half of what a unit holds is gone after {middle:.0f} symbol{'s' * (middle != 1)}, "
            f"by its {memory.gate} ({low:.0f} to {high:.0f} for 8 of 10 units; unit {longest}: {most:,.0f}).",
            markup=False,
        )
    following = found.following()
    if not following:
        screen.print("The text is too short to say what the units follow.")
        return
    table = new_table("follows", "unit", "correlation", left=2)
    for each in following:
        table.add_row(each.aspect, f"{each.layer}:{each.unit}", f"{each.correlation:+.2f}")
    screen.print(table)
    screen.print("Units chosen on the first half of the text, measured on the second.")
    best, place = found.example()
    before = range(max(place - _EXCERPT // 4, 0), place)  # where the line begins, if that is not far
    begin = next((at + 1 for at in reversed(before) if found.symbols[at].endswith("\n")), before.start)
    screen.print(f"{best.value} of unit {best.layer}:{best.unit}, which follows {best.aspect}:\n")
    _print_unit(found, _Unit(best.layer, best.unit, best.value), begin, begin + _EXCERPT)


def _print_unit(found: Inspection, chosen: _Unit, begin: int, end: int) -> None:
    """Print symbols with what a unit had after each: coloured on a terminal, else with bars below."""
    from rich.text import Text

    from longshort.cli.tables import output

    values = found.unit(*chosen)
    lowest = -1.0 if values.min() < 0 else 0.0
    scale = max(1.0, float(abs(values).max()))
    screen = output()
    for line in _lines(found.symbols[begin:end], values[begin:end] / scale):
        if screen.is_terminal:
            shown = Text()
            for symbol, value in line:
                shown.append(symbol, style=f"{_ink(value)} on {_colour(value)}")
            screen.print(shown, soft_wrap=True)
        else:
            print("".join(symbol for symbol, _ in line))
            print("".join(_bar(value, lowest) * len(symbol) for symbol, value in line))


def _lines(symbols: list[str], values: NDArray[np.float32]) -> Iterator[list[tuple[str, float]]]:
    """Yield symbols with their values in lines; a newline is seen as a sign at its line's end."""
    from longshort.cli.screen import visible

    line: list[tuple[str, float]] = []
    for symbol, value in zip(symbols, values, strict=True):
        *before, last = symbol.split("\n")
        for part in before:
            yield [*line, (visible(part.replace("\t", " ")) + "⏎", float(value))]
            line = []
        if last:
            line.append((visible(last.replace("\t", " ")), float(value)))
    if line:
        yield line


def _colour(value: float) -> str:
    """Return the colour of a value from -1, blue, to 1, red; white is 0."""
    share, end = min(abs(value), 1.0), (178, 24, 43) if value > 0 else (33, 102, 172)
    return f"rgb({','.join(str(round(255 + share * (part - 255))) for part in end)})"


def _ink(value: float) -> str:
    return "black" if abs(value) < 0.6 else "white"


def _bar(value: float, lowest: float) -> str:
    """Return a bar whose height is where a value lies between `lowest` and 1."""
    share = (value - lowest) / (1 - lowest)
    return _BARS[min(max(int(share * len(_BARS)), 0), len(_BARS) - 1)]
