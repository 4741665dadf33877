"""One training step of any model: gradients, clipping, the optimizer; and what must be kept to go on from it.

All gradients are scaled together so that their L2 norm is at most `clip` (Pascanu, Mikolov and Bengio 2013,
arXiv:1211.5063).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import kernels, model_files, native, processes, snapshot
from longshort.cells import State
from longshort.config import Options, Schedule
from longshort.errors import TrainingError, UsageError
from longshort.processes import COLLECT, STEP, Team

Stop = Callable[[], bool]


class Trainable(Protocol):
    """What training asks of a model."""

    @property
    def config(self) -> Options:
        """What the model is."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every module."""

    def train(self) -> Any:
        """As of every module."""

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights by name as float32 arrays."""

    def load_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over weights that `weights` gave; CheckpointError where they are those of another model."""


class Batch(Protocol):
    """What training asks of what a step reads."""

    @property
    def tokens(self) -> int:
        """How many things are predicted, in the rows of all processes together."""


M = TypeVar("M", bound=Trainable)
B = TypeVar("B", bound=Batch)


class Stepper(ABC, Generic[M, B]):
    """One training step after the other: forward, loss, gradients, clipping, optimizer.

    Args:
        model: to be trained.
        config: how.
        steps: planned in all, which the learning rate goes by.
        team: the processes that train it; each makes every step with rows of its own.
        stop: whether this process was asked to stop.

    Raises:
        UsageError: this processor has no products of the precision that `config` names.
    """

    def __init__(
        self,
        model: M,
        config: Schedule,
        steps: int,
        team: Team | None = None,
        stop: Stop = lambda: False,
    ) -> None:
        if config.precision == "bfloat16":
            native.need_bfloat16()
        self.model, self.config, self.steps = model, config, steps
        self.team, self.stop = team or Team(), stop
        self.stopping = False
        """Whether any process was asked to stop, when the last step was made."""
        self.named_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named_parameters.values())
        self.device = next(p.device for _, p in model.named_parameters())
        self.state: State | None = None
        """What the next step starts from, of this process's rows; None for zero."""
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
            )

    @abstractmethod
    def read(self, batch: B) -> float:
        """Add the gradients of what these rows are of the mean loss of the batch, and return it, in nats a token."""

    def in_precision(self) -> AbstractContextManager[None]:
        """Return what a step reads in: the kernels of the precision that the configuration names."""
        return kernels.use(kernels.BFLOAT16) if self.config.precision == "bfloat16" else nullcontext()

    def zero_state(self, rows: int) -> State:
        """Return what a step starts from that carries nothing on."""
        return ()

    def put_back(self, training: model_files.Training) -> None:
        """Go on from what a checkpoint holds beside the weights; CheckpointError where it is another model's."""
        rank, rows = self.team.rank, self.config.batch_size // self.team.size
        like = self.zero_state(self.config.batch_size)
        state = snapshot.put_back(training, self.named_parameters, self.optimizer, like, self.device, rank)
        self.state = state and tuple(tensor[:, rank * rows : (rank + 1) * rows].contiguous() for tensor in state)

    def step(self, number: int, batch: B) -> tuple[float, float, float]:
        """Make step `number` (0, 1, ...) on `batch`.

        Returns:
            The loss in nats a token, the norm of the gradients before clipping, the learning rate. Where loss or
            norm is not finite, the weights are as they were, and the next step starts from a zero state.
        """
        self.model.train()
        with self.team.order(STEP, number, self.steps):
            self.optimizer.zero_grad(set_to_none=True)
            with self.in_precision():
                nats = self.read(batch)
            nats, stopping = self._add_up([nats, float(self.stop())])
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.stopping = stopping > 0
        total = torch.nn.utils.get_total_norm(gradients, foreach=True)
        norm, clip = total.item(), self.config.clip
        if clip is not None and clip < norm < math.inf:  # a pass over all gradients, which most steps can do without
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, total, foreach=True)
        rate = learning_rate(self.config, number, self.steps)
        if not math.isfinite(nats) or not math.isfinite(norm):
            self.state = None  # it may hold what is not finite
            return nats, norm, rate
        for group in self.optimizer.param_groups:
            group["lr"] = min(rate, float(np.finfo(np.float32).max))  # what is larger, PyTorch cannot read
        self.optimizer.step()
        return nats, norm, rate

    def _add_up(self, numbers: list[float]) -> list[float]:
        """Make the gradients those of all processes together, and return the sums of `numbers`."""
        if self.team.size == 1:
            return numbers
        # An adaptive softmax has gradients where its symbols are: in some processes perhaps, and not in others.
        given = [float(parameter.grad is not None) for parameter in self.parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        sums = self.team.add(gradients, [*numbers, *given])
        for parameter, gradient, somewhere in zip(self.parameters, gradients, sums[len(numbers) :], strict=True):
            parameter.grad = gradient if somewhere else None
        return sums[: len(numbers)]

    def collect(self, state: bool) -> tuple[State | None, dict[str, list[Tensor]]]:
        """Return the carried state of all rows, if `state`, and the random numbers of every process, to process 0.

        Raises:
            TrainingError: the processes no longer have the same weights.
        """
        team = self.team
        with team.order(COLLECT, int(state)):
            digests = team.collect(self._digest()) if team.size > 1 else []
            rows = [team.collect(tensor) for tensor in self.state or ()] if state else []
            random = {kind: team.collect(kept) for kind, kept in snapshot.random_numbers(self.device).items()}
        if strayed := [rank for rank, found in enumerate(digests) if not torch.equal(found, digests[0])]:
            raise TrainingError(
                f"Process {strayed[0]} has other weights than process 0.",
                "Processors of different kinds may compute differently: train on one kind.",
            )
        return tuple(torch.cat(tensors, dim=1) for tensors in rows if tensors) or None, random

    def _digest(self) -> Tensor:
        content = b"".join(array.tobytes() for array in self.model.weights().values())
        return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def learning_rate(config: Schedule, step: int, steps: int) -> float:
    """Return the rate of step `step` (0, 1, ...): a linear rise, then a cosine fall to `final_lr` of the highest."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def checkpoint_size(stepper: Stepper[Any, Any]) -> int:
    """Return about how many bytes a checkpoint takes: weights, what the optimizer keeps of each, and small files."""
    copies = 3 if stepper.config.optimizer == "adamw" else 1
    weights: int = sum(parameter.numel() for _, parameter in stepper.model.named_parameters())
    state = sum(tensor.numel() for tensor in stepper.zero_state(stepper.config.batch_size))
    return 4 * (copies * weights + state) + (1 << 17)


def device(name: str) -> torch.device:
    """Return the device that an option names; UsageError where PyTorch has none here, or fewer than processes."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device that PyTorch can use here.", "Leave out --device cuda.")
    if name == "cuda" and (beside := processes.on_this_machine()) > (there := torch.cuda.device_count()):
        raise UsageError(
            f"There are {beside} processes here, but PyTorch sees {there} GPU{'s' * (there > 1)}: each takes one.",
            f"Start {there} with --nproc-per-node {there}, or leave out --device cuda.",
        )
    return torch.device(name)
