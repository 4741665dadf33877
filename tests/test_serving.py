"""The server writes what `generate` writes, for whoever asks and however many do; and whom it does not answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import campaign
from conftest import ROOT
from longshort import native, training
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.errors import UsageError
from longshort.generation import Request, Sampling, Writing, generate
from longshort.inspection import inspect
from longshort.interruption import Interruption
from longshort.scoring import score
from longshort.serving import bodies, guard, routes, server
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer

testclient = pytest.importorskip("fastapi.testclient", reason="FastAPI is not installed")

CHARACTERS = CharTokenizer("abcdefgh .\n")
TOKEN = "a token of enough characters"


def decoder(tokenizer: Any = CHARACTERS) -> Decoder:
    """Return a model with random weights."""
    import torch

    torch.manual_seed(0)
    model = training.make_model(TrainConfig(hidden=24, embedding=8), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Decoder(model.config, model.weights(), tokenizer)


MODEL, PLAIN = decoder(), decoder()
PLAIN._native = None  # as where there is no library


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """What asks an application with a guard that lets this machine in."""
    app = guard.Guard(routes.application(MODEL, "tiny"), guard.Rules(hosts=("127.0.0.1", "localhost")))
    with testclient.TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as found:
        yield found


def written(prompt: str, length: int, stream: int = 0, stop: tuple[str, ...] = (), **sampling: Any) -> str:
    return "".join(generate(MODEL, CHARACTERS, prompt, length, Sampling(**sampling), stop=stop, stream=stream))


def events(answer: Any) -> list[dict[str, Any]]:
    """Return what the events of a stream hold, the last of which says that it is done."""
    found = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event.startswith("data: ")]
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


# ------------------------------------------------------------------------------------------------- what it answers


@settings(max_examples=30)
@given(
    prompt=st.text("abc .\n", max_size=12),
    length=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.sampled_from([1, 1.0, 0.6]),
    seed=st.integers(0, 2**64 - 1),
    n=st.integers(1, 3),
    stop=st.sampled_from([(), ("a",), ("ab", ".")]),
    echo=st.booleans(),
)
def test_texts_are_those_of_generate_at_once_and_as_they_grow(
    client: Any, prompt: str, length: int, n: int, stop: tuple[str, ...], echo: bool, top_p: float, **sampling: Any
) -> None:
    body = {"prompt": prompt, "max_tokens": length, "n": n, "echo": echo, "top_p": top_p, **sampling}
    body["stop"] = "a" if stop == ("a",) else list(stop)
    limit = None if top_p == 1 else top_p
    texts = [written(prompt, length, stream, stop, top_p=limit, **sampling) for stream in range(n)]
    whole = client.post("/v1/completions", json=body).json()
    begin = prompt if echo else ""
    assert [choice["text"] for choice in whole["choices"]] == [begin + text for text in texts]
    assert [choice["index"] for choice in whole["choices"]] == list(range(n))
    reasons = ["stop" if len(text) < length else "length" for text in texts]
    assert [choice["finish_reason"] for choice in whole["choices"]] == reasons
    tokens = {"prompt_tokens": len(prompt), "completion_tokens": sum(map(len, texts))}
    assert whole["usage"] == {**tokens, "total_tokens": sum(tokens.values())}
    assert (whole["seed"], whole["model"], whole["object"]) == (sampling["seed"], "tiny", "text_completion")
    grown, ends = [""] * n, [""] * n
    for event in events(client.post("/v1/completions", json={**body, "stream": True})):
        for choice in event["choices"]:
            assert not ends[choice["index"]]
            grown[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ""
    assert (grown, ends) == ([begin + text for text in texts], reasons)


def test_many_at_once_get_what_each_gets_alone(client: Any) -> None:
    def ask(number: int) -> tuple[str, str]:
        body = {"prompt": "abc"[: number % 4], "max_tokens": 20 + 37 * number, "seed": number, "temperature": 1.3}
        answer = client.post("/v1/completions", json={**body, "stream": bool(number % 2)})
        if number % 2:
            return "".join(event["choices"][0]["text"] for event in events(answer)), str(body)
        return answer.json()["choices"][0]["text"], str(body)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(48)))
    for number, (text, body) in enumerate(found):
        assert text == written("abc"[: number % 4], 20 + 37 * number, seed=number, temperature=1.3), body


def test_a_seed_that_is_not_given_is_told_and_gives_the_text_again(client: Any) -> None:
    asked = {"prompt": "ab", "max_tokens": 30}
    first, second = (client.post("/v1/completions", json=asked).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post("/v1/completions", json={**asked, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]


def test_a_stream_never_splits_a_character() -> None:
    model = decoder(ByteTokenizer())
    with testclient.TestClient(routes.application(model, "bytes"), "http://127.0.0.1") as client:
        body = {"prompt": "é", "max_tokens": 400, "seed": 3, "temperature": 1.2}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        pieces = [
            event["choices"][0]["text"]
            for event in events(client.post("/v1/completions", json={**body, "stream": True}))
        ]
        assert (
            "".join(pieces)
            == whole
            == "".join(generate(model, ByteTokenizer(), "é", 400, Sampling(seed=3, temperature=1.2)))
        )


@settings(max_examples=20)
@given(lines=st.lists(st.text("abcé .", max_size=30), min_size=1, max_size=5))
def test_lines_are_scored_as_score_does(client: Any, lines: list[str]) -> None:
    found = client.post("/v1/score", json={"lines": lines}).json()["lines"]
    for line, wanted in zip(found, score(MODEL, lines), strict=True):
        assert line["bits_per_character"] == wanted.bits_per_character
        assert (line["line"], line["characters"], line["unknown"]) == (wanted.line, wanted.characters, wanted.unknown)
        assert line["symbol_bits"] == pytest.approx(wanted.symbol_bits.tolist(), abs=1e-4)
        assert line["symbol_characters"] == wanted.symbol_characters.tolist()


def test_what_is_inside_is_what_inspect_finds(client: Any) -> None:
    text = "abc abc. " * 30
    found = client.post("/v1/inspect", json={"text": text, "unit": 5}).json()
    wanted = inspect(MODEL, CHARACTERS, text)
    assert found["values"] == pytest.approx(wanted.unit(0, 5).tolist(), abs=1e-4)
    assert found["value"] == "tanh c"
    assert found["nats"][0] is None
    assert found["nats"][1:] == pytest.approx(wanted.nats[1:].tolist())
    assert "".join(found["symbols"]) == text
    assert client.post("/v1/inspect", json={"text": "ab"}).json()["values"] is None
    for beyond in ({"layer": 1}, {"unit": 24}):
        answer = client.post("/v1/inspect", json={"text": "ab", **beyond})
        assert (
            answer.status_code,
            "1 layer of 24 units, counted from 0; there is no layer" in answer.json()["error"]["message"],
        ) == (400, True)


def test_the_model_and_the_counts_are_told(client: Any) -> None:
    (only,) = client.get("/v1/models").json()["data"]
    assert (only["id"], only["cell"], only["layers"], only["hidden"]) == ("tiny", "lstm", 1, 24)
    before, after = dict[str, int](), dict[str, int]()
    for counts in (before, after):
        page = client.get("/metrics").text
        counts |= {name: int(value) for name, value in re.findall(r"^(longshort_\w+) (\d+)$", page, re.MULTILINE)}
        client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 25})
    assert after["longshort_requests_total"] == before["longshort_requests_total"] + 1
    assert after["longshort_characters_written_total"] == before["longshort_characters_written_total"] + 25
    assert after["longshort_texts_being_written"] == 0
    assert client.get("/healthz").json() == {"status": "ok"}


# ---------------------------------------------------------------------------------------------- what it does not do


def test_every_number_and_text_has_a_least_and_a_most(client: Any) -> None:
    right = {"prompt": "ab", "max_tokens": 3, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "max_tokens": [-1, 0, bodies.MOST_TOKENS + 1, 2**31, 2**63, 1.5, "3", True, None],
        "temperature": [-0.1, 100.1, "1", None],
        "top_p": [0, -1, 1.01, None],
        "top_k": [0, -1, 2**31, 2**63, 1.5],
        "n": [0, -1, bodies.MOST_TEXTS + 1, 2**31],
        "seed": [-1, 2**64, 1.5],
        "stop": [[""], "", ["a"] * (bodies.MOST_STOPS + 1), ["a" * (bodies.MOST_STOP + 1)], 3, [3]],
        "prompt": ["a" * (bodies.MOST_PROMPT + 1), None, 3, ["ab"]],
        "model": ["other", 3, "x" * 257],
        "stream": [1, "yes"],
        "logprobs": [1],
        "best_of": [2],
    }
    assert client.post("/v1/completions", json=right).status_code == 200
    for field, values in wrong.items():
        for value in values:
            answer = client.post("/v1/completions", json={**right, field: value})
            assert answer.status_code == (404 if (field, value) == ("model", "other") else 400), (field, value)
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert field in error["message"]
    edges: dict[str, list[Any]] = {
        "max_tokens": [1],
        "temperature": [0, 100],
        "top_p": [1e-9],
        "top_k": [1, 2**31 - 1],
        "n": [bodies.MOST_TEXTS],
        "seed": [0, 2**64 - 1],
        "stop": [["a" * bodies.MOST_STOP] * bodies.MOST_STOPS, None],
        "model": ["tiny", None],
    }
    for field, value in ((field, value) for field, values in edges.items() for value in values):
        assert client.post("/v1/completions", json={**right, field: value}).status_code == 200, (field, value)
    too_many, too_long = ["a"] * (bodies.MOST_LINES + 1), ["a" * (bodies.MOST_CHARACTERS_OF_LINES + 1)]
    for lines in ([], ["a\nb"], too_many, too_long, "a", [3]):
        assert client.post("/v1/score", json={"lines": lines}).status_code == 400
    long = "a" * (bodies.MOST_INSPECTED + 1)
    for looked in ({"text": ""}, {"text": long}, {"text": "a", "layer": -1}, {"text": "a", "unit": -1}):
        assert client.post("/v1/inspect", json=looked).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "prompt": 3}',
    ],
)
def test_a_body_that_is_not_right_is_the_askers_fault(client: Any, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
fields = [*bodies.CompletionRequest.model_fields, "lines", "text", "layer", "unit", "suffix"]


@campaign.long
def test_whatever_is_sent_nothing_fails(client: Any) -> None:
    with campaign.trials("a request of random fields to the server", short=150, long=10_000) as trials:
        count = iter(trials)

        @settings(max_examples=trials.count)
        @given(
            route=st.sampled_from(["completions", "score", "inspect", "models", "nothing"]),
            method=st.sampled_from(["POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS"]),
            body=st.dictionaries(st.sampled_from(fields), json_values, max_size=5),
            right=st.booleans(),
        )
        def send(route: str, method: str, body: dict[str, Any], right: bool) -> None:
            next(count, None)
            content = json.dumps({"prompt": "a", "max_tokens": 2, **body} if right else body).encode()
            head = {"content-type": "application/json"}
            assert client.request(method, f"/v1/{route}", content=content, headers=head).status_code < 500

        send()


def test_a_prompt_that_the_model_knows_nothing_of_fails_alone(client: Any) -> None:
    for stream in (False, True):
        answer = client.post("/v1/completions", json={"prompt": "XYZ", "stream": stream})
        assert answer.status_code == 400
        assert "never saw any character" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200


def test_an_error_in_the_model_is_told_without_its_words_and_the_server_goes_on(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("a secret")

    lines = "nats_of_lines" if native.ready() else "nats"
    for name, path, body in (
        ("write", "/v1/completions", {"prompt": "ab"}),
        ("logits", "/v1/completions", {"prompt": "ab"}),
        (lines, "/v1/score", {"lines": ["ab"]}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, name, fail)
            answer = client.post(path, json=body)
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        assert answer.json()["error"]["type"] == "server_error"
        assert client.post(path, json=body).status_code == 200


def test_a_text_ends_when_its_time_is_over(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SECONDS", 0.0)
    (choice,) = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 16_384}).json()["choices"]
    assert choice["finish_reason"] == "time"
    assert len(choice["text"]) < 16_384


# ------------------------------------------------------------------------------------------------------ the guard


@contextlib.contextmanager
def guarded(**rules: Any) -> Iterator[Any]:
    app = guard.Guard(routes.application(MODEL, "tiny"), guard.Rules(**rules))
    with testclient.TestClient(app, "http://127.0.0.1:8000") as client:
        yield client


def test_every_route_but_one_wants_the_token() -> None:
    app = routes.application(MODEL, "tiny")
    found: list[Any] = app.routes
    paths = {route.path: next(iter(route.methods)) for route in found}
    assert {"/", "/page.js", "/v1/completions", "/v1/score", "/v1/inspect", "/metrics", "/openapi.json"} <= set(paths)
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    with testclient.TestClient(guard.Guard(app, guard.Rules(token=TOKEN)), "http://127.0.0.1") as client:
        for path, method in paths.items():
            statuses = [
                client.request(method, path, headers=headers).status_code
                for headers in (
                    {},
                    {"authorization": f"Bearer {TOKEN}x"},
                    {"authorization": "Bearer "},
                    {"authorization": "Basic !"},
                    {"authorization": b"Basic \xe9"},
                    {"authorization": TOKEN},
                    {"authorization": f"Bearer {TOKEN}"},
                    {"authorization": f"basic {basic}"},
                )
            ]
            let_in = 400 if method == "POST" else 200  # a body is missing
            assert statuses == [200] * 8 if path == "/healthz" else [401] * 6 + [let_in] * 2, path
        assert client.get("/nothing").status_code == 401
        assert client.get("/").headers["www-authenticate"].startswith("Basic")


def test_other_names_and_other_pages_are_refused(client: Any) -> None:
    for host, status in (
        ("127.0.0.1:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("", 400),
        ("[::1]:8000", 400),
    ):
        assert client.get("/v1/models", headers={"host": host}).status_code == status, host
    for origin, status in (
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:9000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://[::1", 403),
        ("http://[x]", 403),
    ):
        assert client.get("/v1/models", headers={"origin": origin}).status_code == status, origin
    answer = client.options("/v1/completions", headers={"origin": "http://127.0.0.1:8000"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_that_is_too_long_is_refused() -> None:
    with guarded(body_bytes=1000) as client:
        told = client.post("/v1/completions", content=b"x" * 1001)
        untold = client.post("/v1/completions", content=iter([b"x" * 600] * 2))
        fits = client.post("/v1/completions", content=b"x" * 1000)
    assert [answer.status_code for answer in (told, untold, fits)] == [413, 413, 400]
    assert "1,000 bytes" in told.json()["error"]["message"]


def test_more_than_so_many_requests_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    plain = Decoder.write

    def wait(self: Decoder, *given: Any, **named: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return plain(self, *given, **named)

    monkeypatch.setattr(Decoder, "write", wait)
    with guarded(requests=1) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/completions", json={"prompt": "ab"})
        assert entered.wait(60)
        refused, health = client.post("/v1/completions", json={"prompt": "ab"}), client.get("/healthz")
        leave.set()
        assert (refused.status_code, refused.headers["retry-after"], health.status_code) == (503, "1", 200)
        assert first.result().status_code == 200
        assert client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200


def test_the_page_is_ours_alone_and_puts_text_as_text(client: Any) -> None:
    page, script, style = (client.get(path) for path in ("/", "/page.js", "/page.css"))
    assert [answer.headers["content-type"].partition(";")[0] for answer in (page, script, style)] == [
        "text/html",
        "text/javascript",
        "text/css",
    ]
    for answer in (page, script, style, client.get("/nothing")):
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "://" not in answer.text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script.text
    assert not re.search(r"<script>|<style|\bstyle=|\bon\w+=|javascript:", page.text)
    assert set(re.findall(r'at\("([\w-]+)"\)', script.text)) <= set(re.findall(r'id="([\w-]+)"', page.text))


def test_no_path_leads_to_a_file(client: Any) -> None:
    tries = ["page.html", "page/page.html", "%2e%2e/routes.py", "..\\routes.py", "page.js/../page.html"]
    for up in ("../", "%2e%2e%2f", "..%2f", "%2e%2e/", "..;/", "%252e%252e/", "..%c0%af", "....//"):
        for depth in range(1, 8):
            tries += [f"{up * depth}{name}" for name in ("etc/passwd", "pyproject.toml")]
    for path in tries:
        assert client.get(f"/{path}").status_code == 404, path


def test_who_takes_nothing_of_an_answer_is_let_go() -> None:
    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise AssertionError("what was sent was not taken")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) > 1:
            await asyncio.Event().wait()

    scope: Any = {"type": "http", "path": "/", "headers": []}
    asyncio.run(guard.Guard(answer, guard.Rules(seconds=0.01))(scope, receive, send))
    assert sent == ["http.response.start", "http.response.body"]


# ------------------------------------------------------------------------------------------------- on a socket


class Running:
    """A server in a thread of this process."""

    def __init__(self, model: Any = MODEL, **rules: Any) -> None:
        self._interruption = Interruption()
        listening = threading.Event()
        self.port = 0

        def started(address: str) -> None:
            self.port = int(address.rpartition(":")[2])
            listening.set()

        given = (model, "tiny", "127.0.0.1", 0, guard.Rules(**rules), self._interruption, started)
        self._thread = threading.Thread(target=server.serve, args=given)
        self._thread.start()
        assert listening.wait(60)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._interruption.signal = signal.SIGTERM
        self._thread.join(60)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        found.settimeout(60)
        return found

    def get(self, path: str) -> str:
        with self.connect() as asking:
            asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return read_all(asking)


def read_all(asking: socket.socket) -> str:
    """Return what comes until the other side closes."""
    parts = []
    while part := asking.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def posted(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + content


def test_who_is_too_slow_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    with Running(seconds=0.3) as running:
        with running.connect() as silent:
            assert read_all(silent) == ""
        with running.connect() as half_a_head:
            half_a_head.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            assert read_all(half_a_head) == ""
        with running.connect() as half_a_body:
            half_a_body.sendall(posted({"prompt": "ab"})[:-3])
            assert read_all(half_a_body).startswith("HTTP/1.1 408 ")
        with running.connect() as second_half_head:
            second_half_head.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            assert read_all(second_half_head).startswith("HTTP/1.1 200 ")
        with running.connect() as too_long:
            too_long.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000)
            assert read_all(too_long).startswith("HTTP/1.1 400 ")
        assert running.get("/healthz").startswith("HTTP/1.1 200 ")


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true; a test must not depend on how long that takes."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_written_for_no_longer(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Decoder.write

    def slowly(self: Decoder, logits: Any, state: Any, draws: Any, steps: int, **named: Any) -> Any:
        time.sleep(0.02)
        return plain(self, logits, state, draws, steps, **named)

    monkeypatch.setattr(Decoder, "write", slowly)
    with Running() as running:

        def being_written() -> bool:
            return "longshort_texts_being_written 0" not in running.get("/metrics")

        with running.connect() as asking:
            asking.sendall(posted({"prompt": "ab", "max_tokens": 16_384, "stream": stream}))
            until(being_written)
        until(lambda: not being_written())


def test_the_client_of_openai_reads_it() -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with Running(token=TOKEN) as running:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=TOKEN)
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "prompt": "ab", "max_tokens": 40, "temperature": 0.9, "seed": 5}
        wanted = written("ab", 40, temperature=0.9, seed=5)
        answer = client.completions.create(**asked)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "length")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 40
        assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == wanted
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            client.completions.create(**asked, logprobs=3)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=client.base_url, api_key="another").models.list()
        client.close()


# ----------------------------------------------------------------------------------------------------- the verb


def test_addresses_that_others_reach_want_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSHORT_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert server.rules(host, ()).hosts is not None
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UsageError, match="LONGSHORT_TOKEN"):
            server.rules(host, ())
    monkeypatch.setenv("LONGSHORT_TOKEN", TOKEN)
    assert server.rules("0.0.0.0", ()) == guard.Rules(token=TOKEN)
    named = server.rules("0.0.0.0", ("Name.example",)).hosts
    assert named == ("localhost", "127.0.0.1", "::1", "0.0.0.0", "name.example")
    assert server.rules("127.0.0.1", ()).token == TOKEN
    monkeypatch.setenv("LONGSHORT_TOKEN", "short")
    with pytest.raises(UsageError, match="16 characters, not 5"):
        server.rules("127.0.0.1", ())


def saved(folder: Path) -> Path:
    """Train for a moment and return the run."""
    text = folder / "text.txt"
    text.write_text("abc abc. " * 300, encoding="utf-8")
    run = folder / "run"
    flags = ["--hidden", "8", "--embedding", "4", "--steps", "3", "--batch-size", "2", "--seq-len", "8"]
    assert main(["train", str(text), "--out", str(run), *flags]) == 0
    return run


def test_the_verb_serves_until_a_signal_and_ends_what_it_has_begun(tmp_path: Path) -> None:
    run = saved(tmp_path)
    environment = {**os.environ, "LONGSHORT_TOKEN": TOKEN}
    command = [sys.executable, "-m", "longshort", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"run answers at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as asking:
            body = {"prompt": "abc", "max_tokens": 16_384, "stream": True}
            head, _, content = posted(body).partition(b"\r\n\r\n")
            asking.sendall(head + f"\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n".encode() + content)
            first = asking.recv(10)
            process.send_signal(signal.SIGTERM)
            whole = (first + read_all(asking).encode()).decode()
        assert whole.startswith("HTTP/1.1 200 ")
        assert "data: [DONE]" in whole
        assert process.wait(60) == 143
        assert process.stderr.read() == "longshort: stopped.\n"


def test_what_cannot_be_served_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, status, words in (
            (["--port", port], 1, f"Cannot listen on port {port} of 127.0.0.1"),
            (["--port", "65536"], 2, "--port must be from 0 to 65535"),
            (["--host", "0.0.0.0"], 2, "LONGSHORT_TOKEN"),
            (["--host", "no such name"], 2, "LONGSHORT_TOKEN"),
        ):
            capsys.readouterr()
            assert main(["serve", str(run), *arguments]) == status
            said = capsys.readouterr().err
            assert words in said
            assert len(said.splitlines()) <= 3
    monkeypatch.setenv("LONGSHORT_TOKEN", TOKEN)
    assert main(["serve", str(run), "--host", "no such name"]) == 1
    assert "Cannot listen" in capsys.readouterr().err
    for host in ("a..b", "x" * 64, "\udcff"):
        assert main(["serve", str(run), "--host", host]) == 2
        said = capsys.readouterr().err
        assert said == f"longshort: --host must be an address or a name, not {host!r}.\n"
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    monkeypatch.setattr("longshort.machine.version_of", lambda _package: None)
    assert main(["serve", str(run)]) == 1
    assert "pip install 'longshort[serve]'" in capsys.readouterr().err


def test_a_folder_whose_name_is_no_text_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path).rename(tmp_path / os.fsdecode(b"caf\xe9"))
    given: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *those: given.extend(those))
    assert main(["serve", str(run)]) == 143
    model, name = given[:2]
    with testclient.TestClient(routes.application(model, name), "http://127.0.0.1") as client:
        assert [only["id"] for only in client.get("/v1/models").json()["data"]] == ["caf\ufffd"]
        answer = client.post("/v1/completions", json={"prompt": "abc", "model": "caf\ufffd"})
        assert (answer.status_code, answer.json()["model"]) == (200, "caf\ufffd")


def test_the_description_names_what_is_answered(client: Any) -> None:
    described = client.get("/openapi.json").json()
    for path, body, wanted in (
        ("/v1/completions", {"prompt": "ab"}, bodies.CompletionAnswer),
        ("/v1/completions", {"prompt": "ab", "stream": True, "n": 2}, bodies.CompletionAnswer),
        ("/v1/score", {"lines": ["ab", ""]}, bodies.ScoreAnswer),
        ("/v1/inspect", {"text": "ab" * 50, "unit": 1}, bodies.InspectAnswer),
        ("/v1/inspect", {"text": "a"}, bodies.InspectAnswer),
        ("/v1/models", None, bodies.Models),
        ("/healthz", None, bodies.Health),
        ("/metrics", None, None),
    ):
        (operation,) = described["paths"][path].values()
        assert {*operation["responses"]} == {"200", "4XX", "5XX"}, path
        answer = client.post(path, json=body) if body else client.get(path)
        content = operation["responses"]["200"]["content"]
        assert answer.headers["content-type"].partition(";")[0] in content
        for found in events(answer) if "stream" in (body or {}) else [answer.json()] if wanted else []:
            assert wanted
            wanted.model_validate(found)
            assert content["application/json"]["schema"]["$ref"].endswith(f"/{wanted.__name__}")
        schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Problem"}
    bodies.Problem.model_validate(client.get("/v1/nothing").json())
    lines = described["components"]["schemas"]["ScoreRequest"]["properties"]["lines"]["items"]
    assert lines["pattern"] == r"^[^\n]*$"  # JSON Schema's expressions are JavaScript's, which has no \A


def test_the_page_about_it_is_true(client: Any) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    asked = re.findall(r"^curl (?:-N )?localhost:8000(\S+)(?: --json '(.*)')?$", page, re.MULTILINE)
    assert [path for path, _ in asked].count("/v1/completions") == 2
    for path, body in asked:
        answer = client.post(path, json=json.loads(body)) if body else client.get(path)
        assert answer.status_code == 200, (path, answer.text)
    described = client.get("/openapi.json").json()["paths"]
    for path in [*described, "/openapi.json"]:
        assert f"{path}` |" in page, path
    fields = bodies.CompletionRequest.model_fields
    assert {*re.findall(r"`(\w+)`(?: \(\d+\))?[,;] ", page.partition("/v1/completions` |")[2].partition("\n")[0])} >= {
        *fields
    } - {"model"}
    found = json.loads((ROOT / "benchmarks" / "results" / "2026-11-27-serving.json").read_text(encoding="utf-8"))
    one, many, idle = found["one_client"], found["many_clients"], found["idle_connections"]
    refused, soak, characters = found["request_129"], found["soak"], "characters_per_second"
    times = f"half of the requests within {many['median_ms']:.0f} ms, 99 % within {many['p99_ms']:.0f} ms"
    for row in (
        f"| one client | {one['median_ms']:.1f} ms a request, {one[characters]:,.0f} characters a second |",
        f"| {many['clients']} clients | {many['requests_per_second']:.0f} requests and {many[characters]:,.0f} "
        f"characters a second, {times} |",
        f"| `/healthz` beside {idle['number']:,} open connections | 99 % within {idle['health']['p99_ms']:.1f} ms; "
        f"{idle['megabytes']:.1f} MB more memory |",
        f"| request 129, where 128 are being answered | refused in {refused['ms']:.1f} ms |",
        f"| {soak['requests']:,} more requests | no more memory |",
    ):
        assert row in page, row
    assert (refused["status"], soak["megabytes_more"] <= 0) == (503, True)


# ----------------------------------------------------------------------------------- texts that join and leave


@settings(max_examples=25)
@given(data=st.data())
def test_texts_that_join_and_leave_are_those_that_they_are_alone(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([MODEL, PLAIN]), "model")
    writing, dropped = Writing(model, CHARACTERS), set[int]()
    texts, requests = dict[int, str](), dict[int, Request]()
    for turn in range(data.draw(st.integers(1, 6), "turns")):
        for _ in range(data.draw(st.integers(0, 3), "joining")):
            request = Request(
                prompt=data.draw(st.text("abc .", max_size=4)),
                length=data.draw(st.integers(0, 40)),
                sampling=Sampling(seed=turn, temperature=1.2),
                stream=len(requests),
                stop=data.draw(st.sampled_from([(), ("b",)])),
            )
            number = writing.add(request)
            texts[number], requests[number] = "", request
        one_leaves = data.draw(st.booleans(), "leaving")
        if texts and one_leaves:
            leaving = data.draw(st.sampled_from(sorted(texts)))
            dropped |= {leaving} & set(writing.numbers)
            writing.drop(leaving)
        for number, piece in writing.advance():
            texts[number] += piece
    while writing.numbers:
        for number, piece in writing.advance():
            texts[number] += piece
    for number, request in requests.items():
        pieces = generate(
            model, CHARACTERS, request.prompt, request.length, request.sampling, stop=request.stop, stream=number
        )
        alone = "".join(pieces)
        assert alone.startswith(texts[number]) if number in dropped else alone == texts[number]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"prompt": "a", "stop": ["a"] * (bodies.MOST_STOPS + 1)}, "stop", "stop: List should have at most 4 items"),
        ({"prompt": "a", "stop": [""]}, "stop.0", "stop.0: String should have at least 1 character"),
        ({"prompt": "a", "stop": ""}, "stop", "stop: String should have at least 1 character"),
        ({"prompt": "a", "logprobs": 1}, "logprobs", "logprobs: the server does not have this field"),
        ({"prompt": 3}, "prompt", "prompt: Input should be a valid string"),
    ],
)
def test_what_is_wrong_is_said_of_its_field(client: Any, body: dict[str, Any], field: str, words: str) -> None:
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(words)


def test_what_is_no_json_has_no_field(client: Any) -> None:
    answer = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.json()["error"]["param"] is None
    assert answer.json()["error"]["message"].startswith("body: JSON decode error")
