# /// script
# dependencies = ["mxnet==1.9.1", "numpy==1.23.5"]
# [tool.longshort]
# apart = true
# ///
"""The lecture's training step in its own engine: MXNet Gluon's `rnn.LSTM`, `nn.Dense`, clipping and `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beside


def make(weights: dict[str, Any]) -> Callable[[Any, Any], float]:
    """Return a step from these weights."""
    import mxnet as mx
    from mxnet import autograd, gluon, nd

    layer = gluon.rnn.LSTM(beside.H, input_size=beside.V)
    dense = gluon.nn.Dense(beside.V, in_units=beside.H)
    layer.initialize()
    dense.initialize()
    names = {"i2h_weight": "weight_ih", "h2h_weight": "weight_hh", "i2h_bias": "bias_ih", "h2h_bias": "bias_hh"}
    for theirs, ours in names.items():
        getattr(layer, f"l0_{theirs}").set_data(nd.array(weights[f"recurrent.{ours}_l0"]))
    layer.l0_h2h_bias.grad_req = "null"
    dense.weight.set_data(nd.array(weights["output.weight"]))
    dense.bias.set_data(nd.array(weights["output.bias"]))
    trained = [p for block in (layer, dense) for p in block.collect_params().values() if p.grad_req != "null"]
    trainer = gluon.Trainer(trained, "sgd", {"learning_rate": beside.LEARNING_RATE, "momentum": 0.0, "wd": 0.0})
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    state = layer.begin_state(batch_size=beside.B, ctx=mx.cpu())

    def step(inputs: Any, targets: Any) -> float:
        nonlocal state
        x, y = nd.array(inputs), nd.array(targets).reshape(-1)
        state = [tensor.detach() for tensor in state]
        with autograd.record():
            output, state = layer(nd.one_hot(x, beside.V), state)
            loss = loss_of(dense(output.reshape((-1, beside.H))), y).mean()
        loss.backward()
        gradients = [p.grad() for p in trained]
        norm = nd.sqrt(nd.add_n(*[(g * g).sum() for g in gradients])).asscalar()
        if norm > beside.CLIP:
            for gradient in gradients:
                gradient *= beside.CLIP / norm
        trainer.step(1)
        return float(loss.asscalar())

    return step


if __name__ == "__main__":
    beside.run(__file__, make, "MXNet Gluon", "mxnet")
