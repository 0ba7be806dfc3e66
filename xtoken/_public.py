"""The public names, which `xtoken` imports when one of them is first used."""

from . import reference
from ._core import version as __version__
from .alignment import Aligner, Alignment, Ragged
from .audit import ClassCoverage, CoverageReport, LossChoice, choose_loss, coverage_audit
from .calibration import MergedEvents, MergeReport
from .check import CheckFinding, CheckReport, self_test
from .config import show_config
from .corpus import align_corpus
from .losses import (
    LinearLogits,
    OrderedLogits,
    Teacher,
    TopKLogits,
    XTokenLoss,
    alm_loss,
    bpm_loss,
    escd_loss,
    gold_loss,
    hkl_loss,
    kd_loss,
    linear_alm_loss,
    linear_bpm_loss,
    linear_escd_loss,
    linear_gold_loss,
    linear_hkl_loss,
    linear_kd_loss,
    linear_nemo_events_loss,
    linear_one_to_one_loss,
    linear_pkl_loss,
    linear_prefix_kl_loss,
    linear_simct_loss,
    linear_uld_loss,
    nemo_events_loss,
    one_to_one_loss,
    pkl_loss,
    prefix_kl_loss,
    select_backend,
    simct_loss,
    uld_loss,
)
from .pieces import PieceIndex
from .projection import LearnableProjection, ProjectionMatrix
from .sample import sample_texts
from .served import ServedModel
from .teacher_cache import CachedDocument, TeacherCache, TeacherCacheWriter, cache_teacher
from .teacher_order import TeacherOrder
from .vocabulary import Vocabulary

__all__ = [
    "Aligner",
    "Alignment",
    "CachedDocument",
    "CheckFinding",
    "CheckReport",
    "ClassCoverage",
    "CoverageReport",
    "LearnableProjection",
    "LinearLogits",
    "LossChoice",
    "MergeReport",
    "MergedEvents",
    "OrderedLogits",
    "PieceIndex",
    "ProjectionMatrix",
    "Ragged",
    "ServedModel",
    "Teacher",
    "TeacherCache",
    "TeacherCacheWriter",
    "TeacherOrder",
    "TopKLogits",
    "Vocabulary",
    "XTokenLoss",
    "__version__",
    "align_corpus",
    "alm_loss",
    "bpm_loss",
    "cache_teacher",
    "choose_loss",
    "coverage_audit",
    "escd_loss",
    "gold_loss",
    "hkl_loss",
    "kd_loss",
    "linear_alm_loss",
    "linear_bpm_loss",
    "linear_escd_loss",
    "linear_gold_loss",
    "linear_hkl_loss",
    "linear_kd_loss",
    "linear_nemo_events_loss",
    "linear_one_to_one_loss",
    "linear_pkl_loss",
    "linear_prefix_kl_loss",
    "linear_simct_loss",
    "linear_uld_loss",
    "nemo_events_loss",
    "one_to_one_loss",
    "pkl_loss",
    "prefix_kl_loss",
    "reference",
    "sample_texts",
    "select_backend",
    "self_test",
    "show_config",
    "simct_loss",
    "uld_loss",
]
