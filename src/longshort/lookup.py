"""Rows of a matrix by symbols, whose gradient lies in memory that earlier gradients had.

    N  symbols   V  rows   E  width

PyTorch's `F.embedding` makes its gradient, as large as the matrix and zero but for N rows, anew in every step. With a
large vocabulary fresh pages from the system take longer than to add up the rows (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort import calls
from longshort.buffers import LARGE, Gradients


def rows(ids: Tensor, weight_VE: Tensor) -> Tensor:
    """Return the row of each symbol, as `F.embedding`, of a matrix on a CPU in an eager call without transforms.

    Args:
        ids: symbols, int64.
        weight_VE: the matrix.
    """
    if weight_VE.numel() < LARGE or not (weight_VE.requires_grad and torch.is_grad_enabled()):
        return F.embedding(ids, weight_VE)
    found: Tensor = _LongshortEmbedding.apply(ids.flatten(), weight_VE)  # type: ignore[no-untyped-call]
    return found.view(*ids.shape, weight_VE.shape[1])


class _LongshortEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, weight_VE: Tensor) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.like = weight_VE.detach()  # for its shape: it may have changed when the gradient is made
        return weight_VE.index_select(0, ids_N)

    @staticmethod
    def backward(ctx: Any, dx_NE: Tensor) -> tuple[None, Tensor]:
        (ids_N,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not calls.is_readable(dx_NE):  # differentiated once more, or many at once
            return None, dx_NE.new_zeros(ctx.like.shape).index_add(0, ids_N, dx_NE)
        return None, Gradients.like(ctx.like).zero_().index_add_(0, ids_N, dx_NE)
