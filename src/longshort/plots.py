"""Pictures of results. Imported only where one is asked for: matplotlib takes its time to load."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.config import is_own_cell
from longshort.errors import MissingExtraError, OutputError, UsageError
from longshort.inspection import KEEPS, Inspection

_COLOURS = ("#1f6fb4", "#d1601f", "#3a8f3a", "#8a4fa3", "#b0323c", "#5f6b73", "#c9a227", "#2aa198")
_DASHES = ("-", "--", ":", "-.")
_MEANING = {
    ("lstm", "i"): ": how much of g is taken in",
    ("lstm", "f"): ": how much of c is kept",
    ("lstm", "o"): ": how much of tanh c is put out",
    ("lstm", "tanh c"): ": what the units hold",
    ("gru", "r"): ": how much of h the candidate sees",
    ("gru", "z"): ": how much of h is kept",
}
_SIGNS = {ord("\n"): "⏎", ord("\t"): "⇥"}


def comparison(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw what `compare` found: training curves beside held-out perplexity.

    Args:
        result: what `compare --json` prints.
        path: of the picture; its ending (.png, .svg, .pdf) decides the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the picture cannot be written.
        UsageError: the ending names no format.
    """
    plt = _pyplot()
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    for cell, colour in zip(cells, _cycle(_COLOURS, len(cells)), strict=True):
        for implementation, dash in zip(implementations, _cycle(_DASHES, len(implementations)), strict=True):
            curves = [r["curve"] for r in rows if r["cell"] == cell and r["implementation"] == implementation]
            middle = [statistics.median(values) for values in zip(*curves, strict=True)]
            epochs = range(1, len(middle) + 1)
            if len(curves) > 1:
                lowest, highest = ([f(v) for v in zip(*curves, strict=True)] for f in (min, max))
                left.fill_between(epochs, lowest, highest, color=colour, alpha=0.12, linewidth=0)
            by = f", {Path(implementation).name}" if len(implementations) > 1 else ""
            left.plot(epochs, middle, dash, color=colour, label=_cell_name(cell) + by)
    for baseline in result["baselines"]:
        left.axhline(baseline["train_perplexity"], color="#999999", linewidth=0.7)
        label = f"{baseline['order']}-gram counts "
        where = (1.0, baseline["train_perplexity"])
        axes = left.get_yaxis_transform()
        left.text(*where, label, ha="right", va="bottom", size=7.5, color="#777777", transform=axes)
    ticks = (1, 2, 4, 8, 16, 32)
    left.set_yscale("log")
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_ylim(1, 32)
    left.set_xlabel("epoch (8 updates of 32 x 35 characters)")
    left.set_ylabel("perplexity while training")
    left.set_title("The text that is trained on: memory", loc="left", size=11)
    left.legend(frameon=False, fontsize=9, loc="lower left")

    names: list[str] = []
    values: list[float] = []
    colours: list[tuple[str, float]] = []
    for cell, colour in zip(cells, _cycle(_COLOURS, len(cells)), strict=True):
        curves = [row["heldout_curve"] for row in rows if row["cell"] == cell and row["heldout_curve"]]
        if curves:
            middles = {epoch: statistics.median(curve[epoch] for curve in curves) for epoch in curves[0]}
            best = min(middles, key=lambda epoch: middles[epoch])
            names += [_cell_name(cell), f"{_cell_name(cell)} at epoch {best}"]
            values += [list(middles.values())[-1], middles[best]]
            colours += [(colour, 1.0), (colour, 0.5)]
    for baseline in result["baselines"]:
        if baseline["heldout_perplexity"] is not None:
            names.append(f"{baseline['order']}-gram")
            values.append(baseline["heldout_perplexity"])
            colours.append(("#aaaaaa", 1.0))
    bars = right.barh(names, values, color=colours)
    right.bar_label(bars, labels=[f"{value:.1f}" for value in values], padding=4, fontsize=9)
    right.invert_yaxis()
    right.set_xlim(0, max(values, default=1) * 1.15)
    right.set_xlabel("perplexity at the end, and at its best")
    right.set_title("The characters that follow: unseen", loc="left", size=11)
    _save(plt, figure, (left, right), path)


