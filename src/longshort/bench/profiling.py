"""Where the time of a training step goes: `bench train --profile`.

Steps are timed without PyTorch's profiler, which makes Python slower, and then recorded by it. An operation counts for
the part of the step that called it; what no operation took is Python's. The kernels' backward pass is one operation:
how much of it the weights' gradients are is found by running it without them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile

from longshort import calls, kernels, ops
from longshort.model import LanguageModel
from longshort.text.batches import Batch
from longshort.training import TextStepper

PARTS = {
    "_LongshortLayerBackward": "recurrence, backward",
    "_LongshortLayer": "recurrence, forward",
    "_LongshortCrossEntropy": "output layer and loss",
    "Optimizer": "update",
    "_foreach_norm": "clipping",
    "linalg_vector_norm": "clipping",
    "stack": "clipping",
    "_foreach_mul_": "clipping",
}
"""The operation that a part of the step begins with, and its name; the first that fits counts."""
TABLE, WEIGHTS, PYTHON = "table of the symbols", "weight gradients", "Python"
_STEPS, _WARM = 20, 5


def profile_step(stepper: TextStepper, batches: Sequence[Batch]) -> dict[str, float]:
    """Return the seconds of each part of a training step; their sum is the step's median.

    Args:
        stepper: makes steps; its model runs on native kernels.
        batches: what they read, again and again.
    """
    made = 0

    def step() -> None:
        nonlocal made
        stepper.step(made, batches[made % len(batches)])
        made += 1

    for _ in range(_WARM):
        step()
    whole = statistics.median(_seconds(step) for _ in range(_STEPS))
    with profile() as recorded:  # type: ignore[no-untyped-call]  # its successor prints lines of its own
        for _ in range(_STEPS):
            step()
    parts = dict.fromkeys([TABLE, *PARTS.values()], 0.0)
    for event in recorded.function_events:
        parts[_part_of(event)] += event.self_cpu_time_total / 1e6 / _STEPS
    with stepper.in_precision():
        share = _share_of_weights(stepper.model, batches[0])
    backward = parts[PARTS["_LongshortLayerBackward"]]
    parts[PARTS["_LongshortLayerBackward"]] = (1 - share) * backward
    order = [
        TABLE,
        "recurrence, forward",
        "output layer and loss",
        "recurrence, backward",
        WEIGHTS,
        "clipping",
        "update",
    ]
    parts[WEIGHTS] = share * backward
    found = {name: parts[name] for name in order}
    return {**found, PYTHON: max(whole - sum(found.values()), 0.0)}


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _part_of(event: Any) -> str:
    while event is not None:
        for beginning, part in PARTS.items():
            if beginning in event.name:
                return part
        event = event.cpu_parent
    return TABLE


def _share_of_weights(model: LanguageModel, batch: Batch) -> float:
    """Return what the gradients of W_hh and the biases are of a backward pass."""
    config = model.config
    ids = torch.from_numpy(batch.inputs_TB)
    _, weight_hh, *biases = (parameter.detach() for parameter in model.recurrent.all_weights[0])
    table = torch.zeros(config.vocab_size + 1, len(weight_hh))
    weights = [weight_hh[:, :0], weight_hh, *biases]
    target = kernels.quick_target()
    assert target is not None
    call = calls.Call(config.cell, config.hidden, 1, True, False, None, (), target, (), ids)
    saved = [torch.empty(calls.saved_floats(call, table))]
    with torch.no_grad():
        y, after = ops.forward(call, table, None, weights, saved)
        dy, nothing = torch.ones_like(y), [None] * len(after)

        def seconds(weights_too: bool) -> float:
            wanted = [weights_too, *[False] * len(after), False, *[weights_too] * 3]
            run = [
                _seconds(lambda: ops.backward(call, table, None, weights, y, saved, dy, nothing, wanted))
                for _ in range(_STEPS)
            ]
            return statistics.median(run)

        return max(1 - seconds(False) / seconds(True), 0.0)
