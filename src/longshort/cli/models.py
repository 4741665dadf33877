"""The model that a verb was given, as what runs it best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longshort.cli import console
from longshort.errors import UsageError


def decoder(model: str | Path, weights: str = "float32") -> Any:
    """Return the torch-free decoder of `model`, or where only PyTorch can run its cell, a `LanguageModel`.

    With weights of another precision it is a decoder, and what they cost is said.
    """
    from longshort.decoder import load_decoder

    if weights != "float32":
        return _rounded(load_decoder(model), weights)
    try:
        return load_decoder(model)
    except UsageError:
        loaded = language_model(model)
        if loaded is None:
            raise
        return loaded


def reader(model: str | Path) -> Any:
    """Return what reads texts quickest: a decoder on native kernels, else PyTorch, else a decoder on NumPy."""
    loaded = decoder(model)
    return loaded if getattr(loaded, "writes", True) else language_model(model) or loaded


def _rounded(exact: Any, weights: str) -> Any:
    loaded = exact.rounded(weights)
    tell_cost(exact, loaded, weights)
    return loaded


def tell_cost(exact: Any, other: Any, weights: str) -> None:
    """Say what a decoder with other weights loses against the exact one."""
    from longshort.generation import cost_in_bits

    cost = cost_in_bits(exact, other)
    console.say(f"longshort: {weights} weights cost {cost:.4f} bits a character (on 16 texts that the model wrote).")


def language_model(model: str | Path) -> Any:
    """Return the `LanguageModel` at `model`; None where PyTorch is not installed."""
    from longshort.machine import version_of

    if version_of("torch") is None:
        return None
    from longshort.model import load_language_model

    return load_language_model(model)
