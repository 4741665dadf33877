"""The lecture's program from scratch: recurrent character models written out in their equations.

Read it from top to bottom: parameters, the three cells, the output layer, clipping, training, prediction. It
needs nothing but tensors with automatic differentiation; there is no layer, no optimizer, no loss of a library.

    B  rows of a batch    T  steps of a window    V  symbols of the vocabulary    H  hidden units    L  layers

With L above 1 the model is deep: each layer reads the H of the one below at the same step. The lecture's have one.

To try a cell of your own, copy this file, change a line in one of the steps, and see your copy beside the
original and the library's layers:

    longshort compare --implementations scratch,torch,./mine.py

Source: Zhang, Lipton, Li, Smola, *Dive into Deep Learning*, the chapters on recurrent networks (2019 edition);
Hochreiter and Schmidhuber (1997), *Long Short-Term Memory*; Cho et al. (2014), arXiv:1406.1078, the GRU, here in
the form of `torch.nn.GRU` and cuDNN, in which the reset gate acts on the product with the hidden weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longshort.text.batches import ConsecutiveLanes, RandomWindows
from longshort.text.tokenizers import CharTokenizer

Params = list[Tensor]
State = tuple[Tensor, ...]

# ------------------------------------------------------------------------------------------------ parameters


def normal(*shape: int) -> Tensor:
    """Weights are drawn from N(0, 0.01), 0.01 being the standard deviation."""
    return torch.randn(shape) * 0.01


def three(V: int, H: int) -> Params:
    """The parameters of one gate: input weights (V, H), hidden weights (H, H), bias (H)."""
    return [normal(V, H), normal(H, H), torch.zeros(H)]


def get_params(cell: str, V: int, H: int, L: int = 1) -> Params:
    """All parameters of a model, ready to collect gradients: of each layer's cell, then those of the output layer."""
    params: Params = []
    for layer in range(L):
        for _ in range(CELLS[cell].num_gates):
            params += three(V if layer == 0 else H, H)
    params += [normal(H, V), torch.zeros(V)]
    for param in params:
        param.requires_grad_()
    return params


def zero_state(cell: str, B: int, H: int, L: int = 1) -> State:
    """The state before the first step: in each layer zeros of shape (B, H) for H and, in the LSTM, for C."""
    return tuple(torch.zeros(B, H) for _ in range(L * CELLS[cell].num_states))


# ------------------------------------------------------------------------------------- one step of each cell


def rnn_step(X: Tensor, state: State, params: Params) -> State:
    """The plain recurrent network: (B, V) inputs, state (H,)."""
    W_xh, W_hh, b_h = params
    (H,) = state
    H = torch.tanh(X @ W_xh + H @ W_hh + b_h)
    return (H,)


def gru_step(X: Tensor, state: State, params: Params) -> State:
    """The gated recurrent unit: (B, V) inputs, state (H,)."""
    W_xr, W_hr, b_r, W_xz, W_hz, b_z, W_xh, W_hh, b_h = params
    (H,) = state
    R = torch.sigmoid(X @ W_xr + H @ W_hr + b_r)  # reset gate
    Z = torch.sigmoid(X @ W_xz + H @ W_hz + b_z)  # update gate
    H_tilde = torch.tanh(X @ W_xh + R * (H @ W_hh) + b_h)  # candidate
    H = Z * H + (1 - Z) * H_tilde
    return (H,)


def lstm_step(X: Tensor, state: State, params: Params) -> State:
    """Long short-term memory: (B, V) inputs, state (H, C)."""
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c = params
    H, C = state
    I = torch.sigmoid(X @ W_xi + H @ W_hi + b_i)  # input gate
    F = torch.sigmoid(X @ W_xf + H @ W_hf + b_f)  # forget gate
    O = torch.sigmoid(X @ W_xo + H @ W_ho + b_o)  # output gate
    C_tilde = torch.tanh(X @ W_xc + H @ W_hc + b_c)  # candidate
    C = F * C + I * C_tilde
    H = O * torch.tanh(C)
    return (H, C)


@dataclass(frozen=True)
class Cell:
    """A step, how many gates (with the candidate) have parameters, and how many tensors make its state."""

    step: Callable[[Tensor, State, Params], State]
    num_gates: int
    num_states: int


CELLS = {"rnn": Cell(rnn_step, 1, 1), "gru": Cell(gru_step, 3, 1), "lstm": Cell(lstm_step, 4, 2)}

# ------------------------------------------------------------------------------------------------- the model


@dataclass
class Model:
    """A language model: a cell by name, its parameters and the output layer's, and the vocabulary."""

    cell: str
    params: Params
    tokenizer: CharTokenizer

    @property
    def num_hiddens(self) -> int:
        """H."""
        return self.params[-2].shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return (len(self.params) - 2) // (3 * CELLS[self.cell].num_gates)


def one_hot(ids: Tensor, V: int) -> Tensor:
    """Rows of the identity: (T, B) ids to (T, B, V); a symbol that training never saw is a row of zeros."""
    identity = torch.cat([torch.eye(V), torch.zeros(1, V)])
    return identity[ids]


