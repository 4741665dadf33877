"""Kinds of flags that several verbs share, and the flags of `train`, made from the options of `TrainConfig`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import cyclopts
from cyclopts import Parameter

from longshort.config import TrainConfig, flag_of


def _whole_number(_: type, tokens: Sequence[cyclopts.Token]) -> int:
    """Convert a flag's value; unlike cyclopts, which would round it, refuse 1.5."""
    with contextlib.suppress(ValueError, OverflowError):
        number = float(tokens[0].value)
        if number.is_integer():
            return int(tokens[0].value) if tokens[0].value.isdecimal() else int(number)
    raise ValueError(f"a whole number was wanted, not {tokens[0].value!r}")


Int = Annotated[int, Parameter(converter=_whole_number)]


def _option_class(config: type, left_out: tuple[str, ...]) -> type:
    """Return a dataclass of optional flags, one for each option of `config`: None means that it was not given."""
    hints, annotations = get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if field.name not in left_out:
            default = "" if field.default in (None, False) else f" (default: {field.default})"
            whole = int in (hints[field.name], *get_args(hints[field.name]))
            convert = _whole_number if whole else None
            # An option with a flag of its own is known by its name too, as in TOML files.
            names = tuple(dict.fromkeys((flag_of(field), f"--{field.name.replace('_', '-')}")))
            parameter = Parameter(name=names, help=field.metadata["help"] + default, converter=convert)
            annotations[field.name] = Annotated[hints[field.name] | None, parameter]
    body = {"__annotations__": annotations, "__module__": __name__, **dict.fromkeys(annotations)}
    return dataclasses.dataclass(type(f"{config.__name__}Flags", (), body))


if TYPE_CHECKING:
    TrainFlags = Any
else:
    TrainFlags = _option_class(TrainConfig, left_out=("texts",))

Json = Annotated[bool, Parameter(help="Print one JSON object and nothing else.", negative="", show_default=False)]
Corpus = Annotated[str | None, Parameter(help="A named corpus instead of TEXT: builtin, timemachine, tinyshakespeare.")]
OwnCell = Annotated[
    str | None, Parameter(help="FILE.py:NAME of the model's cell, if it is one of your own: that file is run.")
]
Weights = Annotated[
    Literal["float32", "bfloat16", "int8"],
    Parameter(help="int8 and, where the processor has it, bfloat16 are faster; says what they cost."),
]
DataDir = Annotated[str | None, Parameter(help="Directory that holds the named corpora, instead of a download.")]
