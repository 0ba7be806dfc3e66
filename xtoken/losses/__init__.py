"""Distillation losses: one folder each; a register of them all; backends behind one table."""

from xtoken.losses import cpu, cuda, functions, plain
from xtoken.losses.backends import Backend, register_backend, select_backend
from xtoken.losses.criterion import Teacher, XTokenLoss
from xtoken.losses.functions import *  # noqa: F403
from xtoken.losses.logits import LinearLogits, OrderedLogits, TopKLogits
from xtoken.losses.loss import Loss, Needs, registered
from xtoken.losses.operator import register

register_backend(plain.backend())
register_backend(cpu.backend())
cuda.register()

__all__ = [
    "Backend",
    "LinearLogits",
    "Loss",
    "Needs",
    "OrderedLogits",
    "Teacher",
    "TopKLogits",
    "XTokenLoss",
    "register",
    "register_backend",
    "registered",
    "select_backend",
]
__all__ += functions.__all__
