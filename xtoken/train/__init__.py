"""Training on top of transformers' Trainer; importing this package imports transformers."""

from . import versions as versions  # before what needs them
from .cached import CachedExamples, teacher_documents
from .collator import XTokenCollator, pack
from .config import XTokenConfig
from .data import AlignedExamples, EncodedDataset, EncodedStream, load_examples
from .encode import ExampleEncoder
from .head import OrderedLayer, linear_logits, ordered_layer
from .table import EncodedTable
from .teachers import TeacherModel, load_model, load_tokenizer
from .trainer import XTokenTrainer

__all__ = [
    "AlignedExamples",
    "CachedExamples",
    "EncodedDataset",
    "EncodedStream",
    "EncodedTable",
    "ExampleEncoder",
    "OrderedLayer",
    "TeacherModel",
    "XTokenCollator",
    "XTokenConfig",
    "XTokenTrainer",
    "linear_logits",
    "load_examples",
    "load_model",
    "load_tokenizer",
    "ordered_layer",
    "pack",
    "teacher_documents",
]
