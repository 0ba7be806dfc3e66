"""Knowledge distillation of language models across tokenizers: alignment, projection, audit, losses."""

from . import reference
from ._core import version as __version__
from .alignment import Aligner, Alignment
from .audit import ClassCoverage, CoverageReport, coverage_audit
from .config import show_config
from .losses import Teacher, XTokenLoss, gold_loss, hkl_loss, kd_loss, pkl_loss, select_backend, uld_loss
from .projection import ProjectionMatrix
from .vocabulary import Vocabulary

__all__ = [
    "Aligner",
    "Alignment",
    "ClassCoverage",
    "CoverageReport",
    "ProjectionMatrix",
    "Teacher",
    "Vocabulary",
    "XTokenLoss",
    "__version__",
    "coverage_audit",
    "gold_loss",
    "hkl_loss",
    "kd_loss",
    "pkl_loss",
    "reference",
    "select_backend",
    "show_config",
    "uld_loss",
]
