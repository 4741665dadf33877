"""`longshort serve` under load: how quickly it answers, how much it writes, what it keeps.

    python benchmarks/serving.py MODEL > FILE

Client and server share the machine. A request asks for 200 symbols; the model is read once and never trained.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longshort import decoder, machine
from longshort.bench import ledger

LENGTH, WARM, ALONE, CLIENTS, TOGETHER, IDLE, HEALTH, SOAK = 200, 200, 300, 64, 4_000, 1_000, 500, 10_000


def asked(length: int = LENGTH, texts: int = 1, stream: bool = False) -> bytes:
    """Return a request for so many symbols of so many texts."""
    body = json.dumps({"prompt": "The ", "max_tokens": length, "seed": 1, "n": texts, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


HEALTHY = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return status and body of an answer that tells its length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = re.search(r"content-length: (\d+)", head)
    assert length, head
    return int(head.split()[1]), await reader.readexactly(int(length[1]))


async def seconds_of(port: int, request: bytes, number: int) -> list[float]:
    """Return the time of each of `number` requests on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = []
    for _ in range(number):
        begin = time.perf_counter()
        writer.write(request)
        status, _ = await answer(reader)
        found.append(time.perf_counter() - begin)
        assert status == 200, status
    writer.close()
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median and 99th percentile, in milliseconds."""
    last = statistics.quantiles(seconds, n=100)[98]
    return {"median_ms": 1e3 * statistics.median(seconds), "p99_ms": 1e3 * last}


def resident(process: int) -> float:
    """Return the memory that a process holds, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) / 1e3


async def measure(port: int, process: int) -> dict[str, Any]:
    """Return all figures of a server that runs."""
    found: dict[str, Any] = {}
    await seconds_of(port, asked(), WARM)
    begin = time.perf_counter()
    found["one_client"] = spread(await seconds_of(port, asked(), ALONE))
    found["one_client"]["characters_per_second"] = ALONE * LENGTH / (time.perf_counter() - begin)
    begin = time.perf_counter()
    parts = await asyncio.gather(*(seconds_of(port, asked(), TOGETHER // CLIENTS) for _ in range(CLIENTS)))
    seconds = time.perf_counter() - begin
    found["many_clients"] = {"clients": CLIENTS, **spread([each for part in parts for each in part])}
    found["many_clients"]["requests_per_second"] = sum(map(len, parts)) / seconds
    found["many_clients"]["characters_per_second"] = LENGTH * sum(map(len, parts)) / seconds

    before = resident(process)
    idle = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(IDLE)))
    health = await seconds_of(port, HEALTHY, HEALTH)
    found["idle_connections"] = {"number": IDLE, "health": spread(health), "megabytes": resident(process) - before}
    for _, writer in idle:
        writer.close()

    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(128)]
    for _, writer in streams:
        writer.write(asked(16_384, 8, stream=True))
    await asyncio.gather(*(reader.readline() for reader, _ in streams))
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(asked())
    status, _ = await answer(reader)
    found["request_129"] = {"status": status, "ms": 1e3 * (time.perf_counter() - begin)}
    for _, each in (*streams, (reader, writer)):
        each.close()
    await asyncio.sleep(2)

    before = resident(process)
    await asyncio.gather(*(seconds_of(port, asked(), SOAK // CLIENTS) for _ in range(CLIENTS)))
    found["soak"] = {
        "requests": SOAK // CLIENTS * CLIENTS,
        "megabytes": before,
        "megabytes_more": resident(process) - before,
    }
    return found


def main() -> None:
    """Print the figures as JSON."""
    model = sys.argv[1]
    where = {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description(), "cpus": os.cpu_count()}
    command = [sys.executable, "-m", "longshort", "serve", model, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(":")[2])
        try:
            figures = asyncio.run(measure(port, process.pid))
        finally:
            begin = time.perf_counter()
            process.send_signal(signal.SIGTERM)
        process.wait()
        figures["end"] = {"seconds": time.perf_counter() - begin, "status": process.returncode}
    config = decoder.load_decoder(model).config
    shape = {name: getattr(config, name) for name in ("cell", "layers", "hidden", "embedding", "vocab_size")}
    print(json.dumps({"format_version": 1, **where, "library": ledger.library(), "model": shape, **figures}, indent=2))


if __name__ == "__main__":
    main()
