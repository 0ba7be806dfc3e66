"""Projection: the matrix W, where each student token's probability goes in the teacher's vocabulary."""

from __future__ import annotations

from .entries import DOMINANT_WEIGHT as DOMINANT_WEIGHT
from .entries import EXACT_WEIGHT as EXACT_WEIGHT
from .entries import Entries as Entries
from .entries import column_set as column_set
from .entries import common_pairs as common_pairs
from .entries import project as project
from .entries import restrict as restrict
from .matrix import ROW_KINDS as ROW_KINDS
from .matrix import LearnableProjection as LearnableProjection
from .matrix import ProjectionMatrix as ProjectionMatrix
