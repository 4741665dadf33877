"""A trained model as an ONNX file, which other runtimes run without longshort: one operator a layer.

    language model   ids (T, B), h [and c] (L, B, H)              logits (T, B, V), h_n [and c_n] (L, B, H)
    classifier       ids (T, B) or x (T, B, I), lengths (B)       logits (B, C)
    tagger           the same                                     logits (T, B, C)

T and B may be any. The file also holds, as texts of its metadata, the model's configuration and its tokenizer.json.

    T  steps   B  rows   V  symbols   I  input width   H  hidden units   G  gates times H   L  layers   D  directions
    C  labels
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort import __version__, checkpoint, decoder, durable
from longshort.config import LabelModelConfig, ModelConfig, adaptive_cutoffs
from longshort.errors import LongshortError, MissingExtraError, OutputError, UsageError
from longshort.labels import label_decoder
from longshort.labels.examples import Batch
from longshort.machine import version_of

try:
    import onnx
    from onnx import helper, numpy_helper
except ModuleNotFoundError as error:
    raise MissingExtraError("onnx", "export", "An ONNX file") from error

OPSET = 17
"""Of the ONNX operators; what runs 17 (ONNX 1.12 and later) runs later files too."""
_IR_VERSION = 8
"""Of the file's form, of the same time."""
LIMIT = 2**31 - 2**26
"""The most bytes of weights: a file of one piece cannot have 2 GiB, and has the tokenizer too, of 64 MB at most."""
TOLERANCE = 1e-3
"""More than so much, of the largest logit or of 1, another runtime may not differ; 1e-6 is usual."""
COMPARED_STEPS = 6
"""Enough for every weight to be used. In a long text rounding alone makes a chaotic model differ."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Operator:
    """How ONNX has a cell."""

    name: str
    order: tuple[int, ...]
    """Where each of its gates lies among ours."""
    activations: tuple[str, ...] = ()
    """Of one direction, where they are not the operator's own."""
    attributes: Mapping[str, Any] | None = None


