"""What the server takes and gives, as FastAPI checks and describes it.

Every number and text that is sent has a least and a most, and a field that is not known is refused by its name. Answers
are described here alone: routes write them without another look, and a test holds them to this.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MOST_PROMPT, MOST_TOKENS, MOST_TEXTS, MOST_STOPS, MOST_STOP = 32_768, 16_384, 8, 4, 256
"""Of a completion: characters of its prompt, symbols to write, texts, stops, characters of a stop."""
MOST_LINES, MOST_CHARACTERS_OF_LINES = 1_024, 65_536
"""Of a request for scores: lines, and characters of all of them together."""
MOST_INSPECTED = 4_096
"""Characters of a text that is looked into."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = Field(None, max_length=256, description="The name of the model, if it is given at all.")


Stop = Annotated[str, StringConstraints(min_length=1, max_length=MOST_STOP)]


class CompletionRequest(_Body):
    """What `POST /v1/completions` takes; defaults are OpenAI's."""

    prompt: str = Field(max_length=MOST_PROMPT)
    max_tokens: int = Field(16, ge=1, le=MOST_TOKENS, description="Symbols to write.")
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_TEXTS, description="Texts.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, le=2**64 - 1, description="If not given one is drawn, and told.")
    stream: bool = False
    echo: bool = Field(False, description="Begin the text with the prompt.")


class ScoreRequest(_Body):
    """What `POST /v1/score` takes."""

    lines: list[Annotated[str, StringConstraints(pattern=r"^[^\n]*$")]] = Field(min_length=1, max_length=MOST_LINES)


class InspectRequest(_Body):
    """What `POST /v1/inspect` takes."""

    text: str = Field(min_length=1, max_length=MOST_INSPECTED)
    layer: int = Field(0, ge=0, le=1_000)
    unit: int | None = Field(None, ge=0, le=1_000_000, description="Tell what this unit had at every symbol.")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Failure(_Answer):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field that is not right, if it is one.")
    code: None


class Problem(_Answer):
    """An error, in the shape that OpenAI's clients read."""

    error: Failure


class Choice(_Answer):
    """A text, or with `stream` what it has grown by."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length", "time"] | None = Field(description="Why it has ended, if it has.")


class Usage(_Answer):
    """Symbols."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(_Answer):
    """What `POST /v1/completions` gives; each event of a stream is the same without `usage`."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    seed: int
    choices: list[Choice]
    usage: Usage | None = None


class ScoredLine(_Answer):
    """What one line costs."""

    line: int = Field(description="Its number, from 1.")
    characters: int
    bits_per_character: float
    unknown: int = Field(description="Symbols that the model has never seen.")
    symbol_characters: list[int] = Field(description="How many characters each symbol stands for.")
    symbol_bits: list[float] = Field(description="Bits of each symbol; the closing newline's come last.")


class ScoreAnswer(_Answer):
    """What `POST /v1/score` gives."""

    object: Literal["list"]
    model: str
    lines: list[ScoredLine]


class Gate(_Answer):
    """How a gate, or a tensor of the state, behaves; `longshort.inspection.Gate`."""

    layer: int
    name: str
    mean: float
    shut: float | None
    open: float


class Memory(_Answer):
    """How long the units of a layer remember."""

    layer: int
    gate: str
    half_life: dict[str, float] = Field(description="Symbols, by the share of the units that do not exceed them.")


class Following(_Answer):
    """The unit that follows an aspect of the text the closest."""

    aspect: str
    layer: int
    unit: int
    value: str
    chosen: float = Field(description="Correlation on the first half of the text, by which the unit was chosen.")
    correlation: float = Field(description="On the second half.")


class InspectAnswer(_Answer):
    """What `POST /v1/inspect` gives."""

    model: str
    cell: str
    layers: int
    hidden: int
    tokens: int
    nats_per_token: float | None
    gates: list[Gate]
    memory: list[Memory]
    following: list[Following]
    symbols: list[str]
    nats: list[float | None] = Field(description="Of each symbol; null where nothing could be predicted.")
    value: str = Field(description="What of a unit `values` and `following` are about.")
    values: list[float] | None = Field(description="Of the unit that was asked for, at each symbol.")


class Model(_Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["longshort"]
    cell: str
    layers: int
    hidden: int
    embedding: int | None


class Models(_Answer):
    """What `GET /v1/models` gives."""

    object: Literal["list"]
    data: list[Model]


class Health(_Answer):
    """What `GET /healthz` gives."""

    status: Literal["ok"]


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "What was asked for cannot be; the message says why."},
    "5XX": {"model": Problem, "description": "The server is at fault, or has too much to do."},
}


def problem(status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error in the shape that OpenAI's clients read."""
    kind: Literal["invalid_request_error", "server_error"] = "invalid_request_error"
    if status >= 500:
        kind = "server_error"
    error = Failure(message=message, type=kind, param=field, code=None)
    return JSONResponse(Problem(error=error).model_dump(), status, headers)
