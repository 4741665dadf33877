"""An LSTM whose gates look at the cell state: Gers, Schraudolph and Schmidhuber (2002), *Learning precise timing*.

    i, f = sigmoid(x + W h + b + p * c)
    g    = tanh(x_g + W_g h + b_g)
    c'   = f * c + i * g
    o    = sigmoid(x_o + W_o h + b_o + p_o * c')
    h'   = o * tanh(c')

The peepholes p are vectors, one number a unit: `Cell` makes them, and the step gets them by name.
"""

import torch

from longshort.cells import Cell


def step(x_BG, h_BG, state, vectors):
    """Return the next state, and the gates in the order i, f, g, o."""
    _, c = state
    i, f, g, o = (x_BG + h_BG).chunk(4, dim=-1)
    i = torch.sigmoid(i + vectors["peephole_i"] * c)
    f = torch.sigmoid(f + vectors["peephole_f"] * c)
    g = torch.tanh(g)
    c = f * c + i * g
    o = torch.sigmoid(o + vectors["peephole_o"] * c)
    return (o * torch.tanh(c), c), (i, f, g, o)


cell = Cell(
    step,
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    vectors=("peephole_i", "peephole_f", "peephole_o"),
)
