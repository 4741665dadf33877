"""How much memory a training takes, before it begins.

E  embedding width   H  hidden units   L  layers   V  symbols
"""

from __future__ import annotations

from longshort import cells
from longshort.buffers import Saved
from longshort.config import TrainConfig, adaptive_cutoffs

SAVED = {"lstm": (5, 13), "gru": (4, 10)}
"""Numbers that the native kernels save for each unit, row and step, and with layer_norm; of other cells 1 and 3."""


def training_needs(config: TrainConfig, vocab_size: int, tokens: int) -> int:
    """Return about how many bytes training takes beside the program and its text, by the native kernels.

    The most is needed in a step, which keeps what its backward pass reads; or while a checkpoint is written, whose
    content is there several times for a moment; or at the end, when the best weights are loaded and measured beside
    those in training. How often, has been measured: docs/log.md. Other kernels take as much or more.

    Args:
        config: the model, and how it is trained.
        vocab_size: the tokenizer's.
        tokens: of a window of a step, all rows together.
    """
    H, L, V, E = config.hidden, config.layers, vocab_size, config.embedding
    gates = len(cells.get_cell(config.cell).gates)
    weights = sum(gates * H * (width + H + 2) for width in [E or V, *[H] * (L - 1)])
    # Of an adaptive softmax nearly all is in the matrix of the most frequent symbols.
    weights += V * E + (0 if config.tied else H * (adaptive_cutoffs(V)[0] if config.adaptive_softmax else V))
    trained = weights - V * E * config.freeze_embedding
    optimizer = 2 * trained if config.optimizer == "adamw" else 0
    saved = SAVED.get(config.cell, (1, 3))[config.layer_norm] * tokens * H * L
    outputs = (4 if config.dropout else 2) * tokens * H * L  # and their gradients; dropped ones are others
    step = weights + 3.3 * trained + optimizer + saved + outputs
    waiting = trained + min(saved, Saved.MOST_BYTES // 4)  # memory that is kept from step to step
    writing = 3.5 * (weights + optimizer) + waiting
    last = 5.2 * (weights + V * E * config.tied) + optimizer + waiting
    return round(4 * max(step, writing, last))
