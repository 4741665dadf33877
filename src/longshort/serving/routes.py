"""A model behind HTTP: it writes in the shape of OpenAI's completions, scores lines, shows its units, and has a page.

    GET   /                  a page that writes, and colours a text by surprise or by a unit
    POST  /v1/completions    text; with `stream`, as server-sent events
    POST  /v1/score          bits per character of lines
    POST  /v1/inspect        what the model had inside on a text
    GET   /v1/models         the one model
    GET   /healthz           whether it runs; the only route that needs no token
    GET   /metrics           counts, as Prometheus reads them

What each takes and gives is in `bodies.py`.
Needs the extra `[serve]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

import longshort
from longshort import generation
from longshort.errors import LongshortError
from longshort.generation import Sampling
from longshort.inspection import Readable, inspect
from longshort.scoring import LineModel, score
from longshort.serving.bodies import (
    MOST_CHARACTERS_OF_LINES,
    REFUSALS,
    CompletionAnswer,
    CompletionRequest,
    Health,
    InspectAnswer,
    InspectRequest,
    Models,
    ScoreAnswer,
    ScoreRequest,
    problem,
)
from longshort.serving.scheduler import Piece, Scheduler

SECONDS = 60.0
"""The most that a text may take; it ends there, with the reason `time`."""
PING = 15.0
"""Seconds after which a stream that has nothing to say shows that it is still there."""


class Served(LineModel, Readable, Protocol):
    """A model with its tokenizer that can be looked into, as `longshort.load` gives it."""


@dataclass
class Counts:
    """What `/metrics` tells beside the scheduler's own."""

    requests: int = 0
    failed: int = 0


