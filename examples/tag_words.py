"""Which part of speech is this word? A tagger that reads in both directions, beside one that reads forward.

    python examples/tag_words.py

The sentences are made up by a grammar in which most words have several tags, and only their neighbours tell which: the
best possible accuracy is known, for a reader of the whole sentence and for one who has only come as far as the word.
"""

import argparse
from pathlib import Path

import numpy as np

import longshort
from longshort.loop import Finished
from longshort.text.hidden_markov import HiddenMarkov

TAGS = ("article", "adjective", "noun", "verb", "end")
WORDS = ("the", "a", "light", "old", "man", "ship", "boat", "sail", "watch", "sees", ".", "!")
# How often each tag follows each, and how often each says each word; a row a tag, in the order of TAGS.
NEXT = np.array([[0, 4, 6, 0, 0], [0, 2, 8, 0, 0], [0, 0, 1, 6, 3], [5, 2, 1, 0, 2], [7, 1, 2, 0, 0]]) / 10
SAYS = (
    np.array(
        [
            [6, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 2, 1, 2, 1, 1, 1, 2, 0, 0, 0],
            [0, 0, 1, 0, 2, 1, 0, 2, 2, 2, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 2],
        ]
    )
    / 10
)
GRAMMAR = HiddenMarkov(np.array([0.6, 0.2, 0.2, 0, 0]), NEXT, SAYS)


def sentences(count: int, generator: np.random.Generator) -> longshort.Examples:
    """Return lists of 1 to 20 words and the tag of each."""
    drawn = [GRAMMAR.sample(int(generator.integers(1, 21)), generator) for _ in range(count)]
    return longshort.Examples([[WORDS[i] for i in w] for w, _ in drawn], [[TAGS[i] for i in t] for _, t in drawn])


def main() -> None:
    """Train both taggers and hold them against what is possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tags-run", help="run directories to make: this, and this with -forward")
    parser.add_argument("--count", type=int, default=4000, help="sentences to learn from")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    examples, heldout = sentences(args.count, generator), sentences(1000, generator)
    ids = [np.array([WORDS.index(word) for word in sentence]) for sentence in heldout.sequences]
    for forward_only in (False, True):
        posterior = [GRAMMAR.posterior(each, forward_only=forward_only) for each in ids]
        best = float(np.concatenate([each.max(1) for each in posterior]).mean())
        out = args.out + "-forward" * forward_only
        config = longshort.LabelTrainConfig(out=out, epochs=4, lr=1e-2, hidden=32, bidirectional=not forward_only)
        *_, last = longshort.train_labels(config, examples, heldout)
        assert isinstance(last, Finished)  # nothing asks it to stop
        name = "forward only" if forward_only else "both directions"
        print(f"{name:<16} accuracy {last.heldout.accuracy:.3f}, best possible {best:.3f}")
    sentence = ["the", "old", "man", "watch", "the", "light", "boat", "."]
    tagger = longshort.load(Path(args.out))
    print(" ".join(f"{word}/{tag}" for word, tag in zip(sentence, tagger.predict([sentence])[0], strict=True)))


if __name__ == "__main__":
    main()
