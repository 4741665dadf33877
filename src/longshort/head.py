"""The output layer and its loss in one: the logits become their own gradient, and are never kept.

    Softmax            every symbol has a row of one matrix
    AdaptiveSoftmax    rare symbols have narrow ones, which are only used where they occur

N  tokens   V  symbols   H  hidden units
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longshort import calls, kernels, ops
from longshort.config import SHRINKAGE, adaptive_cutoffs
from longshort.text.batches import IGNORED


class Softmax(nn.Linear):
    """The output layer: weight (V, H), bias (V)."""

    def logits(self, h_TBH: Tensor) -> Tensor:
        """Return the logits (T, B, V)."""
        return F.linear(h_TBH, self.weight, self.bias)

    def loss(self, h_NH: Tensor, targets_N: Tensor, tokens: int) -> Tensor:
        """Return the sum of -log p of all targets, divided by `tokens`; as `cross_entropy`."""
        return cross_entropy(h_NH, self.weight, self.bias, targets_N, tokens)

    def nats(self, h_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return -log p of each target in nats, float64 (N)."""
        log_p_NV = F.log_softmax(self(h_NH).double(), dim=-1)
        return -log_p_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """An output layer for many symbols, the most frequent first: Grave et al. (2017), arXiv:1609.04309.

    It is PyTorch's. Rarer symbols are in groups, `config.adaptive_cutoffs`; a group's matrix is narrower by `SHRINKAGE`
    than the one before and only read where one of its symbols is the target, so a step costs a fraction.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, adaptive_cutoffs(vocab_size), float(SHRINKAGE), head_bias=True)

    def logits(self, h_TBH: Tensor) -> Tensor:
        """Return log p of every symbol, (T, B, V)."""
        log_p_NV: Tensor = self.log_prob(h_TBH.flatten(0, 1))
        return log_p_NV.view(*h_TBH.shape[:2], -1)

    def loss(self, h_NH: Tensor, targets_N: Tensor, tokens: int) -> Tensor:
        """Return the sum of -log p of all targets, divided by `tokens`; as `cross_entropy`.

        p of a rare symbol is that of its group among the frequent symbols, times its own in the group.
        """
        first, loss = self.cutoffs[0], h_NH.new_zeros(())
        in_head_N = targets_N.clone()
        for group, (low, high) in enumerate(pairwise(self.cutoffs)):
            rows_M = ((targets_N >= low) & (targets_N < high)).nonzero().squeeze(1)
            in_head_N[rows_M] = first + group
            if len(rows_M):  # else its matrices have no gradient, and an optimizer leaves them
                tail: Any = self.tail[group]
                project, output = tail
                narrow_MK, no_bias = project(h_NH.index_select(0, rows_M)), h_NH.new_zeros(high - low)
                loss = loss + cross_entropy(narrow_MK, output.weight, no_bias, targets_N[rows_M] - low, tokens)
        return loss + cross_entropy(h_NH, self.head.weight, self.head.bias, in_head_N, tokens)

    def nats(self, h_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return -log p of each target in nats (N)."""
        log_p_N: Tensor = self(h_NH, targets_N).output
        return -log_p_N


def cross_entropy(h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, tokens: int) -> Tensor:
    """Return the sum of -log p of all targets, divided by `tokens`, in nats.

    Args:
        h_NH: what the output layer reads.
        weight_VH: of the output layer.
        bias_V: of the output layer.
        targets_N: symbols, int64; `IGNORED` where there is nothing to predict.
        tokens: what the sum is divided by, so that parts of a batch add up.
    """
    wanted = calls.differentiates(h_NH, weight_VH, bias_V)
    target = kernels.native_target(h_NH) if wanted else None
    if target is not None:
        return _LongshortCrossEntropy.apply(h_NH, weight_VH, bias_V, targets_N, tokens, target)  # type: ignore[no-untyped-call, no-any-return]
    logits_NV = F.linear(h_NH, weight_VH, bias_V)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum") / tokens


class _LongshortCrossEntropy(torch.autograd.Function):
    """The forward pass makes the gradients too: they are products with the logits, which are gone afterwards."""

    @staticmethod
    def forward(
        ctx: Any, h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, tokens: int, target: int
    ) -> Tensor:
        nats, gradients = ops.cross_entropy(h_NH, weight_VH, bias_V, targets_N, 1 / tokens, target)
        ctx.save_for_backward(*gradients)
        return h_NH.new_tensor(nats / tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not calls.is_readable(dloss) or float(dloss) != 1.0:
            gradients = [gradient * dloss for gradient in gradients]
        return (*gradients, None, None, None)
