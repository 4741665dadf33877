"""A whole language model on the kernel library: it reads and writes texts, many symbols in one call. Needs no PyTorch.

    T  steps   B  texts   V  symbols   E  width of the embedding   H  hidden units   G  gates times H   L  layers

What the functions mean is written in `csrc/longshort.h` (`ls_read`, `ls_decode`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longshort import native, native_layers
from longshort.errors import UsageError
from longshort.native import GATES, address
from longshort.native_layers import Weights
from longshort.structures import DecodeArgs, ModelStructure, ReadArgs, SamplingStructure, TreeArgs

Array = NDArray[np.float32]

DEEPEST_BYTES = 1 << 17
"""Most products in a sum of 32 bits."""
TABLE_BYTES = 64 << 20
"""The first layer reads a table of its gates for each symbol where the table is no larger, else the embedding."""


class Draw(NamedTuple):
    """How the next symbols of one text are chosen; `generation.Sampling` has the meaning."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stream: int
    position: int
    """Of the first symbol that is chosen."""


class Tree(NamedTuple):
    """Texts that begin alike, as a tree of their prefixes: level by level, first what has nodes below it.

    `ls_tree_args` in `csrc/longshort.h` has the meaning; int64 arrays all.
    """

    nodes: NDArray[np.int64]
    """Of each level."""
    reads: NDArray[np.int64]
    """How many of them have nodes below them."""
    ids: NDArray[np.int64]
    """Of each node."""
    parents: NDArray[np.int64]
    """Of each node the one above it, counted within its level."""


