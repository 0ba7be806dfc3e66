"""Alignment: which tokens of the student and of the teacher spell the same text, and which logits predict them."""

from __future__ import annotations

from .aligner import METHODS as METHODS
from .aligner import Aligner as Aligner
from .alignment import Alignment as Alignment
from .alignment import Ragged as Ragged
from .alignment import pad_rows as pad_rows
from .alignment import predictable as predictable
from .chunks import Chunks as Chunks
from .chunks import Rows as Rows
from .chunks import synchronized as synchronized
from .chunks import to_device as to_device
