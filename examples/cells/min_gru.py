"""minGRU: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi (2024), *Were RNNs all we needed?*, arXiv:2410.01201.

    z  = sigmoid(x_z)
    n  = x_n
    h' = (1 - z) * h + z * n

Gate and candidate see the input alone, so a sequence could be run in parallel; here it is run step by step, and what
the state would give the gates is left unread.
"""

import torch

from longshort.cells import Cell


def step(x_BG, h_BG, state):
    """Return the next state, and the gates in the order z, n."""
    (h,) = state
    z, n = x_BG.chunk(2, dim=-1)
    z = torch.sigmoid(z)
    return ((1 - z) * h + z * n,), (z, n)


cell = Cell(step, gates=("z", "n"))