def application(model: Served, name: str) -> FastAPI:
    """Return the application that serves one model. Who may ask, and how much, is `guard`'s.

    Args:
        model: a decoder, or a `LanguageModel` with a tokenizer.
        name: what it is called.
    """
    scheduler = Scheduler(model)
    counts = Counts()
    since = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    about: dict[str, Any] = {"title": "longshort", "version": longshort.__version__, "responses": REFUSALS}
    app = FastAPI(**about, lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(400, *_said_of(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_by_number(_request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(LongshortError)
    async def refuse_in_words(_request: Request, error: LongshortError) -> JSONResponse:
        return problem(400, str(error))

    @app.exception_handler(Exception)
    async def fail(_request: Request, _error: Exception) -> JSONResponse:
        counts.failed += 1
        return problem(500, "Something is wrong in the server; its log says what.")

    def accept(given: str | None) -> None:
        """Count a request that has been understood; refuse it if it is for another model."""
        counts.requests += 1
        if given is not None and given != name:
            raise HTTPException(404, f"There is no model {given!r} here, only {name!r}.")

    async def between(function: Callable[[], Any]) -> Any:
        """Return what `function` gives, called by the thread that has the model."""
        queue, tell = _queue()
        scheduler.call(function, tell)
        return _result(await queue.get())

    @app.post("/v1/completions", responses={200: {"model": CompletionAnswer, "content": {"text/event-stream": {}}}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        accept(body.model)
        seed = secrets.randbits(53) if body.seed is None else body.seed
        top_p = None if body.top_p == 1 else body.top_p
        sampling = Sampling(temperature=body.temperature, top_k=body.top_k, top_p=top_p, seed=seed)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        requests = [
            generation.Request(prompt=body.prompt, length=body.max_tokens, sampling=sampling, stop=stop, stream=stream)
            for stream in range(body.n)
        ]
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        head |= {"model": name, "seed": seed}
        begin = body.prompt if body.echo else ""
        pieces = _pieces(scheduler, requests)
        if body.stream:
            events = _events(pieces, head, begin)
            first = await anext(events)  # here, where what is wrong with a prompt can still have a status of its own
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        texts, reasons = await _unless_gone(_gather(pieces, body.n), request)
        choices = [
            _choice(number, begin + text, reason)
            for number, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        prompted, written = (sum(len(model.tokenizer.encode(text)) for text in side) for side in ([body.prompt], texts))
        usage = {"prompt_tokens": prompted, "completion_tokens": written, "total_tokens": prompted + written}
        return JSONResponse({**head, "choices": choices, "usage": usage})

    @app.post("/v1/score", responses={200: {"model": ScoreAnswer}})
    async def score_lines(body: ScoreRequest) -> JSONResponse:
        accept(body.model)
        if sum(map(len, body.lines)) > MOST_CHARACTERS_OF_LINES:
            raise HTTPException(400, f"lines: at most {MOST_CHARACTERS_OF_LINES} characters in all.")
        found = await between(lambda: list(score(model, body.lines)))
        lines = [
            {
                **line.to_dict(),
                "symbol_characters": line.symbol_characters.tolist(),
                "symbol_bits": [round(float(bits), 4) for bits in line.symbol_bits],
            }
            for line in found
        ]
        return JSONResponse({"object": "list", "model": name, "lines": lines})

    @app.post("/v1/inspect", responses={200: {"model": InspectAnswer}})
    async def look_inside(body: InspectRequest) -> JSONResponse:
        accept(body.model)
        layers, hidden = model.config.layers, model.config.hidden
        if body.layer >= layers or (body.unit or 0) >= hidden:
            asked = f"layer {body.layer}" + ("" if body.unit is None else f", unit {body.unit}")
            what = f"{layers} layer{'s' if layers > 1 else ''} of {hidden} units"
            raise HTTPException(400, f"The model has {what}, counted from 0; there is no {asked}.")
        found = await between(lambda: inspect(model, model.tokenizer, body.text))
        values = None
        if body.unit is not None:
            values = [round(float(value), 4) for value in found.unit(body.layer, body.unit)]
        return JSONResponse({"model": name, **found.to_dict(), "value": found.value, "values": values})

    @app.get("/v1/models", responses={200: {"model": Models}})
    async def models() -> JSONResponse:
        shape = {key: getattr(model.config, key) for key in ("cell", "layers", "hidden", "embedding")}
        only = {"id": name, "object": "model", "created": since, "owned_by": "longshort", **shape}
        return JSONResponse({"object": "list", "data": [only]})

    @app.get("/healthz", responses={200: {"model": Health}})
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}  # not text, as the figures are
    refusals = {status: {"description": of["description"], "content": refusal} for status, of in REFUSALS.items()}

    @app.get("/metrics", response_class=PlainTextResponse, responses=refusals)
    async def metrics() -> PlainTextResponse:
        figures = (
            ("requests_total", "counter", counts.requests),
            ("failures_total", "counter", counts.failed),
            ("characters_written_total", "counter", scheduler.characters),
            ("texts_being_written", "gauge", scheduler.texts),
        )
        lines = (f"# TYPE longshort_{what} {kind}\nlongshort_{what} {figure}\n" for what, kind, figure in figures)
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    page = resources.files("longshort.serving") / "page"
    for path, file, kind in (
        ("/", "page.html", "text/html"),
        ("/page.js", "page.js", "text/javascript"),
        ("/page.css", "page.css", "text/css"),
        ("/icon.svg", "icon.svg", "image/svg+xml"),
    ):
        app.get(path, include_in_schema=False)(_fixed((page / file).read_bytes(), kind))
    return app


def _queue() -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
    """Return a queue of this event loop, and what puts something there from another thread."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def tell(what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            loop.call_soon_threadsafe(queue.put_nowait, what)

    return queue, tell


def _result(found: Any) -> Any:
    if isinstance(found, Exception):
        raise found
    return found


async def _pieces(scheduler: Scheduler, requests: list[generation.Request]) -> AsyncIterator[list[Piece]]:
    """Yield what the texts grow by, until all have ended; an empty list after `PING` seconds without news."""
    queue, tell = _queue()
    job, left = scheduler.write(requests, tell, SECONDS), len(requests)
    try:
        while left:
            try:
                pieces = _result(await asyncio.wait_for(queue.get(), PING))
            except TimeoutError:
                pieces = []
            left -= sum(piece.end is not None for piece in pieces)
            yield pieces
    finally:
        job.cancel()


async def _gather(news: AsyncIterator[list[Piece]], number: int) -> tuple[list[str], list[str | None]]:
    """Return the texts, and why each has ended."""
    texts, reasons = [""] * number, list[str | None]([None] * number)
    async for pieces in news:
        for piece in pieces:
            texts[piece.number] += piece.text
            reasons[piece.number] = piece.end
    return texts, reasons


async def _events(news: AsyncIterator[list[Piece]], head: dict[str, Any], begin: str) -> AsyncIterator[str]:
    """Yield the pieces as server-sent events; each text begins with `begin`."""
    begun = set[int]()
    async for pieces in news:
        choices = []
        for piece in pieces:
            text = piece.text if piece.number in begun else begin + piece.text
            begun.add(piece.number)
            choices.append(_choice(piece.number, text, piece.end))
        yield f"data: {json.dumps({**head, 'choices': choices})}\n\n" if choices else ": still here\n\n"
    yield "data: [DONE]\n\n"


async def _chain(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in events:
        yield event


async def _unless_gone(work: Coroutine[Any, Any, Any], request: Request) -> Any:
    """Return what the work gives; where the client goes away meanwhile, stop it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "The client has gone.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _choice(number: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def _said_of(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return what is wrong with a body, in words, and the field.

    Of a field that may be of two types there is an error for each: what fits one of them in type comes first.
    """
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    # Pydantic names the type that was tried among the places.
    parts = [part for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    place = "" if first["type"] == "json_invalid" else ".".join(map(str, parts))
    words = "the server does not have this field" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{place or 'body'}: {words}", place or None


def _fixed(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    """Return a route that gives always the same."""

    async def give() -> Response:
        return Response(content, media_type=kind)

    return give
