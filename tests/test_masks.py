"""Dropout and zoneout drop the share that they are asked for, each number by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longshort
from longshort import kernels, masks
from recurrent import same

LIKE = torch.zeros(1)
MANY = 200_000


def far(found: float, expected: float, count: int) -> bool:
    """Whether a share of `count` draws is further from its probability than five standard deviations."""
    return abs(found - expected) > 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.731, 0.99])
def test_the_share_is_right_in_each_quarter_of_a_number(probability: float) -> None:
    torch.manual_seed(0)
    drawn = masks.bernoulli((MANY, 4), probability, LIKE)
    assert {*drawn.flatten().tolist()} == {0.0, 1.0}
    for column in drawn.unbind(1):
        assert not far(float(column.mean()), probability, MANY)
    for i in range(4):
        for j in range(i):  # as often together as by chance
            assert not far(float((drawn[:, i] * drawn[:, j]).mean()), probability**2, MANY)
    after = (drawn[1:] * drawn[:-1]).mean()
    assert not far(float(after), probability**2, MANY)


def test_a_wrong_share_would_be_seen() -> None:
    torch.manual_seed(0)
    assert far(float(masks.bernoulli((MANY,), 0.1, LIKE).mean()), 0.105, MANY)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_what_is_kept_makes_up_for_what_is_dropped(share: float) -> None:
    torch.manual_seed(0)
    mask = masks.dropout_mask((MANY,), share, LIKE)
    kept = sorted({*mask.tolist()})
    assert kept == [0.0, pytest.approx(1 / (1 - share), rel=1e-4)]
    assert not far(float((mask == 0).float().mean()), share, MANY)
    parts = round((1 - share) * masks.PARTS)
    assert kept[1] == pytest.approx(masks.PARTS / parts, rel=1e-7)  # the mean is kept exactly


@given(
    shape=st.lists(st.integers(0, 5), max_size=4), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_shapes_types_and_ends(shape: list[int], dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    for probability in (0.0, 0.4, 1.0):
        drawn = masks.bernoulli(shape, probability, like)
        assert (list(drawn.shape), drawn.dtype) == (shape, dtype)
        assert probability == 0.4 or bool((drawn == probability).all())
    x = torch.randn(shape, dtype=dtype)
    assert masks.dropout(x, 0.0) is x
    assert masks.dropout(x, 0.5, training=False) is x
    assert not masks.dropout(x, 1.0).any()
    dropped = masks.dropout(x, 0.5)
    assert torch.equal(dropped, torch.where(dropped == 0, 0, 2 * x))


def test_gradients_go_where_numbers_went() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    y = masks.dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * gradient)


def test_the_seed_decides() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return masks.dropout_mask((40, 30), 0.5, LIKE)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_transforms_and_compilers_have_pytorchs_own() -> None:
    x = torch.ones(3, 1000)
    rows = torch.func.vmap(lambda row: masks.dropout(row, 0.5), randomness="different")(x)
    assert not torch.equal(rows[0], rows[1])
    assert torch.func.grad(lambda v: masks.dropout(v, 0.5).sum())(x).unique().tolist() == [0.0, 2.0]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(v: Tensor) -> Tensor:
        return masks.dropout(v, 0.5)

    torch.manual_seed(0)
    found = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.5))


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 2]])
def test_the_kernel_does_not_decide_what_is_dropped(kernel: str, batch_first: bool, lengths: list[int] | None) -> None:
    layer = longshort.GRU(3, 40, num_layers=3, dropout=0.4, bidirectional=True, batch_first=batch_first)
    x = torch.randn((2, 3, 3) if batch_first else (3, 2, 3))
    found = []
    for name in (kernel, "reference"):
        torch.manual_seed(3)
        with kernels.use(name):
            found.append(layer(x, lengths=lengths))
    same(found[0], found[1])


def test_a_layer_drops_this_way_between_layers() -> None:
    layer = longshort.LSTM(3, 400, num_layers=2, dropout=0.25)
    torch.manual_seed(3)
    found = layer(torch.ones(2, 1, 3))[0]
    single = [longshort.LSTM(3, 400), longshort.LSTM(400, 400)]
    for number, each in enumerate(single):
        each.load_state_dict({n: getattr(layer, n.replace("l0", f"l{number}")) for n in each.state_dict()})
    torch.manual_seed(3)
    torch.testing.assert_close(found, single[1](masks.dropout(single[0](torch.ones(2, 1, 3))[0], 0.25))[0])
