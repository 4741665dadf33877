"""longshort: small LSTM, GRU and RNN models on ordinary CPUs.

    longshort.LSTM, GRU, RNN and their cells     in the place of torch.nn's
    longshort.convert, longshort.to_torch        exchange them in a whole model, and back
    longshort.from_keras, keras_weights          Keras's layers as ours; our weights in Keras's order
    longshort.load(path)                         a trained model, a language model without PyTorch; with train=True as
                                                 a LanguageModel
    longshort.train(TrainConfig(...))            trains and yields events; longshort.resume(run) goes on
    longshort.evaluate, generate, score          free functions on any model
    longshort.evaluate_dynamically               evaluation of a model that learns while it reads
    longshort.beam_search                        the most probable text, where `generate` samples
    longshort.neighbours, write_vectors          the vectors that a model has for its symbols
    longshort.SequenceClassifier, SequenceTagger a class for a sequence, a tag for each of its steps
    longshort.train_labels(LabelTrainConfig(...), Examples(...))     trains them; resume_labels, evaluate_labels
    longshort.export_onnx(model, path)           a trained model as a file for other runtimes
    longshort.publish(run, directory)            a trained model as a directory to hand on, with a card
    longshort.SequenceRegressor                  vectors in, vectors out: series of numbers
    longshort.kernels                            which implementation runs, and why
    longshort.scratch                            the textbook

Names that need PyTorch are loaded when they are first asked for: `import longshort` imports neither it nor NumPy.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from longshort import kernels as kernels
    from longshort import scratch as scratch
    from longshort.beams import beam_search as beam_search
    from longshort.cell_layers import GRUCell as GRUCell
    from longshort.cell_layers import LSTMCell as LSTMCell
    from longshort.cell_layers import RNNCell as RNNCell
    from longshort.config import LabelModelConfig as LabelModelConfig
    from longshort.config import LabelTrainConfig as LabelTrainConfig
    from longshort.config import ModelConfig as ModelConfig
    from longshort.config import TrainConfig as TrainConfig
    from longshort.conversion import convert as convert
    from longshort.conversion import to_torch as to_torch
    from longshort.decoder import Decoder as Decoder
    from longshort.dynamic import evaluate_dynamically as evaluate_dynamically
    from longshort.embeddings import neighbours as neighbours
    from longshort.embeddings import write_vectors as write_vectors
    from longshort.errors import LongshortError as LongshortError
    from longshort.evaluation import Evaluation as Evaluation
    from longshort.evaluation import evaluate as evaluate
    from longshort.generation import Sampling as Sampling
    from longshort.generation import generate as generate
    from longshort.inspection import Inspection as Inspection
    from longshort.inspection import inspect as inspect
    from longshort.keras_layers import from_keras as from_keras
    from longshort.keras_layers import keras_weights as keras_weights
    from longshort.labels.examples import Examples as Examples
    from longshort.labels.label_decoder import LabelDecoder as LabelDecoder
    from longshort.labels.labellers import SequenceClassifier as SequenceClassifier
    from longshort.labels.labellers import SequenceTagger as SequenceTagger
    from longshort.labels.labelling import Labelling as Labelling
    from longshort.labels.labelling import evaluate_labels as evaluate_labels
    from longshort.labels.supervision import resume_labels as resume_labels
    from longshort.labels.supervision import train_labels as train_labels
    from longshort.layers import GRU as GRU
    from longshort.layers import LSTM as LSTM
    from longshort.layers import RNN as RNN
    from longshort.model import LanguageModel as LanguageModel
    from longshort.onnx_files import export_onnx as export_onnx
    from longshort.publication import publish as publish
    from longshort.scoring import score as score
    from longshort.series import SequenceRegressor as SequenceRegressor
    from longshort.training import resume as resume
    from longshort.training import train as train

_HOME = {
    "GRU": "layers",
    "GRUCell": "cell_layers",
    "LSTM": "layers",
    "LSTMCell": "cell_layers",
    "RNN": "layers",
    "RNNCell": "cell_layers",
    "Decoder": "decoder",
    "Evaluation": "evaluation",
    "LanguageModel": "model",
    "LongshortError": "errors",
    "ModelConfig": "config",
    "Sampling": "generation",
    "SequenceRegressor": "series",
    "resume_labels": "labels.supervision",
    "train_labels": "labels.supervision",
    "evaluate_labels": "labels.labelling",
    "Labelling": "labels.labelling",
    "LabelDecoder": "labels.label_decoder",
    "SequenceTagger": "labels.labellers",
    "SequenceClassifier": "labels.labellers",
    "LabelTrainConfig": "config",
    "LabelModelConfig": "config",
    "Examples": "labels.examples",
    "TrainConfig": "config",
    "beam_search": "beams",
    "convert": "conversion",
    "evaluate": "evaluation",
    "export_onnx": "onnx_files",
    "evaluate_dynamically": "dynamic",
    "from_keras": "keras_layers",
    "keras_weights": "keras_layers",
    "generate": "generation",
    "inspect": "inspection",
    "Inspection": "inspection",
    "neighbours": "embeddings",
    "publish": "publication",
    "score": "scoring",
    "to_torch": "conversion",
    "resume": "training",
    "train": "training",
    "write_vectors": "embeddings",
    "kernels": "",
    "scratch": "",
}
"""Each public name and the module that holds it; a module itself has none."""

__all__ = [*_HOME, "load"]


def load(path: str | Path, *, train: bool = False, weights: str = "float32") -> Any:
    """Return the model in a run or model directory.

    Args:
        path: a run (its best checkpoint, else its latest) or a model directory.
        train: whether to return what PyTorch can train on, a `LanguageModel`, `SequenceClassifier` or `SequenceTagger`,
            instead of a torch-free `Decoder` or `LabelDecoder`.
        weights: of a language model: float32; bfloat16, where the processor multiplies that; or int8, the least memory
            and mostly the fastest (`generation.cost_in_bits` says what they cost).

    Returns:
        One of these models, in evaluation mode.

    Raises:
        UsageError: there is nothing at `path`, the model's cell needs PyTorch, or such weights cannot be had.
        CheckpointError: it is damaged, or its files do not belong together.
        MissingExtraError: PyTorch is needed and not installed.
    """
    from longshort import checkpoint
    from longshort.errors import UsageError

    saved = checkpoint.load_model(path)
    if "labels" in saved.model:
        if weights != "float32":
            raise UsageError(f"A classifier or tagger has float32 weights, not {weights}.")
        return _module("labels.labellers" if train else "labels.label_decoder").from_saved(saved)
    if train:
        if weights != "float32":
            raise UsageError(f"A model in training has float32 weights, not {weights}.")
        return _module("model").from_saved(saved)
    return _module("decoder").from_saved(saved, weights)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"longshort.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from longshort.errors import MissingExtraError

        raise MissingExtraError("PyTorch", "train", f"longshort.{name}") from error


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longshort' has no attribute {name!r}")
    home = _HOME[name]
    value = getattr(_module(home), name) if home else _module(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
