"""An LSTM that takes in as much as it forgets: Greff et al. (2017), *LSTM: a search space odyssey*, arXiv:1503.04069.

f, o = sigmoid(x + W h + b)
g    = tanh(x_g + W_g h + b_g)
c'   = f * c + (1 - f) * g
h'   = o * tanh(c')
"""

import torch

from longshort.cells import Cell


def step(x_BG, h_BG, state):
    """Return the next state, and the gates in the order f, g, o."""
    _, c = state
    f, g, o = (x_BG + h_BG).chunk(3, dim=-1)
    f, g, o = torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + (1 - f) * g
    return (o * torch.tanh(c), c), (f, g, o)


cell = Cell(step, gates=("f", "g", "o"), states=("h", "c"))
