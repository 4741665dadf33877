"""The lecture's training step, ours and another library's, in turns; each in a process and with packages of its own.

A peer's script calls `run`, and is run twice: without arguments it measures, and starts itself once more with the name
of a file and with the peer's packages; that process answers. Both sides begin with the same weights, and must have the
same losses in the first steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

H, B, T, V, LEARNING_RATE, CLIP = 256, 32, 35, 28, 1.0, 0.5
STEPS_COMPARED, STEPS_A_BLOCK, BLOCKS = 5, 20, 9


def run(script: str, make: Callable[[dict[str, Any]], Callable[[Any, Any], float]], peer: str, package: str) -> None:
    """Measure beside the peer that `make` has, or be that peer.

    Args:
        script: the file of the caller.
        make: given the weights by name, returns the peer's step: inputs and targets (T, B) in, nats a token out.
        peer: its name.
        package: that it needs.
    """
    if len(sys.argv) > 1:
        _answer(make)
    else:
        _measure(script, peer, package)


def _measure(script: str, peer: str, package: str) -> None:
    """Print the JSON of our step beside the one that `script` answers with.

    Raises:
        AssertionError: the peer does not compute the same.
    """
    import torch

    from longshort import machine, training
    from longshort.bench import ledger
    from longshort.config import TrainConfig
    from longshort.text.batches import Batch
    from longshort.text.tokenizers import CharTokenizer

    torch.set_num_threads(2)
    constant: dict[str, Any] = {"optimizer": "sgd", "lr": LEARNING_RATE, "clip": CLIP, "warmup": 0.0, "final_lr": 1.0}
    config = TrainConfig(hidden=H, embedding=0, batch_size=B, seq_len=T, single_bias=True, **constant)
    tokenizer = CharTokenizer("".join(chr(97 + i) for i in range(V)))
    model = training.make_model(config, tokenizer)
    ids = np.random.default_rng(0).integers(V, size=(64, T + 1, B))
    batches = [Batch(part[:-1], part[1:], T * B, 0, False) for part in ids]
    stepper = training.TextStepper(model, config, 10**6)
    made = 0

    def step(count: int) -> list[float]:
        nonlocal made
        losses = []
        for _ in range(count):
            losses.append(stepper.step(made, batches[made % 64])[0])
            made += 1
        return losses

    with tempfile.TemporaryDirectory() as place:
        given = Path(place, "given.npz")
        np.savez(given, allow_pickle=False, ids=ids, **model.weights())
        environment = os.environ | {"PYTHONPATH": os.environ["PEER_PACKAGES"], "OMP_NUM_THREADS": "2"}
        with subprocess.Popen(
            [sys.executable, script, str(given)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            questions, answers = child.stdin, child.stdout
            assert questions is not None
            assert answers is not None

            def ask(count: int) -> list[float]:
                print(count, file=questions, flush=True)
                return [float(word) for word in answers.readline().split()]

            np.testing.assert_allclose(ask(STEPS_COMPARED), step(STEPS_COMPARED), rtol=1e-4)
            ours, theirs = [], []
            for block in range(BLOCKS + 1):
                begin = time.perf_counter()
                step(STEPS_A_BLOCK)
                middle = time.perf_counter()
                ask(STEPS_A_BLOCK)
                if block:
                    ours.append((middle - begin) / STEPS_A_BLOCK)
                    theirs.append((time.perf_counter() - middle) / STEPS_A_BLOCK)
            questions.close()
    ratio = statistics.median(theirs) / statistics.median(ours)
    rates = {"ours_per_second": 1 / statistics.median(ours), "peer_per_second": 1 / statistics.median(theirs)}
    row = {"name": "the lecture's: one-hot, 1 x 256, SGD", "peer": peer, "unit": "steps", "ratio": ratio, **rates}
    head = {"format_version": 1, "benchmark": f"a training step beside {peer}", "command": "make bench-peers"}
    head |= {"date": datetime.now(UTC).date().isoformat(), "threads": 2}
    head |= {"machine": machine.description(), "library": ledger.library(), "versions": {package: _version(package)}}
    print(json.dumps({**head, "rows": [{**row, "ours_blocks": ours, "peer_blocks": theirs}]}, indent=1))


def _version(package: str) -> str:
    found = next(Path(os.environ["PEER_PACKAGES"]).glob(f"{package}-*.dist-info"))
    return found.name.removesuffix(".dist-info").partition("-")[2]


def _answer(make: Callable[[dict[str, Any]], Callable[[Any, Any], float]]) -> None:
    """Make as many steps as each line of standard input asks for, and print their losses."""
    given = dict(np.load(sys.argv[1]))
    ids = given.pop("ids")
    step, made = make(given), 0
    for line in sys.stdin:
        losses = []
        for _ in range(int(line)):
            part = ids[made % 64]
            losses.append(step(part[:-1], part[1:]))
            made += 1
        print(*losses, flush=True)