class NativeModel:
    """A language model, packed for a target.

    Args:
        cell: one of `native.CELLS`.
        layers: their weights, biases included; the first as wide as the embedding.
        rows: (V + 1, E): what the first layer reads of each symbol, and of one outside the vocabulary.
        output: (V, H) and (V): the output layer.
        int8: whether products are of eight bits: the weights with a scale a unit, and what they are multiplied by with
            one a row. The table, sums and states stay float32.
        residual: whether each layer but the first adds what it reads to what it puts out.
        gains: of layer normalisation, if there is any: of each layer gamma_ih, gamma_hh, of an LSTM gamma_c, beta_c.
        target: the active one if not given.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no library, or the model is too wide for sums of eight bits.
    """

    def __init__(
        self,
        cell: str,
        layers: Sequence[Weights],
        rows: Array,
        output: tuple[Array, Array],
        int8: bool = False,
        residual: bool = False,
        gains: Sequence[Sequence[Array]] = (),
        target: str | None = None,
    ) -> None:
        self._library = native.need()
        target = target or native.active_target()
        number = native.index_of(self._library, target)
        (size, E), H = rows.shape, layers[0].weight_hh.shape[1]
        self.V, self.H, self.num_layers, self.cell = size - 1, H, len(layers), cell
        G, first = GATES[cell] * H, layers[0]
        for layer, weights in enumerate(layers):
            native.require_shape(f"weight_ih of layer {layer}", weights.weight_ih, (G, H if layer else E))
            native.require_shape(f"weight_hh of layer {layer}", weights.weight_hh, (G, H))
        of_gains = native.gain_sizes(cell, G, H).values()
        if gains and [len(own) for own in gains] != [len(of_gains)] * len(layers):
            raise ValueError(f"gains must be {len(of_gains)} arrays of each layer")
        self._table = self._embedding = None
        if 4 * size * GATES[cell] * H <= TABLE_BYTES:
            self._table = self._pack_table(_gates(cell, first, rows, gains[0][0] if gains else None), number)
            first = first._replace(weight_ih=np.empty((len(first.weight_hh), 0), np.float32))
        else:
            self._embedding = native.float_array("rows", rows, (size, E))
        self._packed = [native_layers.pack(cell, weights, target) for weights in (first, *layers[1:])]
        weight = native.float_array("output weight", output[0], (self.V, H))
        bias = native.float_array("output bias", output[1], (self.V,))
        self._head = native.aligned(self._library.ls_head_floats(self.V, H, number))
        found = self._library.ls_pack_head(self.V, H, number, address(weight), address(bias), address(self._head))
        native.check_status(found)
        if int8:
            deepest = max(H, 0 if self._table is not None else E)
            if deepest > DEEPEST_BYTES:
                raise UsageError(
                    f"Products of int8 are of at most {DEEPEST_BYTES:,} numbers; the model has {deepest:,}.",
                    "Run it with weights of float32.",
                )
            widths = [weights.weight_ih.shape[1] for weights in (first, *layers[1:])]
            self._packed = [
                self._rounded(native.CELLS[cell], width, packed, number)
                for width, packed in zip(widths, self._packed, strict=True)
            ]
            self._head = self._rounded(-1, self.V, self._head, number)
        self._pointers = (ctypes.c_void_p * len(layers))(*(address(packed) for packed in self._packed))
        self._structure = ModelStructure(self.V, E, H, len(layers), native.CELLS[cell], number, int8, residual)
        self._structure.table, self._structure.embedding = address(self._table), address(self._embedding)
        self._structure.packed = ctypes.cast(self._pointers, ctypes.c_void_p)
        self._structure.head = address(self._head)
        self._gains = [
            native.float_array("gains", gain, (size,))
            for own in gains
            for gain, size in zip(own, of_gains, strict=True)
        ]
        if gains:
            each = len(self._gains) // len(layers)
            places = [[address(gain) for gain in self._gains[i : i + each]] for i in range(0, len(self._gains), each)]
            self._places = (ctypes.c_void_p * (4 * len(layers)))(*(p for own in places for p in (*own, None, None)[:4]))
            self._structure.gains = ctypes.cast(self._places, ctypes.c_void_p)

    def _rounded(self, cell: int, width: int, packed: Array, number: int) -> Array:
        rounded = native.aligned(self._library.ls_rounded_floats(cell, width, self.H, number))
        native.check_status(self._library.ls_round(cell, width, self.H, number, address(packed), address(rounded)))
        return rounded

    def _pack_table(self, gates: Array, number: int) -> Array:
        cell, V, H = native.CELLS[self.cell], self.V, self.H
        table = native.aligned(self._library.ls_table_floats(cell, V, H, number))
        native.check_status(self._library.ls_pack_table(cell, V, H, number, address(gates), address(table)))
        return table

    def write(
        self,
        logits_BV: Array,
        state: Sequence[Array],
        draws: Sequence[Draw],
        steps: int,
        *,
        newline: int | None = None,
        threads: int = 1,
    ) -> NDArray[np.int64]:
        """Choose and read `steps` symbols for each of B texts and return them, (steps, B).

        Args:
            logits_BV: of the symbol after what has been read. Overwritten, as the state is.
            state: h, or h and c, each (L, B, H) and contiguous.
            draws: of each text.
            steps: how many.
            newline: a symbol before which the state is zero.
            threads: at most so many.

        Raises:
            ValueError: an argument of another shape or type, or outside its range.
            MemoryError: there is not enough for the texts' scratch.
        """
        B = len(draws)
        if steps < 0:
            raise ValueError(f"steps must be at least 0, not {steps}")
        _require_threads(threads)
        self._check_state(state, B)
        _require_writable("logits", logits_BV, (B, self.V))
        ids = np.empty((steps, B), np.int64)
        samplings = (SamplingStructure * B)(
            *(
                SamplingStructure(d.temperature, d.top_p or 0.0, d.top_k or 0, d.seed, d.stream, d.position)
                for d in draws
            )
        )
        args = DecodeArgs(model=self._structure, B=B, steps=steps, newline=-1 if newline is None else newline)
        args.sampling, args.num_threads = ctypes.cast(samplings, ctypes.c_void_p), min(threads, 2**31 - 1)
        args.logits, args.ids = address(logits_BV), address(ids)
        args.h, args.c = (*map(address, state), None)[:2]
        native.check_status(self._library.ls_decode(ctypes.byref(args)))
        return ids

    def read(
        self,
        ids_TB: NDArray[np.int64],
        state: Sequence[Array],
        targets_TB: NDArray[np.int64] | None = None,
        *,
        threads: int = 1,
    ) -> tuple[NDArray[np.float64] | None, Array]:
        """Read texts; return -log p of each target in nats, float64 (T, B), and the logits (B, V) after the last step.

        Args:
            ids_TB: what is read: symbols, or V for one outside the vocabulary.
            state: as of `write`.
            targets_TB: the symbol that followed each; where negative, the result is 0. None: no nats are wanted.
            threads: at most so many.

        Raises:
            ValueError, MemoryError: as of `write`.
        """
        ids_TB = np.require(ids_TB, np.int64, ("C", "A"))
        if ids_TB.ndim != 2 or not len(ids_TB):
            raise ValueError(f"ids must have the shape (T, B) with T of at least 1, not {ids_TB.shape}")
        _require_threads(threads)
        T, B = ids_TB.shape
        self._check_state(state, B)
        logits_BV, nats_TB = np.empty((B, self.V), np.float32), None
        if targets_TB is not None:
            targets_TB = np.require(targets_TB, np.int64, ("C", "A"))
            if targets_TB.shape != (T, B):
                raise ValueError(f"targets must have the shape {(T, B)}, not {targets_TB.shape}")
            nats_TB = np.empty((T, B), np.float64)
        args = ReadArgs(model=self._structure, T=T, B=B, num_threads=min(threads, 2**31 - 1))
        args.ids, args.targets, args.nats, args.logits = map(address, (ids_TB, targets_TB, nats_TB, logits_BV))
        args.h, args.c = (*map(address, state), None)[:2]
        native.check_status(self._library.ls_read(ctypes.byref(args)))
        return nats_TB, logits_BV

    def read_tree(self, tree: Tree, *, threads: int = 1) -> NDArray[np.float64]:
        """Read texts from a zero state, what they have in common once; return -log p of each node's symbol in nats.

        Args:
            tree: the texts; a symbol outside the vocabulary is V. Its nats are 0, as those of the first level.
            threads: at most so many.

        Raises:
            ValueError, MemoryError: as of `write`.
        """
        nodes, reads, ids, parents = (np.require(array, np.int64, ("C", "A")) for array in tree)
        count = -1 if (nodes < 0).any() else int(nodes.sum())
        if nodes.shape != reads.shape or not ids.shape == parents.shape == (count,):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(tree._fields, tree, strict=True))
            raise ValueError(
                f"nodes and reads must have an entry a level, ids and parents one a node, {count}, not {shapes}"
            )
        _require_threads(threads)
        nats = np.empty(len(ids), np.float64)
        args = TreeArgs(model=self._structure, levels=len(nodes), num_threads=min(threads, 2**31 - 1))
        args.nodes, args.reads, args.ids, args.parents, args.nats = map(address, (nodes, reads, ids, parents, nats))
        native.check_status(self._library.ls_read_tree(ctypes.byref(args)))
        return nats

    def _check_state(self, state: Sequence[Array], B: int) -> None:
        wanted = 2 if self.cell == "lstm" else 1
        if len(state) != wanted:
            raise ValueError(f"a {self.cell} has {wanted} states, not {len(state)}")
        for tensor in state:
            _require_writable("state", tensor, (self.num_layers, B, self.H))


