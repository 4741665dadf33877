"""PyTorch's own samples and errors for its recurrent modules (`ModuleInfo`), run against ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recurrent import CELL_PAIRS, PAIRS, flat, same

pytest.importorskip("expecttest")
common_modules: Any = pytest.importorskip("torch.testing._internal.common_modules")
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

INFOS = {info.module_cls: info for info in common_modules.module_db}
OURS = {theirs: ours for ours, theirs in (*PAIRS, *CELL_PAIRS)}
ERRORS = common_modules.ModuleErrorEnum


def samples_of(theirs: Any, training: bool) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments of constructors, and of calls, float64."""
    info = INFOS[theirs]
    more = {"with_packed_sequence": True} if theirs in (nn.RNN, nn.GRU) else {}
    for sample in info.module_inputs_func(info, "cpu", torch.float64, True, training, **more):
        yield sample.constructor_input, sample.forward_input.args, sample.forward_input.kwargs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("theirs", OURS)
def test_samples(theirs: Any, training: bool) -> None:
    count = 0
    for constructor, arguments, keywords in samples_of(theirs, training):
        layer = OURS[theirs](*constructor.args, **constructor.kwargs, dtype=torch.float64).train(training)
        peer = theirs(*constructor.args, **constructor.kwargs, dtype=torch.float64).train(training)
        layer.load_state_dict(peer.state_dict(), strict=True)
        peer.load_state_dict(layer.state_dict(), strict=True)
        same(layer(*arguments, **keywords), peer(*arguments, **keywords))
        count += 1
    assert count >= 2


@pytest.mark.parametrize("theirs", OURS)
def test_gradients(theirs: Any) -> None:
    for constructor, arguments, keywords in samples_of(theirs, True):
        if isinstance(arguments[0], PackedSequence):
            continue
        layer = OURS[theirs](*constructor.args, **constructor.kwargs, dtype=torch.float64)
        inputs = [*flat(arguments), *layer.parameters()]
        shapes = [1 if isinstance(argument, Tensor) else len(argument) for argument in arguments]

        def run(*tensors: Tensor, layer: Any = layer, shapes: Any = shapes, keywords: Any = keywords) -> Any:
            given, rest = [], list(tensors)
            for number in shapes:
                given.append(rest.pop(0) if number == 1 else tuple(rest.pop(0) for _ in range(number)))
            names = [name for name, _ in layer.named_parameters()]
            return tuple(
                flat(torch.func.functional_call(layer, dict(zip(names, rest, strict=True)), tuple(given), keywords))
            )

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theirs", OURS)
def test_errors(theirs: Any, dtype: torch.dtype) -> None:
    info = INFOS[theirs]
    errors = info.module_error_inputs_func(info, "cpu", dtype, False, True)
    assert len(errors) >= 4
    for sample in errors:
        constructor, call = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        if sample.error_on is ERRORS.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                OURS[theirs](*constructor.args, **constructor.kwargs)
            continue
        layer = OURS[theirs](*constructor.args, **{"dtype": dtype, **constructor.kwargs})
        with pytest.raises(sample.error_type, match=sample.error_regex):
            layer(*call.args, **call.kwargs)
