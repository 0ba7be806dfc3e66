"""Projection: the matrix W, where each student token's probability goes in the teacher's vocabulary."""

from .entries import DOMINANT_WEIGHT, EXACT_WEIGHT, Entries, column_set, common_pairs, project, restrict
from .matrix import ROW_KINDS, LearnableProjection, ProjectionMatrix

__all__ = [
    "DOMINANT_WEIGHT", "EXACT_WEIGHT", "ROW_KINDS", "Entries", "LearnableProjection", "ProjectionMatrix", "column_set",
    "common_pairs", "project", "restrict",
]  # fmt: skip
