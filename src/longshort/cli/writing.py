"""The verb that writes text: `generate`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from longshort import durable
from longshort.cli import console, models
from longshort.cli.flags import Int, Json, OwnCell, Weights
from longshort.errors import UsageError

if TYPE_CHECKING:
    from longshort.beams import Found


def generate(
    model: Annotated[str, Parameter(help="A run or a model directory.")],
    /,
    *,
    prompt: Annotated[
        str | None, Parameter(help="What the model reads before it writes.", allow_leading_hyphen=True)
    ] = None,
    prompt_file: Annotated[
        str | None,
        Parameter(
            help="UTF-8 file that is the prompt, every character of it, or gzip of it; - for standard input.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    length: Annotated[Int, Parameter(help="Symbols to write.")] = 500,
    temperature: Annotated[
        float | None, Parameter(help="Below 1 more conservative, above 1 more random (default: 0.8).")
    ] = None,
    top_k: Annotated[Int | None, Parameter(help="Sample from the K most probable symbols only.")] = None,
    top_p: Annotated[float | None, Parameter(help="Sample from the fewest symbols that hold this probability.")] = None,
    greedy: Annotated[
        bool, Parameter(help="Always the most probable symbol.", negative="", show_default=False)
    ] = False,
    beams: Annotated[
        Int | None,
        Parameter(
            help="Search for the most probable text instead of sampling; keep so many (1 to 1024) at each step. "
            "--samples shows the best of them."
        ),
    ] = None,
    seed: Annotated[Int | None, Parameter(help="Decides what is sampled (default: 0).")] = None,
    stop: Annotated[
        tuple[str, ...],
        Parameter(help="End before this text; may be given several times.", negative="", allow_leading_hyphen=True),
    ] = (),
    state: Annotated[
        str | None, Parameter(help="File to go on from, if it is there, and to leave the state in afterwards.")
    ] = None,
    samples: Annotated[Int, Parameter(help="Write so many texts, side by side.")] = 1,
    weights: Weights = "float32",
    cell: OwnCell = None,
    json: Json = False,
) -> None:
    """Write text: warm the state on the prompt, then sample symbol by symbol."""
    console.load_own_cell(cell)
    if length < 0:
        raise UsageError(f"--length must be at least 0, not {length}.")
    if samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}.")
    if state is not None and samples > 1:
        raise UsageError("--state keeps one text; --samples does not go with it.")
    if prompt is not None and prompt_file is not None:
        raise UsageError("One prompt is wanted: --prompt or --prompt-file.")
    chances: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = {name: value for name, value in chances.items() if value is not None}
    given = [f"--{name.replace('_', '-')}" for name in settings]
    if beams is not None:
        _check_beams(beams, samples, [*given, *["--greedy"] * greedy, *["--state"] * (state is not None)])
    elif greedy:
        given += ["--samples"] * (samples > 1)
        if given:
            raise UsageError(f"--greedy leaves nothing to chance: {', '.join(given)} does not go with it.")
        settings["temperature"] = 0.0
    from longshort import generation
    from longshort.cli.screen import visible
    from longshort.text import corpus

    prompt = prompt or "" if prompt_file is None else "".join(corpus.pieces(prompt_file))
    asked: dict[str, Any] = {"length": length, "stop": list(stop)}
    found: list[Found] = []
    if beams is not None:
        found = _search(model, prompt, length, beams, stop, weights)[:samples]
        texts, asked["beams"] = [each.text for each in found], beams
        asked["nats"] = found[0].nats if samples == 1 else [each.nats for each in found]
    elif json or samples > 1:
        texts = [""] * samples
        for number, piece in _pieces(model, prompt, length, settings, stop, range(samples), weights, state):
            texts[number] += piece
        asked |= generation.Sampling(**settings).to_dict()
    else:
        to_screen(model, prompt, length, settings, stop, weights=weights, state=state)
        return
    if json:
        written = {"text": texts[0]} if samples == 1 else {"texts": texts}
        console.print_json({"model": model, "prompt": prompt, **written, **asked})
    elif samples > 1:
        for number, text in enumerate(texts, start=1):
            likely = f": {found[number - 1].nats:.2f} nats" if found else ""
            print(f"--- {number}{likely}", visible(prompt + text), sep="\n")
    else:
        print(visible(prompt + texts[0]))


def _check_beams(beams: int, samples: int, given: list[str]) -> None:
    """Refuse a number of beams that cannot be, and flags of sampling beside it."""
    from longshort.beams import MOST_BEAMS

    if given:
        raise UsageError(f"--beams does not go with {', '.join(given)}: it searches for the most probable text.")
    if not 1 <= beams <= MOST_BEAMS:
        raise UsageError(f"--beams must be from 1 to {MOST_BEAMS}, not {beams}.")
    if samples > beams:
        raise UsageError(f"{beams} beams find {beams} texts, not {samples}.", "Give more --beams or fewer --samples.")


def _search(model: str, prompt: str, length: int, beams: int, stop: tuple[str, ...], weights: str) -> list[Found]:
    """Return the most probable texts."""
    from longshort.beams import beam_search

    loaded = models.decoder(model, weights)
    found = beam_search(loaded, loaded.tokenizer, prompt, length, beams, stop=stop)
    _tell_unknown(loaded, prompt)
    return found


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
    loaded = models.decoder(model, weights)
    if state is not None:
        durable.require_writable_directory(Path(state).parent)
        rest["after"] = Continuation.load(state, loaded) if os.path.lexists(state) else None
    requests = [Request(**rest, stream=stream) for stream in streams]
    ends: dict[int, Continuation] = {}
    pieces = generate_many(loaded, loaded.tokenizer, requests, None if state is None else ends)
    _tell_unknown(loaded, prompt)
    yield from pieces
    if state is not None:
        ends[0].save(state, loaded)


def _tell_unknown(loaded: Any, prompt: str) -> None:
    """Say which symbols of a prompt a model does not know; where it knows none, writing refuses the prompt."""
    unseen = loaded.tokenizer.unknown_symbols(prompt)
    if unseen and (loaded.tokenizer.encode(prompt) < loaded.tokenizer.size).any():
        shown = ", ".join(repr(symbol) for symbol in unseen[:8])
        console.say(f"longshort: the model never saw {shown}{' ...' if len(unseen) > 8 else ''}; read as <unk>.")


def to_screen(
    model: str | Path,
    prompt: str,
    length: int,
    settings: Mapping[str, Any],
    stop: tuple[str, ...] = (),
    stream: int = 0,
    weights: str = "float32",
    state: str | None = None,
) -> None:
    """Print a text as it is written, after its prompt."""
    from longshort.cli.screen import visible

    started = False
    pieces = _pieces(model, prompt, length, settings, stop, (stream,), weights, state)
    for _, piece in itertools.chain(pieces, ((0, ""),)):
        sys.stdout.write(visible(piece if started else prompt + piece))
        sys.stdout.flush()
        started = True
    print(flush=True)
