"""A GRU with its update gate alone: the course's exercise.

z = sigmoid(x_z + W_z h + b_z)
n = tanh(x_n + W_n h + b_n)
h' = (1 - z) * n + z * h
"""

import torch

from longshort.cells import Cell


def step(x_BG, h_BG, state):
    """Return the next state, and the gates in the order z, n."""
    (h,) = state
    z, n = (x_BG + h_BG).chunk(2, dim=-1)
    z, n = torch.sigmoid(z), torch.tanh(n)
    return ((1 - z) * n + z * h,), (z, n)


cell = Cell(step, gates=("z", "n"))
