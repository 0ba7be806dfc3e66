"""Alignment: which tokens of the student and of the teacher spell the same text, and which logits predict them."""

from .aligner import METHODS, Aligner
from .alignment import Alignment, Ragged, pad_rows, predictable
from .chunks import Chunks, Rows, synchronized, to_device

__all__ = [
    "METHODS", "Aligner", "Alignment", "Chunks", "Ragged", "Rows", "pad_rows", "predictable", "synchronized",
    "to_device",
]  # fmt: skip
