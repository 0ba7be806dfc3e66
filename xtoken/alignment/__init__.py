"""Alignment: which tokens of the student and of the teacher spell the same text, and which logits predict them."""

from .aligner import METHODS, Aligner
from .alignment import IGNORED, Alignment, Ragged, pad_rows, predictable, to_device
from .chunks import Chunks, Rows, synchronized

__all__ = [
    "IGNORED", "METHODS", "Aligner", "Alignment", "Chunks", "Ragged", "Rows", "pad_rows", "predictable",
    "synchronized", "to_device",
]  # fmt: skip
