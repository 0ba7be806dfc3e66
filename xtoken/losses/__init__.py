"""Distillation losses: one file for each, one autograd function for all, backends behind one table."""

from xtoken.losses import backends, cpu, cuda
from xtoken.losses.backends import select_backend
from xtoken.losses.criterion import Teacher, XTokenLoss
from xtoken.losses.gold import gold_loss, hkl_loss
from xtoken.losses.kd import kd_loss
from xtoken.losses.linear import (
    linear_gold_loss,
    linear_hkl_loss,
    linear_kd_loss,
    linear_pkl_loss,
    linear_prefix_kl_loss,
)
from xtoken.losses.logits import LinearLogits, TopKLogits
from xtoken.losses.pkl import pkl_loss
from xtoken.losses.prefix_kl import prefix_kl_loss
from xtoken.losses.uld import uld_loss

backends.register_backend(cpu.backend())
cuda.register()

__all__ = [
    "LinearLogits",
    "Teacher",
    "TopKLogits",
    "XTokenLoss",
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
    "select_backend",
    "uld_loss",
]
