"""Several processes that train one model: the first leads, the others do as it says.

    torchrun --nproc-per-node 2 -m longshort train ...

Each has the model and reads its own rows of every batch; the gradients are added up, so all make the same update
(data parallelism). Only process 0 looks at held-out text, decides, and writes. Before whatever all must do together it
gives an order, which the others wait for: none of them keeps count of steps, looks or saves.

`torch.nn.parallel.DistributedDataParallel` is not used: it takes the mean over processes, where rows can hold unequal
numbers of tokens, and wants one backward pass a step, where a batch of lines takes as many as its longest line needs.
One sum over all gradients laid end to end is the whole of it. Nothing is pickled on the way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longshort.errors import TrainingError, UsageError

START, STEP, COLLECT, END = range(4)
"""Orders: hear what is trained; make a step; send process 0 what a checkpoint needs; end."""

_LONGEST_WAIT = timedelta(days=7)
"""The others wait while process 0 reads a text or looks at a long held-out part. One that ended is noticed at once."""


class Team:
    """The processes that train together. A team of one does nothing, so training alone is the same code.

    Args:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._at_work = False

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @contextmanager
    def order(self, what: int, *numbers: int) -> Iterator[None]:
        """Of process 0: give an order with up to two whole numbers, and do it with the others. They call it too."""
        if self.size > 1 and self.leads:
            with self._together():
                dist.broadcast(torch.tensor([what, *numbers, 0, 0][:3]), 0)
        self._at_work = True  # and still so after an exception: the others may then wait for the rest of this order
        yield
        self._at_work = False

    def next_order(self) -> tuple[int, int, int]:
        """Of the others: wait for an order and return it."""
        received = torch.zeros(3, dtype=torch.int64)
        with self._together():
            dist.broadcast(received, 0)
        what, first, second = received.tolist()
        return what, first, second

    def add(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
        """Put the sum over all processes into each of `tensors` (float32), and return the sums of `numbers`."""
        if self.size == 1:
            return list(numbers)
        flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_tensor(numbers)])
        with self._together():
            dist.all_reduce(flat)
        *summed, sums = torch.split(flat, [*(tensor.numel() for tensor in tensors), len(numbers)])
        for tensor, total in zip(tensors, summed, strict=True):
            tensor.copy_(total.view_as(tensor))
        return [float(number) for number in sums]

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return the `tensor` of every process, in their order, to process 0; an empty list to the others."""
        if self.size == 1:
            return [tensor]
        own = tensor.detach().cpu().contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)] if self.leads else None
        with self._together():
            dist.gather(own, found, 0)
        return found or []

    def tell(self, values: dict[str, Any] | None, arrays: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        """Return the JSON `values` and NumPy `arrays` of process 0 to every process; the others give None."""
        arrays = arrays or {}
        if self.size == 1:
            return values or {}, arrays
        kinds = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        content = json.dumps([values, kinds]).encode() if self.leads else b""
        size = torch.tensor([len(content)])
        with self._together():
            dist.broadcast(size, 0)
            data = torch.from_numpy(np.frombuffer(content, np.uint8).copy()) if self.leads else None
            data = torch.zeros(int(size), dtype=torch.uint8) if data is None else data
            dist.broadcast(data, 0)
            values, kinds = json.loads(data.numpy().tobytes())
            for name, (kind, shape) in kinds.items():
                array = np.ascontiguousarray(arrays[name]) if self.leads else np.zeros(shape, kind)
                flat = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
                dist.broadcast(flat, 0)
                arrays[name] = flat.numpy().view(kind).reshape(shape)
        return values or {}, arrays

    def part(self) -> None:
        """Wait until all have heard the order to end, so that no connection is closed on one that is still reading."""
        with suppress(RuntimeError):  # another has been quicker
            dist.barrier()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let all end, with the exit status that process 0 is about to have."""
        if self.size > 1:
            if self.leads and not self._at_work:
                with suppress(TrainingError), self.order(END, 0 if error is None else getattr(error, "exit_code", 1)):
                    self.part()
            dist.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say in words that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])  # without a place in gloo's source
            raise TrainingError(
                f"The connection to another of the {self.size} processes was lost: {reason:.120}",
                "That process has said why, or was killed. Go on from the last checkpoint: resume",
            ) from error


def on_this_machine() -> int:
    """Return how many processes torchrun has started here; 1 where it was not asked."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def join() -> Team:
    """Return the team that torchrun has started this process in; a team of one where it has not.

    Raises:
        UsageError: the environment is not that of torchrun.
        TrainingError: the others cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Team()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    numbers = [given[name] for name in (*names[:3], names[4])]
    if not all(given.values()) or not all(number.isdecimal() for number in numbers):
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"WORLD_SIZE asks for several processes, but not as torchrun does: {found}.", _START)
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(given["LOCAL_RANK"]) % torch.cuda.device_count())
    team = Team(rank, size)
    with team._together():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backends, timeout=_LONGEST_WAIT, rank=rank, world_size=size)
    return team


_START = "Start them with: torchrun --nproc-per-node 2 -m longshort train TEXT"