def forecasts(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw how the errors of forecasts grow with the steps ahead, a panel a series.

    Args:
        result: what `benchmarks/series.py` prints.
        path: as of `comparison`, with its errors.
    """
    plt = _pyplot()
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    names = list(dict.fromkeys(row["series"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        own = [row for row in rows if row["series"] == name]
        for row, colour in zip((row for row in own if "model" in row), _cycle(_COLOURS, len(own)), strict=False):
            axes.plot(range(1, len(row["curve"]) + 1), row["curve"], color=colour, label=row["model"])
        noise = next(row["noise"] for row in own if "noise" in row)
        axes.axhline(noise, color="#999999", linewidth=0.8, linestyle="--")
        axes.text(
            1.0,
            noise,
            "the noise itself ",
            ha="right",
            va="top",
            size=8,
            color="#777777",
            transform=axes.get_yaxis_transform(),
        )
        axes.set_ylim(0)
        axes.set_xlabel("steps ahead")
        axes.set_ylabel("root mean squared error")
        axes.set_title(name, loc="left", size=11)
    panels[0].legend(frameon=False, fontsize=9, loc="upper left")
    _save(plt, figure, panels, path)


def words(matrix_NE: NDArray[np.float32], groups: Mapping[str, str], path: str | Path) -> None:
    """Draw word vectors on a plane: their directions, turned so that the two in which they differ most are seen.

    Args:
        matrix_NE: the vectors of the words.
        groups: each word, in the order of the vectors, and the group whose colour it has.
        path: as of `comparison`, with its errors.
    """
    plt = _pyplot()
    directions = matrix_NE / np.maximum(np.linalg.norm(matrix_NE, axis=1, keepdims=True), 1e-12)
    directions = directions - directions.mean(0)
    plane = directions @ np.linalg.svd(directions, full_matrices=False)[2][:2].T
    names = list(dict.fromkeys(groups.values()))
    colours = dict(zip(names, _cycle(_COLOURS, len(names)), strict=True))
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    axes.scatter(*plane.T, c=[colours[group] for group in groups.values()], s=14)
    for (x, y), (word, group) in zip(plane, groups.items(), strict=True):
        axes.annotate(word, (x, y), xytext=(4, 2), textcoords="offset points", color=colours[group], fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    _save(plt, figure, [axes], path)


def depths(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw what `compare --recipe depth` found: held-out bits by depth, and by seconds of training.

    Args:
        result: what it prints with `--json`.
        path: of the picture.

    Raises:
        MissingExtraError, OutputError, UsageError: as `comparison`.
    """
    plt = _pyplot()
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(2, 3), layout="constrained")
    lines = list(dict.fromkeys((row["cell"], row["kind"]) for row in rows))
    several = len({cell for cell, _ in lines}) > 1
    colours = dict(zip(lines, _cycle(_COLOURS, len(lines)), strict=True))
    depths = sorted({row["layers"] for row in rows})
    for (cell, kind), colour in colours.items():
        own = [row for row in rows if (row["cell"], row["kind"]) == (cell, kind)]
        middle = {
            depth: statistics.median(row["bits_per_character"] for row in own if row["layers"] == depth)
            for depth in depths
            if any(row["layers"] == depth for row in own)
        }
        label = (f"{cell.upper()}, " if several else "") + kind.replace("_", " ")
        left.plot(list(middle), list(middle.values()), "o-", color=colour, label=label)
        for depth, dash in zip(depths, _cycle(_DASHES, len(depths)), strict=True):
            curves = [row["curve"] for row in own if row["layers"] == depth]
            if curves:
                points = [
                    [statistics.median(values) for values in zip(*at, strict=True)] for at in zip(*curves, strict=True)
                ]
                right.plot(*zip(*points[1:], strict=True), dash, color=colour, label=f"{label}, {depth}")
    left.set_xticks(depths)
    left.set_xlabel("layers, as many weights in all")
    left.set_ylabel("held-out bits a character")
    left.set_title(f"After {result['seconds']:g} s of training", loc="left", size=11)
    left.legend(frameon=False, fontsize=9)
    right.set_xlabel("seconds of training")
    right.set_title("On the way", loc="left", size=11)
    right.legend(frameon=False, fontsize=8, ncols=2)
    _save(plt, figure, [left, right], path)


