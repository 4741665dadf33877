"""How symbols enter a stack of layers: as rows of an embedding, as one-hot rows, or as a table of the gates' shares.

T  steps   B  rows   V  symbols   E  width of the embedding   H  hidden units   G  gates times H
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort import calls, cells, kernels, lookup, masks, native, native_backend
from longshort.cells import LayerWeights, Options, Stack, State


def embed(ids: Tensor, embedding_VE: Tensor) -> Tensor:
    """Return the embedding's row of each symbol; of V, which is unknown, zeros. The embedding is not copied."""
    V = len(embedding_VE)
    look_up = F.embedding if kernels.native_target(embedding_VE) is None else lookup.rows
    return look_up(ids.clamp(max=V - 1), embedding_VE).masked_fill((ids == V).unsqueeze(-1), 0)


def vectors(ids: Tensor, embedding_VE: Tensor | None, identity: Tensor | None) -> Tensor:
    """Return what the first layer reads: rows of the embedding, or without one of the identity (V + 1, V)."""
    if embedding_VE is not None:
        return embed(ids, embedding_VE)
    assert identity is not None
    return F.embedding(ids, identity)


def _table(weight_ih: Tensor, embedding_VE: Tensor | None) -> Tensor:
    """Return each symbol's share of the gates, (V + 1, G): zeros of the unknown one."""
    shares_VG = weight_ih.T if embedding_VE is None else embedding_VE @ weight_ih.T
    return F.pad(shares_VG, (0, 0, 0, 1))


def run(
    cell: str,
    ids_TB: Tensor,
    embedding_VE: Tensor | None,
    identity: Tensor | None,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    dropout: float = 0.0,
    training: bool = False,
    residual: bool = False,
    options: Sequence[Options] = (),
) -> tuple[Tensor, State]:
    """Run a stack of layers over a sequence of symbols.

    The first layer's product of embedding and input weights is taken once a symbol of the vocabulary, not once a
    token: a table from which the gates' input share is gathered, where there are fewer symbols than tokens. PyTorch's
    kernels cannot start from a gathered share; where V is below E they get one-hot rows and the table as input
    weights, the same product, V wide; on a GPU the embedding's rows, since cuDNN copies weights that are made anew.
    Without gradients the native kernels get those too: packed weights are kept then.

    Args:
        cell: name of the cell.
        ids_TB: symbols; the id V is unknown and embedded as zero.
        embedding_VE: the embedding, or None for one-hot input.
        identity: (V + 1, V), the identity with a row of zeros below it; None where V is above E.
        state: each tensor (layers, B, H).
        weights: of each layer, with biases; the first input weights are (G, E), or (G, V) for one-hot input.
        dropout: between layers, in training.
        training: whether dropout acts.
        residual: whether each layer but the first adds what it reads to what it puts out.
        options: of each layer, if it has any: layer normalisation.

    Returns:
        Outputs (T, B, H) and the state after the last step.

    Raises:
        UsageError: as of `kernels.run`.
    """
    if residual:

        def run_layer(layer: int, x_TBI: Tensor) -> tuple[Tensor, State]:
            at = slice(layer, layer + 1)
            before, own = tuple(tensor[at] for tensor in state), weights[at]
            if layer:
                return kernels.run(cell, x_TBI, before, own, options=options[at])
            return run(cell, ids_TB, embedding_VE, identity, before, own, options=options[at])

        between = partial(masks.dropout, share=dropout, training=training)
        return kernels.layer_by_layer(run_layer, between, len(weights), ids_TB, residual)
    weight_ih, bias_ih = weights[0][0], weights[0][2]
    stack = Stack(cell, weight_ih.shape[1], weights[0][1].shape[-1], len(weights))
    flat = [tensor for layer_weights in weights for tensor in layer_weights]
    kernels.require_fit(stack, ids_TB.shape[1], state, flat, options)
    if options:  # a row of the table is not what the layer normalises
        x_TBI = vectors(ids_TB, embedding_VE, identity)
        return kernels.run(cell, x_TBI, state, weights, dropout=dropout, training=training, options=options)
    if kernels.choose(cell).name == "reference":
        first = F.embedding(ids_TB, _table(weight_ih, embedding_VE) + bias_ih)
        drop = dropout if training else 0.0
        return cells.run_stack(
            cells.get_cell(cell), first, state, weights, bias=True, dropout=drop, first_is_gates=True
        )
    keep = embedding_VE is not None and not torch.is_grad_enabled()
    few = embedding_VE is None or len(embedding_VE) < ids_TB.numel()
    target = kernels.native_target(state[0]) if few and not keep and cell in native.CELLS else None
    if target is not None:
        table = _table(weight_ih, embedding_VE)
        flat[0] = weight_ih.detach()[:, :0]
        grad = calls.differentiates(table, *state, *flat)
        return native_backend.run_native(
            stack, table, state, flat, dropout=dropout, training=training, target=target, grad=grad, ids=ids_TB
        )
    if embedding_VE is not None and identity is not None and not keep and ids_TB.is_cpu:
        weights = [[weight_ih @ embedding_VE.T, *weights[0][1:]], *weights[1:]]
        embedding_VE = None
    x_TBI = vectors(ids_TB, embedding_VE, identity)
    return kernels.run(cell, x_TBI, state, weights, dropout=dropout, training=training)
