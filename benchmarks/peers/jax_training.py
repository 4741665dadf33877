# /// script
# dependencies = ["jax==0.10.2", "jaxlib==0.10.2"]
# [tool.longshort]
# apart = true
# ///
"""The lecture's training step in JAX: `lax.scan` over the steps, all compiled, the input product taken at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beside


def make(weights: dict[str, Any]) -> Callable[[Any, Any], float]:
    """Return a step from these weights."""
    import jax
    import jax.numpy as jnp

    names = {"W_x": "recurrent.weight_ih_l0", "W_h": "recurrent.weight_hh_l0", "b": "recurrent.bias_ih_l0"}
    names |= {"W_q": "output.weight", "b_q": "output.bias"}
    parameters = {short: jnp.asarray(weights[name]) for short, name in names.items()}

    def loss_of(p: Any, inputs: Any, targets: Any, state: Any) -> Any:
        first = jax.nn.one_hot(inputs, beside.V) @ p["W_x"].T + p["b"]

        def cell(carried: Any, x: Any) -> Any:
            h, c = carried
            i, f, g, o = jnp.split(x + h @ p["W_h"].T, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        state, h = jax.lax.scan(cell, state, first)
        log_p = jax.nn.log_softmax(h @ p["W_q"].T + p["b_q"])
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean(), state

    def update(p: Any, inputs: Any, targets: Any, state: Any) -> Any:
        (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(p, inputs, targets, state)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        rate = beside.LEARNING_RATE * jnp.minimum(1.0, beside.CLIP / (norm + 1e-6))
        return jax.tree.map(lambda w, g: w - rate * g, p, gradients), loss, state

    compiled = jax.jit(update, donate_argnums=(0, 3))
    state = tuple(jnp.zeros((beside.B, beside.H)) for _ in range(2))

    def step(inputs: Any, targets: Any) -> float:
        nonlocal parameters, state
        parameters, loss, state = compiled(parameters, inputs, targets, state)
        return float(loss)

    return step


if __name__ == "__main__":
    beside.run(__file__, make, "JAX, lax.scan", "jax")