def labels(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw what `benchmarks/labels.py` found: taggers against what is possible, and who is taken for whom.

    Args:
        result: what it prints.
        path: of the picture.

    Raises:
        MissingExtraError, OutputError, UsageError: as `comparison`.
    """
    plt = _pyplot()
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    for both, colour, words in ((True, _COLOURS[0], "reads both ways"), (False, _COLOURS[1], "reads forward")):
        own = [row for row in rows if row["task"] == "tags" and row["bidirectional"] is both]
        counts = [row["sentences"] for row in own]
        left.plot(counts, [row["accuracy"] for row in own], "o-", color=colour, label=words)
        left.axhline(best := own[-1]["best_possible"], color=colour, linestyle="--", linewidth=1)
        where = (0.01, best)
        left.text(*where, "the best possible", va="bottom", size=8, color=colour, transform=left.get_yaxis_transform())
    left.set_xscale("log")
    left.set_xticks(counts, [f"{count:,}" for count in counts])
    left.minorticks_off()
    left.set_xlabel("sentences to learn from")
    left.set_ylabel("share of tags that are right")
    left.set_title("Tags of made-up sentences", loc="left", size=11)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    about, chosen = [row for row in rows if row["task"] == "authors"][:2]
    names = list(about["lines"])
    confusion_CC = np.array(chosen["confusion"])
    shares_CC = confusion_CC / confusion_CC.sum(1, keepdims=True)
    right.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares_CC):
        shown = f"{share:.1%}\n{confusion_CC[row, column]:,}"
        right.text(column, row, shown, ha="center", va="center", size=9, color="white" if share > 0.5 else "black")
    right.set_xticks(range(len(names)), names, size=8)
    right.set_yticks(range(len(names)), names, size=8)
    right.set_xlabel("what is said")
    right.set_ylabel("what it is")
    right.set_title("Who wrote the line", loc="left", size=11)
    _save(plt, figure, [left, right], path)


def gates(found: Inspection, layer: int, path: str | Path) -> None:
    """Draw what one layer had while it read 100 symbols of a text, and its units that follow something.

    The symbols are those around `Inspection.example`, or of a text too short for one the first.

    Args:
        found: what `inspect` gave.
        layer: from 0.
        path: as of `comparison`, with its errors.
    """
    plt = _pyplot()
    readings, following = found.layers[layer], found.following()
    begin = found.example()[1] - 30 if following else 0
    begin = max(min(begin, len(found.symbols) - 100), 0)
    here = slice(begin, begin + 100)
    symbols = found.symbols[here]
    keeps = KEEPS.get(found.cell)
    order = np.argsort(readings[keeps].mean(0) if keeps else readings["h"].std(0), kind="stable")[::-1]
    units = order[np.unique(np.linspace(0, len(order) - 1, 24).astype(int))]
    follow = {each.unit: each.aspect for each in reversed(following[:8]) if each.layer == layer}
    shown = [(name, units) for name in readings if name not in ("g", "n", "c", "h")] + [(found.value, units)]
    shown += [(found.value, np.array([*follow][::-1]))] if follow else []
    heights = [0.7, *[1.0 + len(chosen) / 24 for _, chosen in shown]]
    shape: dict[str, Any] = {"figsize": (13, 0.85 * sum(heights) + 0.8), "height_ratios": heights}
    figure, panels = plt.subplots(len(heights), 1, sharex=True, layout="constrained", **shape)
    bits = np.nan_to_num(found.nats[here]) / math.log(2)
    panels[0].bar(range(len(symbols)), bits, color=_COLOURS[5], width=0.8)
    panels[0].set_ylabel("bits")
    panels[0].set_title("How odd each symbol was", loc="left", size=10)
    for axes, (name, chosen) in zip(panels[1:], shown, strict=True):
        value_UT = (np.tanh(readings["c"]) if name == "tanh c" else readings[name])[here][:, chosen].T
        is_gate = bool(value_UT.min() >= 0 and value_UT.max() <= 1)
        most = max(1.0, float(np.abs(value_UT).max()))
        colours = {"cmap": "Blues", "vmin": 0} if is_gate else {"cmap": "RdBu_r", "vmin": -most}
        image = axes.imshow(value_UT, aspect="auto", interpolation="nearest", vmax=most, **colours)
        figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
        if chosen is units:
            axes.set_yticks([0, len(units) - 1], [f"unit {units[0]}", f"unit {units[-1]}"], size=8)
            axes.set_title(f"{name}{_MEANING.get((found.cell, name), '')}", loc="left", size=10)
        else:
            axes.set_yticks(range(len(chosen)), [f"{follow[unit]}, unit {unit}" for unit in chosen], size=8)
            axes.set_title(f"{name} of units that follow something", loc="left", size=10)
    signs = [symbol.translate(_SIGNS).strip() or "␣" for symbol in symbols]
    wide = max(map(len, signs)) > 2
    panels[-1].set_xticks(range(len(symbols)), signs, size=8, rotation=90 if wide else 0, family="DejaVu Sans Mono")
    for axes in panels:
        axes.tick_params(axis="x", length=0)
    order_is = "those that keep the most on top" if keeps else "those that change the most on top"
    figure.suptitle(f"{len(units)} of {len(order)} units of layer {layer}, {order_is}", x=0.01, ha="left", size=9)
    _save(plt, figure, panels, path)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "A picture") from error
    return plt


def _save(plt: Any, figure: Any, panels: Sequence[Any], path: str | Path) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"The picture {path} cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"The picture {path} has an unknown format.", "End its name in .png, .svg or .pdf.") from error
    finally:
        plt.close(figure)


def _cell_name(cell: str) -> str:
    """Return the name of a cell as a picture has it; one of a user's own, FILE.py:NAME, by its file."""
    return Path(cell.split(":")[0]).stem.replace("_", " ") if is_own_cell(cell) else cell.upper()


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]
