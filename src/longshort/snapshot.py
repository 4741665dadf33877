"""What a checkpoint holds beside the model, so that training goes on bit for bit: taken, and put back.

    arrays   optimizer.NAME.KEY    the optimizer's tensors of the parameter NAME
             state.N               the recurrent state that the next step starts from
             random.cpu, .cuda     PyTorch's generators of random numbers, which dropout draws from; random.cpu.1 and
                                   so on are those of further processes
    values   `Position`, and the environment, since other versions and other kernels round otherwise

What a step reads and its learning rate need no room: they are functions of the step's number.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import longshort
from longshort import kernels, machine, native, own_cells, precision
from longshort.cells import State
from longshort.errors import CheckpointError
from longshort.model_files import Training

_HINT = "Resume from another checkpoint, or start from its weights: longshort train TEXT --from MODEL"


_RANDOM = re.compile(r"random\.(cpu|cuda)(\.[1-9]\d{0,5})?")


@dataclass(slots=True)
class Position:
    """How far a training run has come."""

    step: int = 0
    """Steps made, skipped ones included."""
    good_step: int = 0
    """The last one whose loss and gradients were finite."""
    looked: int = 0
    """The step after which the held-out text was last looked at."""
    best_step: int = 0
    best_nats: float | None = None
    """Nats a token of the best look; None before the first."""
    looks_without_gain: int = 0
    skipped_steps: int = 0
    window_steps: int = 0
    """Steps since the last report, what they lost in nats, and their tokens."""
    window_nats: float = 0.0
    window_tokens: int = 0


def random_numbers(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that training on `device` draws from, uint8."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else states


def take(
    position: Position,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: State | None,
    random: Mapping[str, Sequence[Tensor]],
) -> Training:
    """Return everything that training needs to go on from here, as a checkpoint keeps it.

    Args:
        position: how far it has come.
        parameters: those that the optimizer has, in its order, by name.
        optimizer: with its state.
        state: what the next step starts from, all rows of a batch; None for zero.
        random: `random_numbers` of every process, each kind in the order of processes.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for kind, tensors in random.items():
        arrays |= {_random_name(kind, rank): tensor.numpy() for rank, tensor in enumerate(tensors)}
    for number, name in enumerate(parameters):
        for key, value in optimizer.state_dict()["state"].get(number, {}).items():
            arrays[f"optimizer.{name}.{key}"] = value.detach().cpu().numpy()
    for number, tensor in enumerate(state or ()):
        arrays[f"state.{number}"] = tensor.detach().cpu().numpy()
    return Training(arrays, {"position": dataclasses.asdict(position), "environment": environment()})


def _random_name(kind: str, rank: int) -> str:
    return f"random.{kind}.{rank}" if rank else f"random.{kind}"


def position_of(training: Training) -> Position:
    """Return how far training had come; CheckpointError where that does not make sense."""
    values = training.values.get("position")
    fields = dataclasses.fields(Position)
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields}:
        raise CheckpointError("The checkpoint's training.json holds no position.", _HINT)
    for name, value in values.items():
        kinds = (int, float) if "nats" in name else (int,)
        if not (value is None and name == "best_nats") and (type(value) not in kinds or value < 0):
            raise CheckpointError(f"The checkpoint's training.json has {value!r:.40} as {name}.", _HINT)
    return Position(**values)


def put_back(
    training: Training,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    like: State,
    device: torch.device,
    rank: int = 0,
) -> State | None:
    """Give optimizer and random numbers the state that `take` took, and return the recurrent state.

    Args:
        training: of a checkpoint.
        parameters: as of `take`.
        optimizer: new, of the same kind.
        like: a state of the right shape, for all rows of a batch; empty where none is carried.
        device: of the weights.
        rank: the number of this process. One that was not there has no random numbers to be put back.

    Raises:
        CheckpointError: the arrays are not those of this model and optimizer.
    """
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in training.arrays.items()}
    kept = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        if found:
            kept[number] = found
        for key, value in found.items():
            if value.shape != (() if key == "step" else parameter.shape) or value.dtype != torch.float32:
                raise CheckpointError(f"The checkpoint's {prefix}{key} has another shape than the weight.", _HINT)
    state = [tensors.pop(f"state.{number}") for number in range(len(like)) if f"state.{number}" in tensors]
    if state and [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in like]:
        raise CheckpointError("The checkpoint's recurrent state has another shape than this model's.", _HINT)
    try:
        random = {name: tensors.pop(name) for name in list(tensors) if _RANDOM.fullmatch(name)}
        own = random["random.cpu"] if rank == 0 else random.get(_random_name("cpu", rank))
        if own is not None:
            torch.set_rng_state(own)
        cuda = random.get(_random_name("cuda", rank))
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
        wanted = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set()
        if tensors or any(entry.keys() != wanted for entry in kept.values()):
            raise ValueError("arrays that do not belong to it")
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint's training state cannot be used: {error!s:.200}.", _HINT) from error
    return tuple(tensor.to(device) for tensor in state) or None


def environment() -> dict[str, Any]:
    """Return what the bits of a training step depend on beside the checkpoint."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return {
        "longshort": longshort.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": machine.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.active_target() or "none",
        "forced": kernels.active(),
        "precision of products": precision.allowed(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "own cells": own_cells.digest(),
    }


def changes(training: Training) -> list[str]:
    """Return what is another environment now than it was, a phrase each."""
    before, now = training.values.get("environment"), environment()
    before = (
        {"processes": 1, "own cells": "none", "precision of products": "ieee", **before}
        if isinstance(before, dict)
        else {}
    )
    return [f"{name} {before.get(name)!s:.60} is now {now[name]}" for name in now if before.get(name) != now[name]]
