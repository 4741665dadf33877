"""Write with an exported model of characters: ONNX Runtime and NumPy, nothing of longshort and nothing of PyTorch.

    longshort export my-text-run
    pip install onnxruntime
    python examples/write_onnx.py my-text-run.onnx --prompt "The "

The same loop in another language needs the same four lines: ids and state in, logits and state out.
"""

import argparse
import json

import numpy as np
import onnxruntime


def main() -> None:
    """Read the prompt, then choose symbol by symbol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what `longshort export` wrote")
    parser.add_argument("--prompt", default="\n", help="what the model reads before it writes")
    parser.add_argument("--length", type=int, default=300, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="decides what is sampled")
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(args.file, providers=["CPUExecutionProvider"])
    tokenizer = json.loads(session.get_modelmeta().custom_metadata_map["longshort_tokenizer"])
    if tokenizer["pre_tokenizer"].get("pattern") != {"Regex": r"[\s\S]"}:
        parser.error("this model does not read characters; the package tokenizers reads its longshort_tokenizer")
    number = tokenizer["model"]["vocab"]  # of each symbol; the last is that of all others
    symbols = sorted(number, key=number.__getitem__)[:-1]

    # The state before the text: h, and of an LSTM c, (layers, texts, units).
    state = {
        each.name: np.zeros((each.shape[0], 1, each.shape[2]), np.float32)
        for each in session.get_inputs()
        if each.name != "ids"
    }
    ids, generator = (
        [number.get(symbol, len(symbols)) for symbol in args.prompt or "\n"],
        np.random.default_rng(args.seed),
    )
    print(args.prompt, end="")
    for _ in range(args.length):
        logits_TBV, *after = session.run(None, {"ids": np.array(ids)[:, None], **state})
        state = dict(zip(state, after, strict=True))
        logits = logits_TBV[-1, 0].astype(np.float64)
        if args.temperature > 0:
            weights = np.exp((logits - logits.max()) / args.temperature)
            ids = [int(generator.choice(len(symbols), p=weights / weights.sum()))]
        else:
            ids = [int(logits.argmax())]
        print(symbols[ids[0]], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