def _require_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")


def _require_writable(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if native.float_array(name, array, shape) is not array or not array.flags.writeable:
        raise ValueError(f"{name} must be contiguous and writable")


def normalise(x_BN: Array, gamma_N: Array) -> Array:
    """Layer normalisation over the last dimension, as `cells.normalise`."""
    centred = x_BN - x_BN.mean(-1, keepdims=True)
    y: Array = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(1e-5)) * gamma_N
    return y


def product(left: Array, right: Array) -> Array:
    """Return `left @ right` without NumPy's warnings of it, which say nothing of the result.

    OpenBLAS's AVX-512 kernel for five columns multiplies what lies on the stack into sums that it throws away, so that
    now and then an "invalid value" is told of a right product; and with weights of a run that diverged, who reads the
    figures sees it.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found: Array = left @ right
    return found


def _gates(cell: str, weights: Weights, rows: Array, gamma_ih: Array | None) -> Array:
    """Return what each row gives the gates, (V + 1, G): the product with W_ih and the biases that it can take in."""
    gates = product(rows, weights.weight_ih.T)
    if gamma_ih is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            gates = normalise(gates, gamma_ih)
    if weights.bias_ih is not None:
        gates += weights.bias_ih
    if weights.bias_hh is not None:  # of the GRU's n it stays with W_hh h: r multiplies both
        H = weights.weight_hh.shape[1]
        end = 2 * H if cell == "gru" else gates.shape[1]
        gates[:, :end] += weights.bias_hh[:end]
    return np.ascontiguousarray(gates, dtype=np.float32)