def forward(model: Model, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """(T, B) ids and the state before them to (T, B, V) logits and the state after them."""
    *cell_params, W_hq, b_q = model.params
    step, num_states, num_params = (
        CELLS[model.cell].step,
        CELLS[model.cell].num_states,
        len(cell_params) // model.num_layers,
    )
    H_TBH = []
    for X in one_hot(ids, model.tokenizer.size).unbind():
        before, state = state, ()
        for layer in range(model.num_layers):
            own_state = before[layer * num_states : (layer + 1) * num_states]
            own_state = step(X, own_state, cell_params[layer * num_params : (layer + 1) * num_params])
            X = own_state[0]  # what the layer above reads
            state += own_state
        H_TBH.append(X)
    return torch.stack(H_TBH) @ W_hq + b_q, state


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(target) in nats: (T, B, V) logits, (T, B) targets, of which those below 0 do not count."""
    counted = targets >= 0
    log_p = torch.log_softmax(logits[counted], dim=-1)
    return -log_p.gather(-1, targets[counted].unsqueeze(-1)).mean()


def clip_gradients(params: Params, theta: float) -> float:
    """Scale all gradients by one factor so that their common L2 norm is at most theta; return the norm before."""
    grads = [param.grad for param in params if param.grad is not None]
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
    if norm > theta:
        for grad in grads:
            grad *= theta / norm
    return norm


# -------------------------------------------------------------------------------------------------- training


@dataclass
class Epoch:
    """What one pass over the text gave: perplexity while training (the weights move meanwhile), and seconds."""

    number: int
    perplexity: float
    seconds: float
    tokens: int
    updates: int
    model: Model


def train(
    text: str,
    cell: str = "lstm",
    num_hiddens: int = 256,
    num_steps: int = 35,
    batch_size: int = 32,
    learning_rate: float = 100.0,
    theta: float = 0.01,
    num_epochs: int = 160,
    random_sampling: bool = False,
    seed: int = 0,
    num_layers: int = 1,
) -> Iterator[Epoch]:
    """Train a model on `text` as the lecture does, and yield each epoch with the model as it then is.

    The defaults are the lecture's: plain gradient descent with a learning rate so large that nearly every step is
    clipped and has length learning_rate * theta = 1. Consecutive sampling carries the state from batch to batch,
    cut off from the graph, so that gradients reach back `num_steps` steps and no further.
    """
    torch.manual_seed(seed)
    tokenizer = CharTokenizer.train(text)
    model = Model(cell, get_params(cell, tokenizer.size, num_hiddens, num_layers), tokenizer)
    ids = tokenizer.encode(text)
    sampler = (
        RandomWindows(ids, batch_size, num_steps, seed)
        if random_sampling
        else ConsecutiveLanes(ids, batch_size, num_steps, seed, drop_incomplete=True)
    )
    updates = sampler.steps_per_epoch
    for epoch in range(num_epochs):
        start, total, tokens = time.perf_counter(), 0.0, 0
        state = zero_state(cell, batch_size, num_hiddens, num_layers)
        for update in range(updates):
            batch = sampler.batch(epoch * updates + update)
            if batch.starts_fresh:
                state = zero_state(cell, batch_size, num_hiddens, num_layers)
            state = tuple(s.detach() for s in state)
            logits, state = forward(model, torch.from_numpy(batch.inputs_TB), state)
            loss = cross_entropy(logits, torch.from_numpy(batch.targets_TB))
            for param in model.params:
                param.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            clip_gradients(model.params, theta)
            with torch.no_grad():
                for param in model.params:
                    if param.grad is not None:  # a copy of this file may leave a gate unused
                        param -= learning_rate * param.grad
            total += loss.item() * batch.tokens
            tokens += batch.tokens
        seconds = time.perf_counter() - start
        yield Epoch(epoch + 1, math.exp(total / tokens), seconds, tokens, updates, model)


# ------------------------------------------------------------------------------------------------ prediction


@torch.no_grad()
def predict(model: Model, prefix: str, num_chars: int) -> str:
    """Warm the state on `prefix`, then add the most probable character `num_chars` times.

    Raises:
        ValueError: the prefix is empty: there is nothing to predict from.
    """
    if not prefix:
        raise ValueError("prediction needs a prefix of at least one character")
    ids = torch.from_numpy(model.tokenizer.encode(prefix)).long().unsqueeze(1)
    state = zero_state(model.cell, 1, model.num_hiddens, model.num_layers)
    logits, state = forward(model, ids, state)
    predicted: list[int] = []
    for _ in range(num_chars):
        predicted.append(int(logits[-1, 0].argmax()))
        logits, state = forward(model, torch.tensor([[predicted[-1]]]), state)
    return prefix + model.tokenizer.decode(predicted)


@torch.no_grad()
def perplexity(model: Model, text: str) -> float:
    """Perplexity of `text` without training: one row, the state carried from a zero state at its first character.

    Characters outside the vocabulary are read, never asked for.
    """
    ids = torch.from_numpy(model.tokenizer.encode(text)).long().unsqueeze(1)
    targets = torch.where(ids[1:] < model.tokenizer.size, ids[1:], -1)
    logits, _ = forward(model, ids[:-1], zero_state(model.cell, 1, model.num_hiddens, model.num_layers))
    return math.exp(float(cross_entropy(logits, targets)))