_OPERATORS = {
    "rnn": _Operator("RNN", (0,)),
    "rnn_relu": _Operator("RNN", (0,), activations=("Relu",)),
    # z, r, h; and the reset gate acts on the product.
    "gru": _Operator("GRU", (1, 0, 2), attributes={"linear_before_reset": 1}),
    "lstm": _Operator("LSTM", (0, 3, 1, 2)),  # i, o, f, c
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export_onnx` has written."""

    file: str
    bytes: int
    opset: int
    inputs: dict[str, list[int | str]]
    """Shape of each, the lengths that may be any by their letters."""
    outputs: dict[str, list[int | str]]
    checked_with: str | None
    """The runtime that the file was compared in with the model; None where there is none."""
    largest_difference: float | None
    """Of a logit, or of a tensor of the state."""

    def to_dict(self) -> dict[str, Any]:
        """Return all by name."""
        return asdict(self)


def load(path: str | Path) -> Any:
    """Return the model at `path`, a run or a model directory, as `export_onnx` takes it.

    Raises:
        UsageError: there is nothing at `path`, or ONNX has no operator for such a model.
        CheckpointError: it is damaged, or the files do not belong together.
        MissingExtraError: only PyTorch can run it (an adaptive softmax), and is not installed.
    """
    saved = checkpoint.load_model(path)
    _require_operators(saved.model)
    if "labels" in saved.model:
        return label_decoder.from_saved(saved)
    if not saved.model.get("adaptive_softmax"):
        return decoder.from_saved(saved)
    if version_of("torch") is None:
        raise MissingExtraError("PyTorch", "train", "A model with an adaptive softmax")
    from longshort import model

    return model.from_saved(saved)


def export_onnx(model: Any, path: str | Path) -> Exported:
    """Write a model as the new ONNX file `path`, and compare both where ONNX Runtime is installed.

    Args:
        model: a `Decoder`, `LanguageModel`, `LabelDecoder`, `SequenceClassifier` or `SequenceTagger`.
        path: the file, which must not be there yet.

    Raises:
        MissingExtraError: the package `onnx` is not installed.
        UsageError: ONNX has no operator for such a model, or it is too large for one file.
        OutputError: the file is there already, or cannot be written.
        LongshortError: the runtime does not give what the model gives; nothing is written then.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} is there already.", "Choose another name, or delete it.")
    proto = to_proto(model)
    data: bytes = proto.SerializeToString()
    runtime, difference = _compare(model, data)
    durable.write_file(path, data)
    inputs, outputs = _shapes(proto.graph.input), _shapes(proto.graph.output)
    return Exported(str(path), len(data), OPSET, inputs, outputs, runtime, difference)


def to_proto(model: Any) -> Any:
    """Return a model as an `onnx.ModelProto`; arguments and errors as of `export_onnx`."""
    config = model.config
    _require_operators(config.to_dict())
    graph = _Graph(model.weights())
    (_labelling if isinstance(config, LabelModelConfig) else _language_model)(graph, config)
    if (size := sum(constant.ByteSize() for constant in graph.constants.values())) > LIMIT:
        raise UsageError(f"The weights have {size:,} bytes; an ONNX file of one piece has {LIMIT:,} at most.")
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "longshort", graph.inputs, graph.outputs, list(graph.constants.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="longshort",
        producer_version=__version__,
    )
    texts = {"longshort_config": json.dumps(config.to_dict())}
    if model.tokenizer is not None:
        texts["longshort_tokenizer"] = model.tokenizer.to_json()
    helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _shapes(values: Iterable[Any]) -> dict[str, list[int | str]]:
    return {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}


def _require_operators(config: Mapping[str, Any]) -> None:
    if config.get("cell") not in _OPERATORS:
        raise UsageError(f"ONNX has no operator for the cell {config.get('cell')}; it has {', '.join(_OPERATORS)}.")
    if config.get("layer_norm"):
        raise UsageError("ONNX's recurrent operators have no layer normalisation.", "Train without --layer-norm.")


class _Graph:
    """An ONNX graph that grows.

    Args:
        weights: of the model, by name.
    """

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def add(self, operator: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node and return the name of its first output, which if `outputs` names none is made up."""
        names = outputs or [f"{operator.lower()}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def constant(self, name: str, value: Any) -> str:
        """Add an array of the file's own, if it is not there yet."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = np.float32) -> str:
        """Add an array that each call gives."""
        self.inputs.append(_described(name, shape, dtype))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Say that the node which puts out `name` gives a result, float32."""
        self.outputs.append(_described(name, shape, np.float32))

    def linear(self, x: str, weight: str, bias: str | None = None, outputs: Sequence[str] = ()) -> str:
        """Add W x + b, of the weights with these names."""
        product = self.constant(f"{weight}.T", self.weights[weight].T)
        if bias is None:
            return self.add("MatMul", x, product, outputs=outputs)
        return self.add("Add", self.add("MatMul", x, product), self.constant(bias, self.weights[bias]), outputs=outputs)

    def symbols(self, ids: str, config: ModelConfig | LabelModelConfig) -> str:
        """Add what the first layer reads of symbols: rows of the embedding, or one-hot; of the unknown one zeros."""
        if config.embedding:
            rows = self.constant("embedding", decoder.with_unknown(self.weights["embedding.weight"]))
            return self.add("Gather", rows, ids)
        V = config.vocab_size
        # An id that is no column, as the unknown symbol's, is zeros.
        depth, values = self.constant("vocab_size", np.int64(V)), self.constant("off_on", np.array([0, 1], np.float32))
        return self.add("OneHot", ids, depth, values)

    def layer(
        self, cell: str, x: str, of: Sequence[str], *, lengths: str = "", state: Sequence[str] = ()
    ) -> tuple[str, list[str]]:
        """Add one layer.

        Args:
            cell: its cell.
            x: what it reads, (T, B, I).
            of: how the weights of each direction end, such as `l0` and `l0_reverse`.
            lengths: (B), int32, if not every row has every step.
            state: each tensor (D, B, H), if it is not zero before.

        Returns:
            What it puts out, (T, B, D H), and each tensor of the state after each row's last step, (D, B, H).
        """
        operator, name = _OPERATORS[cell], of[0]

        def weights(kind: str) -> list[Array]:
            # Stored once a direction, its gates one after the other.
            gates = [np.split(self.weights[f"recurrent.{kind}_{each}"], len(operator.order)) for each in of]
            return [np.concatenate([own[gate] for gate in operator.order]) for own in gates]

        biases = [np.concatenate(pair) for pair in zip(weights("bias_ih"), weights("bias_hh"), strict=True)]
        constants = [
            self.constant(f"W_{name}", np.stack(weights("weight_ih"))),
            self.constant(f"R_{name}", np.stack(weights("weight_hh"))),
            self.constant(f"B_{name}", np.stack(biases)),
        ]
        outputs = [f"{part}_{name}" for part in ("Y", *(f"Y_{state}" for state in decoder.CELLS[cell].states))]
        attributes = dict(operator.attributes or {})
        if operator.activations:
            attributes["activations"] = operator.activations * len(of)
        self.add(
            operator.name,
            *(x, *constants, lengths, *state),
            outputs=outputs,
            hidden_size=self.weights[f"recurrent.weight_hh_{name}"].shape[1],
            direction="bidirectional" if len(of) == 2 else "forward",
            **attributes,
        )
        # (T, D, B, H) to (T, B, D H); in a shape 0 is what it was.
        rows_first = self.add("Transpose", outputs[0], perm=(0, 2, 1, 3))
        return self.add("Reshape", rows_first, self.constant("rows", np.array([0, 0, -1]))), outputs[1:]


def _described(name: str, shape: Sequence[int | str], dtype: Any) -> Any:
    return helper.make_tensor_value_info(name, _type_number(dtype), shape)


def _type_number(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _language_model(graph: _Graph, config: ModelConfig) -> None:
    """Fill the graph of a language model."""
    L, H, V = config.layers, config.hidden, config.vocab_size
    x = graph.symbols(graph.input("ids", ("T", "B"), np.int64), config)
    states = decoder.CELLS[config.cell].states
    before: list[list[str]] = []
    for name in states:
        parts = [f"{name}_l{layer}" for layer in range(L)]
        sizes = graph.constant(f"{name}_layers", np.ones(L, np.int64))
        graph.add("Split", graph.input(name, (L, "B", H)), sizes, outputs=parts, axis=0)
        before.append(parts)
    after: list[list[str]] = []
    for layer in range(L):
        y, ends = graph.layer(config.cell, x, (f"l{layer}",), state=[parts[layer] for parts in before])
        x = graph.add("Add", x, y) if layer and config.residual else y
        after.append(ends)
    if config.adaptive_softmax:
        _adaptive_softmax(graph, config, x)
    else:
        graph.linear(x, "embedding.weight" if config.tied else "output.weight", "output.bias", outputs=["logits"])
    graph.output("logits", ("T", "B", V))
    for name, ends_of_name in zip(states, zip(*after, strict=True), strict=True):
        graph.add("Concat", *ends_of_name, outputs=[f"{name}_n"], axis=0)
        graph.output(f"{name}_n", (L, "B", H))


def _adaptive_softmax(graph: _Graph, config: ModelConfig, x: str) -> None:
    """Add log p of every symbol: of the frequent ones, and of each group of others times log p in the group."""
    first, *others = adaptive_cutoffs(config.vocab_size)
    groups = [f"group_{number}" for number in range(len(others) + 1)]
    head = graph.add("LogSoftmax", graph.linear(x, "output.head.weight", "output.head.bias"), axis=-1)
    sizes = graph.constant("head_parts", np.array([first, *(1 for _ in groups)]))
    graph.add("Split", head, sizes, outputs=["frequent", *groups], axis=-1)
    log_p = ["frequent"]
    for number, group in enumerate(groups):
        narrow = graph.linear(x, f"output.tail.{number}.0.weight")
        within = graph.add("LogSoftmax", graph.linear(narrow, f"output.tail.{number}.1.weight"), axis=-1)
        log_p.append(graph.add("Add", within, group))
    graph.add("Concat", *log_p, outputs=["logits"], axis=-1)


def _labelling(graph: _Graph, config: LabelModelConfig) -> None:
    """Fill the graph of a classifier or tagger."""
    if config.inputs:
        x = graph.input("x", ("T", "B", config.inputs))
    else:
        x = graph.symbols(graph.input("ids", ("T", "B"), np.int64), config)
    given = graph.input("lengths", ("B",), np.int64)
    lengths = graph.add("Cast", given, to=_type_number(np.int32))
    ends: list[str] = []
    for layer in range(config.layers):
        of = [f"l{layer}{suffix}" for suffix in label_decoder.suffixes(config)]
        y, ends = graph.layer(config.cell, x, of, lengths=lengths)
        x = graph.add("Add", x, y) if layer and config.residual else y
    if not config.per_step and config.pooling == "ends":
        rows_first = graph.add("Transpose", ends[0], perm=(1, 0, 2))
        x = graph.add("Reshape", rows_first, graph.constant("ends", np.array([0, -1])))
    elif not config.per_step:  # zeros beyond a row's end may be in the sum
        total = graph.add("ReduceSum", x, graph.constant("over_steps", np.array([0])), keepdims=0)
        steps = graph.add("Max", given, graph.constant("at_least", np.int64(1)))
        column = graph.add("Unsqueeze", steps, graph.constant("columns", np.array([1])))
        x = graph.add("Div", total, graph.add("Cast", column, to=_type_number(np.float32)))
    graph.linear(x, "output.weight", "output.bias", outputs=["logits"])
    graph.output("logits", ("T", "B", len(config.labels)) if config.per_step else ("B", len(config.labels)))


# -------------------------------------------------------------------------------------- the same by another runtime


def _compare(model: Any, data: bytes) -> tuple[str | None, float | None]:
    """Return the name of the runtime that is installed, if any, and the largest difference of what both give."""
    version = version_of("onnxruntime")
    if version is None:
        return None, None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings would stand between the verb's lines
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(**given: NDArray[Any]) -> list[Array]:
        found: list[Array] = session.run(None, given)
        return found

    compare = _compare_labels if isinstance(model.config, LabelModelConfig) else _compare_texts
    pairs = compare(model, run)
    difference = float(np.max([np.abs(ours - theirs).max() for ours, theirs in pairs]))  # nan if there is one
    largest = max(1.0, *(float(np.abs(ours).max()) for ours, _ in pairs))
    if not difference <= TOLERANCE * largest:
        raise LongshortError(
            f"ONNX Runtime {version} differs from the model by {difference:.2g}, of {largest:.2g} at most.",
            "If the weights are finite, this is an error in one of both; nothing was written.",
        )
    return f"ONNX Runtime {version}", difference


Pairs = list[tuple[NDArray[Any], NDArray[Any]]]


def _compare_texts(model: Any, run: Callable[..., list[Array]]) -> Pairs:
    """Return what the model and the file say after made-up texts, and after a second piece of each."""
    config, random = model.config, np.random.default_rng(0)
    ids_TB = random.integers(0, config.vocab_size + 1, (2 * COMPARED_STEPS, 3))
    names = decoder.CELLS[config.cell].states
    state = [np.zeros((config.layers, ids_TB.shape[1], config.hidden), np.float32) for _ in names]
    found: Pairs = []
    own: list[Any] = [None] * ids_TB.shape[1]
    for piece_TB in np.split(ids_TB, 2):
        logits_TBV, *state = run(ids=piece_TB, **dict(zip(names, state, strict=True)))
        for row, before in enumerate(own):
            logits_V, own[row] = model.logits(piece_TB[:, row], before)
            found.append((logits_V, logits_TBV[-1, row]))
            for ours_LBH, theirs_LBH in zip(own[row], state, strict=True):
                found.append((np.asarray(ours_LBH)[:, 0], theirs_LBH[:, row]))
    return found


def _compare_labels(model: Any, run: Callable[..., list[Array]]) -> Pairs:
    """Return what the model and the file say of made-up sequences of several lengths."""
    config, random = model.config, np.random.default_rng(0)
    lengths_B = np.array([COMPARED_STEPS, 1, COMPARED_STEPS // 2])
    shape = (int(lengths_B.max()), len(lengths_B))
    given: NDArray[Any] = random.integers(0, config.vocab_size + 1, shape)
    if config.inputs:
        given = random.standard_normal((*shape, config.inputs), np.float32)
    ours = model.logits(Batch(given, lengths_B, np.empty(0, np.int64)))
    (theirs,) = run(**{"x" if config.inputs else "ids": given}, lengths=lengths_B)
    if not config.per_step:
        return [(ours, theirs)]
    return [(ours[:length, row], theirs[:length, row]) for row, length in enumerate(lengths_B)]
