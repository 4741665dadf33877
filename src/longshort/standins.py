"""What every module that takes the place of one of PyTorch's can do: become it, and let it say what is wrong."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import fx, nn
from torch.overrides import TorchFunctionMode

from longshort import backends, packing
from longshort.errors import UsageError

OWN_ATTRIBUTES = ("options", "_stack", "_stock", "_needs", "_option_sizes", "_option_names", "_quick")
"""What our modules hold beside what PyTorch's hold; all but `options` are caches, made when first asked for."""
CACHES = OWN_ATTRIBUTES[1:]
_REFERENCES = "_flat_weight_refs"
"""What PyTorch's layers hold that refers weakly to their weights, and that they make anew."""


def deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a module whose weights lie in one piece, as cuDNN reads them, if its own could."""
    kind: Any = type(module)
    copied = memo[id(module)] = kind.__new__(kind)
    # Not by `__getstate__`: of a module with parametrizations it raises, and PyTorch's own are copied without it.
    state = {name: value for name, value in module.__dict__.items() if name not in CACHES and name != _REFERENCES}
    copied.__setstate__(copy.deepcopy(state, memo))
    copied.flatten_parameters()
    return copied


class StandIn(nn.Module):
    """A module that takes the place of one of PyTorch's, which it could become with the same attributes."""

    torch_type: type[nn.Module]
    """PyTorch's module."""

    def prepare(self) -> None:
        """Make the caches now: where torch.compile reads them they must be there."""
        for name in CACHES:
            getattr(self, name, None)

    def lacking(self) -> frozenset[str]:
        """Return the names of the options that PyTorch's module lacks and that change what this one computes."""
        return frozenset()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        packing.unwatch(self.parameters(recurse=False))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        packing.unwatch(self.parameters(recurse=False))
        super()._load_from_state_dict(*arguments)

    def as_torch(self) -> nn.Module:
        """Return PyTorch's module with the same parameters, buffers and hooks.

        Raises:
            UsageError: this one has an option that PyTorch's lacks.
        """
        if lacking := self.lacking():
            raise UsageError(f"PyTorch's {self.torch_type.__name__} has no {', '.join(sorted(lacking))}.")
        module = self.torch_type.__new__(self.torch_type)
        module.__dict__.update({n: value for n, value in self.__dict__.items() if n not in OWN_ATTRIBUTES})
        return module

    def as_node(self, input: fx.Proxy, *rest: Any, **arguments: Any) -> fx.Proxy:
        """Return this module's call as one node of the graph that `torch.fx.symbolic_trace` draws, as of PyTorch's.

        Args:
            input: stands for the input while the graph is drawn.
            rest: what follows it.
            arguments: by keyword.

        Raises:
            TraceError: this module is the whole of what is traced, as PyTorch raises then.
        """
        tracer = cast(fx.Tracer, input.tracer)
        if tracer.root is self:
            raise fx.proxy.TraceError("A recurrent layer is one node of the model that holds it: trace that model.")
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *rest), arguments)

    __prepare_scriptable__ = as_torch
    """What `torch.jit.script` compiles in place of this module."""


class NoKernel(TorchFunctionMode):
    """While it lasts, PyTorch's layers check their arguments, but raise where they would go on to a kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it is a recurrent kernel."""
        if func in backends.TORCH_OPS.values():
            raise RuntimeError("Input, state and weights must be of one type and on one device")
        return func(*args, **(kwargs or {}))
