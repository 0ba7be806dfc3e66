"""The public names, which `xtoken` imports when one of them is first used."""

from . import reference
from ._core import version as __version__
from .alignment import Aligner, Alignment, Ragged
from .audit import ClassCoverage, CoverageReport, LossChoice, choose_loss, coverage_audit
from .calibration import MergedEvents, MergeReport
from .check import CheckFinding, CheckReport, self_test
from .config import show_config
from .corpus import align_corpus
from .losses import LinearLogits, OrderedLogits, Teacher, TopKLogits, XTokenLoss, functions, select_backend
from .losses.functions import *  # noqa: F403
from .pieces import PieceIndex
from .projection import LearnableProjection, ProjectionMatrix
from .sample import sample_texts
from .served import ServedModel
from .teacher_cache import CachedDocument, TeacherCache, TeacherCacheWriter, cache_teacher
from .teacher_order import TeacherOrder
from .vocabulary import Vocabulary

__all__ = [
    "Aligner", "Alignment", "CachedDocument", "CheckFinding", "CheckReport", "ClassCoverage", "CoverageReport",
    "LearnableProjection", "LinearLogits", "LossChoice", "MergeReport", "MergedEvents", "OrderedLogits", "PieceIndex",
    "ProjectionMatrix", "Ragged", "ServedModel", "Teacher", "TeacherCache", "TeacherCacheWriter", "TeacherOrder",
    "TopKLogits", "Vocabulary", "XTokenLoss", "__version__", "align_corpus", "cache_teacher", "choose_loss",
    "coverage_audit", "reference", "sample_texts", "select_backend", "self_test", "show_config",
]  # fmt: skip
__all__ += functions.__all__
