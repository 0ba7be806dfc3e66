"""Knowledge distillation of language models across tokenizers: alignment, projection, audit, losses."""

from . import reference
from ._core import version as __version__
from .alignment import Aligner, Alignment
from .audit import ClassCoverage, CoverageReport, coverage_audit
from .config import show_config
from .corpus import align_corpus
from .losses import (
    LinearLogits,
    Teacher,
    TopKLogits,
    XTokenLoss,
    gold_loss,
    hkl_loss,
    kd_loss,
    linear_gold_loss,
    linear_hkl_loss,
    linear_kd_loss,
    linear_pkl_loss,
    linear_prefix_kl_loss,
    pkl_loss,
    prefix_kl_loss,
    select_backend,
    uld_loss,
)
from .pieces import PieceIndex
from .projection import ProjectionMatrix
from .teacher_cache import CachedDocument, TeacherCache, TeacherCacheWriter, cache_teacher
from .vocabulary import Vocabulary

__all__ = [
    "Aligner",
    "Alignment",
    "CachedDocument",
    "ClassCoverage",
    "CoverageReport",
    "LinearLogits",
    "PieceIndex",
    "ProjectionMatrix",
    "Teacher",
    "TeacherCache",
    "TeacherCacheWriter",
    "TopKLogits",
    "Vocabulary",
    "XTokenLoss",
    "__version__",
    "align_corpus",
    "cache_teacher",
    "coverage_audit",
    "gold_loss",
    "hkl_loss",
    "kd_loss",
    "linear_gold_loss",
    "linear_hkl_loss",
    "linear_kd_loss",
    "linear_pkl_loss",
    "linear_prefix_kl_loss",
    "pkl_loss",
    "prefix_kl_loss",
    "reference",
    "select_backend",
    "show_config",
    "uld_loss",
]
