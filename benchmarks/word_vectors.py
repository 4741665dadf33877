"""What word vectors give a small language model of words: skip-gram by gensim, then three models of the same steps.

python benchmarks/word_vectors.py wikitext-2/train.txt.gz wikitext-2/valid.txt [PICTURE.png] > FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gensim.models import Word2Vec

import longshort
from longshort import machine, plots
from longshort.text import corpus

WIDTH, STEPS, MIN_FREQ = 64, 300, 10
ASKED = ("he", "river", "king", "song", "three")


GROUPS = {
    "numbers": "two three five six ten twenty hundred",
    "people": "he she they him her king queen father mother brother",
    "places": "river mountain island city village lake north south",
    "music": "song album band guitar singer",
}


def call(*arguments: str) -> str:
    """Run longshort and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "longshort", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main(train: str, valid: str, picture: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        vectors = str(Path(place, "vectors.txt"))
        begin = time.perf_counter()
        lines = [line.split() for line in corpus.lines(train)]
        rest: dict[str, Any] = {"min_count": MIN_FREQ, "epochs": 5, "workers": 2, "seed": 1}
        model = Word2Vec(lines, vector_size=WIDTH, sg=1, negative=5, window=5, **rest)
        model.wv.save_word2vec_format(vectors)
        seconds = time.perf_counter() - begin
        if picture:
            groups = {word: group for group, words in GROUPS.items() for word in words.split() if word in model.wv}
            plots.words(np.stack([model.wv[word] for word in groups]), groups, picture)
        flags = ["--tokenizer", "word", "--min-freq", str(MIN_FREQ), "--hidden", "128", "--embedding", str(WIDTH)]
        flags += ["--steps", str(STEPS), "--dropout", "0.2", "--heldout", "0.02"]
        rows: list[dict[str, Any]] = []
        for name, more in (
            ("random vectors", []),
            ("skip-gram vectors, trained further", ["--vectors", vectors]),
            ("skip-gram vectors, frozen", ["--vectors", vectors, "--freeze-embedding"]),
        ):
            run = str(Path(place, str(len(rows))))
            call("train", train, *flags, *more, "--out", run)
            found = json.loads(call("eval", run, valid, "--json"))
            near = {word: longshort.neighbours(longshort.load(run), word, 5) for word in ASKED}
            rows.append(
                {"name": name, "perplexity": found["perplexity"], "tokens": found["tokens"], "neighbours": near}
            )
            print(rows[-1], file=sys.stderr, flush=True)
    head = {"format_version": 1, "benchmark": "word vectors in a language model of words"}
    head |= {"command": "python benchmarks/word_vectors.py wikitext-2/train.txt.gz wikitext-2/valid.txt"}
    head |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.description(),
        "gensim": version("gensim"),
    }
    head |= {"skip_gram_seconds": round(seconds, 1), "settings": " ".join(flags[:-2])}
    print(json.dumps({**head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
