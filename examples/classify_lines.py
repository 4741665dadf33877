"""Who wrote this line? A classifier of texts.

python examples/classify_lines.py FILE FILE ...     a class for each file or named corpus (timemachine, ...)
python examples/classify_lines.py                   made-up languages, for which the best possible accuracy is known

The last tenth of each file's lines is held out.
"""

import argparse
from pathlib import Path

import numpy as np

import longshort
from longshort.loop import Finished
from longshort.text import corpus
from longshort.text.hidden_markov import HiddenMarkov

Lines = list[tuple[str, str]]
"""Texts, and the class of each."""


def from_files(paths: list[str]) -> tuple[Lines, Lines]:
    """Return the lines to learn from and those that are held out; short ones tell too little and are left out."""
    learn: Lines = []
    heldout: Lines = []
    for path in paths:
        text = (corpus.load([path]) if Path(path).exists() else corpus.load([], path)).content
        lines = [(line.strip(), Path(path).stem) for line in text.splitlines() if len(line.strip()) >= 20]
        cut = len(lines) * 9 // 10
        learn, heldout = learn + lines[:cut], heldout + lines[cut:]
    return learn, heldout


def made_up(languages: dict[str, HiddenMarkov], count: int, generator: np.random.Generator) -> Lines:
    """Return words of 0 to 19 letters; the languages use the same letters in another order."""
    names = generator.choice(list(languages), count)
    words = [languages[name].sample(int(generator.integers(20)), generator)[0] for name in names]
    return [("".join("abcdefgh"[letter] for letter in word), name) for word, name in zip(words, names, strict=True)]


def best_possible(languages: dict[str, HiddenMarkov], lines: Lines) -> float:
    """Return how often the likeliest language is the right one, expected over these texts."""
    words = [np.array(["abcdefgh".index(letter) for letter in text], int) for text, _ in lines]
    p_NC = np.exp([[language.log_likelihood(word) for language in languages.values()] for word in words])
    return float((p_NC.max(1) / p_NC.sum(1)).mean())


def main() -> None:
    """Train, and say how often the right one was told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*")
    parser.add_argument("--out", default=None, help="run directory to make")
    parser.add_argument("--count", type=int, default=8000, help="made-up texts to learn from")
    args = parser.parse_args()
    if args.file:
        learn, heldout = from_files(args.file)
    else:
        languages = {name: HiddenMarkov.drawn(3, 8, i, sharpness=0.6) for i, name in enumerate(("ar", "bo", "cu"))}
        generator = np.random.default_rng(0)
        learn, heldout = (made_up(languages, n, generator) for n in (args.count, args.count // 3))
        print(f"best possible accuracy {best_possible(languages, heldout):.3f}")
    examples, rest = (longshort.Examples(*zip(*part, strict=True)) for part in (learn, heldout))
    weights = examples.balanced_weights()
    config = longshort.LabelTrainConfig(out=args.out, cell="gru", epochs=4, class_weights=weights)
    *_, last = longshort.train_labels(config, examples, rest)
    assert isinstance(last, Finished)  # nothing asks it to stop
    found = last.heldout
    print(f"accuracy {found.accuracy:.3f}, macro F1 {found.macro_f1:.3f}")
    print("rows: what it is, columns: what is said", *found.confusion, sep="\n")
    print(f"{last.seconds:.0f} s for {len(learn)} lines, {len(heldout)} held out")


if __name__ == "__main__":
    main()
