"""Dynamic evaluation: a model that keeps learning from what it has read, never from what it is about to read.

Krause, Kahembwe, Murray and Renals 2018, *Dynamic evaluation of neural sequence models*, arXiv:1709.07432. The text is
read in windows, in order. Each window is predicted first, and that is what counts; only then the weights move by its
gradient: what an adaptive compressor such as PPM does with its counts. The update is theirs with two differences: the
mean square of each weight's gradient, which scales its steps, is taken of the windows read so far (as Adam does) and
not of the training text, which need not be there; and the weights are pulled back to where they were by the same share.

    g   gradient of a window's mean loss      v   mean of g^2 so far, recent windows counting more      W_0   the model

    W <- W - rate * g / (sqrt(v) + epsilon)
    W <- W + decay * (W_0 - W)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longshort.config import Options, option
from longshort.errors import ConfigError
from longshort.evaluation import Evaluation, part_of, summarise
from longshort.model import LanguageModel
from longshort.text.batches import IGNORED
from longshort.text.encoding import Part


@dataclass(frozen=True, kw_only=True)
class Learning(Options):
    """How a model goes on learning while it reads. docs/log.md has how the values were found."""

    rate: float = option(4e-4, "Size of a step, where the gradient is as large as usual.", above=0)
    decay: float = option(3e-3, "Share of the way back to the model's own weights, after each step.", least=0, most=1)
    window: int = option(32, "Tokens that are predicted before the model learns from them.", least=1, most=1_000_000)


def evaluate_dynamically(
    model: LanguageModel,
    text: str | Part,
    learning: Learning | None = None,
    *,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure how well `model` predicts `text` where it learns from each window after having predicted it.

    Args:
        model: a `LanguageModel`, with a tokenizer. It is copied: its weights stay as they are.
        text: what to predict, in one lane with the state carried; for a model of lines each line from a zero state.
        learning: rate, decay and window.
        pause: called after each window; it may raise, to end a long evaluation.

    Raises:
        TextError: nothing in the text can be predicted.
        ConfigError: the model has diverged.
    """
    assert model.tokenizer is not None
    learning, part = learning or Learning(), part_of(model.config, model.tokenizer, text)
    learner = copy.deepcopy(model).eval()  # dropout would only add noise
    weights: list[Tensor] = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    own = [parameter.detach().clone() for parameter in weights]
    optimizer = torch.optim.Adam(weights, lr=learning.rate, betas=(0.0, 0.999), fused=True)
    device, size = learner.device, model.tokenizer.size
    state, total = learner.zero_state(), 0.0
    for inputs, targets, fresh in _windows(part, learning.window):
        pause()
        x_TB = torch.from_numpy(inputs).to(device).unsqueeze(1)
        y_T = torch.from_numpy(np.where(targets < size, targets, IGNORED)).to(device)
        state = learner.zero_state() if fresh else tuple(tensor.detach() for tensor in state)
        loss, state = learner.loss(x_TB, y_T.unsqueeze(1), state, len(inputs))
        nats = loss.item() * len(inputs)
        if not math.isfinite(nats):
            raise ConfigError(
                f"The model diverged while it learned, at a rate of {learning.rate:g}.", "Try a lower --rate."
            )
        total += nats
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if learning.decay:
            with torch.no_grad():
                torch._foreach_lerp_(weights, own, learning.decay)
    words = "each line from a zero state, after a newline" if part.breaks is not None else "state carried"
    return summarise(
        part, total, f"dynamic evaluation, {words}; learns after each {learning.window} tokens at {learning.rate:g}"
    )


def _windows(part: Part, length: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bool]]:
    """Yield the inputs and targets of each window, int64, and whether it begins with a zero state."""
    places: Any = [0, len(part.ids) - 1] if part.breaks is None else part.breaks
    for begin, end in pairwise(places):
        for first in range(int(begin), int(end), length):
            ids = part.ids[first : min(first + length, int(end)) + 1].astype(np.int64)
            yield ids[:-1], ids[1:], first == int(begin)
