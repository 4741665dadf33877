"""A GRU with its reset gate alone: the course's exercise. It puts out its candidate; nothing of h is kept as it is.

r = sigmoid(x_r + W_r h + b_r)
h' = tanh(x_n + r * (W_n h + b_n))
"""

import torch

from longshort.cells import Cell


def step(x_BG, h_BG, state):
    """Return the next state, and the gates in the order r, n."""
    x_r, x_n = x_BG.chunk(2, dim=-1)
    h_r, h_n = h_BG.chunk(2, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    n = torch.tanh(x_n + r * h_n)
    return (n,), (r, n)


cell = Cell(step, gates=("r", "n"))
