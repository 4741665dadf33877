# /// script
# dependencies = ["onnxruntime==1.32.0", "onnx==1.22.0"]
# ///
"""One text written by ONNX Runtime, a step in Python at a time, beside our native loop: LSTM 1 x 256, 65 symbols.

The step (embedding row, LSTM cell, logits) is one graph, made here of ONNX's own LSTM operator on the same weights; the
state stays in the arrays that the runtime returns, and NumPy chooses the symbol at temperature 0.8. `make bench-peers`
runs it; it prints JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from longshort import machine, native_model, training
from longshort.bench import ledger, workloads
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.text.tokenizers import CharTokenizer

H, E, BLOCKS, OURS, PEERS, TEMPERATURE = 256, 128, 9, 20_000, 2_000, 0.8


def session(weights: dict[str, Any], threads: int) -> onnxruntime.InferenceSession:
    """Return the step as a graph: (id, h, c) -> (logits, h, c)."""
    # PyTorch's gates are i, f, g, o; ONNX's are i, o, f, c.
    order = np.concatenate([np.arange(H) + gate * H for gate in (0, 3, 1, 2)])
    constants = {
        "rows": weights["embedding.weight"],
        "W": weights["recurrent.weight_ih_l0"][order][None],
        "R": weights["recurrent.weight_hh_l0"][order][None],
        "B": np.concatenate([weights[f"recurrent.bias_{name}_l0"][order] for name in ("ih", "hh")])[None],
        "V": weights["output.weight"].T.copy(),
        "v": weights["output.bias"],
        "first": np.array([0]),
    }
    nodes = [
        helper.make_node("Gather", ["rows", "id"], ["x"]),
        helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["", "h_n", "c_n"], hidden_size=H),
        helper.make_node("Squeeze", ["h_n", "first"], ["last"]),
        helper.make_node("Gemm", ["last", "V", "v"], ["logits"]),
    ]
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, H]) for name in ("h", "c")]
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info("id", TensorProto.INT64, [1, 1]), *state],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, H]) for name in ("h_n", "c_n")),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def write(run: onnxruntime.InferenceSession, steps: int, ids: list[int] | None = None) -> Any:
    """Write so many symbols, or read those that are given; return the last logits."""
    generator = np.random.default_rng(0)
    h = c = np.zeros((1, 1, H), np.float32)
    chosen = 1
    for step in range(steps):
        chosen = ids[step] if ids is not None else chosen
        logits, h, c = run.run(None, {"id": np.array([[chosen]]), "h": h, "c": c})
        if ids is None:
            p = np.exp((logits[0] - logits[0].max()) / TEMPERATURE)
            reached = np.cumsum(p)
            chosen = int(np.searchsorted(reached, generator.random() * reached[-1]))
    return logits[0]


def main() -> None:
    tokenizer = CharTokenizer(workloads.SYMBOLS)
    torch.set_num_threads(2)
    model = training.make_model(TrainConfig(hidden=H, embedding=E), tokenizer).eval()
    decoder = Decoder(model.config, model.weights(), tokenizer)
    rows = []
    for threads in (1, 2):
        run = session(model.weights(), threads)
        ids = np.random.default_rng(1).integers(65, size=50)
        expected, _ = model.logits(ids, None)
        np.testing.assert_allclose(write(run, 50, ids.tolist()), expected, atol=1e-5)
        logits, state = decoder.logits(np.array([1]), None)
        logits_BV = logits[None].copy()
        ours, theirs = [], []
        write(run, PEERS)
        for block in range(BLOCKS + 1):
            begin = time.perf_counter()
            decoder.write(logits_BV, state, [native_model.Draw(TEMPERATURE, None, None, 0, 0, 0)], OURS)
            middle = time.perf_counter()
            write(run, PEERS)
            end = time.perf_counter()
            if block:
                ours.append((middle - begin) / OURS)
                theirs.append((end - middle) / PEERS)
        ratio = statistics.median(theirs) / statistics.median(ours)
        figures = {"ours_per_second": 1 / statistics.median(ours), "peer_per_second": 1 / statistics.median(theirs)}
        rows.append({"peer": f"ONNX Runtime, {threads} threads", "ratio": ratio, **figures})
        rows[-1] |= {"ours_blocks": ours, "peer_blocks": theirs}
    head = {"format_version": 1, "benchmark": "one text, LSTM 1 x 256, beside ONNX Runtime"}
    head |= {"command": "make bench-peers", "date": datetime.now(UTC).date().isoformat()}
    head |= {"machine": machine.description(), "library": ledger.library()}
    versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    print(json.dumps({**head, "versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
