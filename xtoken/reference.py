"""The losses as plain, unfused PyTorch, written from their formulas: the truth for every fast backend.

This is the formulas' public address; each stands in the folder of its loss. All functions work on matrices of logits,
one row per token position (``[B, T, V]`` becomes ``logits.flatten(0, 1)``), run on any device, are differentiable by
autograd, and compute in the widest type of their inputs, at least float32. They hold whole ``[rows, V]`` temporaries:
call `xtoken.pkl_loss` and its siblings to train.

Conventions
-----------
``z`` is a student row, ``y`` a teacher row, ``tau`` the temperature, ``p = softmax(z / tau)`` and
``q = softmax(y / tau)``. Row ``t`` predicts token ``t + 1``. Logits are read as ``max(logit, LOWEST_LOGIT)``:
a logit of -inf is a probability of exactly zero, and everything stays finite (0 log 0 = 0). Every function
returns one loss per chunk, multiplied by ``tau ** 2``.
"""

from xtoken.alignment import Chunks, Rows, predictable
from xtoken.losses.diagnostics import diagnosis
from xtoken.losses.kd import kd
from xtoken.losses.numerics import EPSILON, LOWEST_LOGIT
from xtoken.losses.on_pieces import event_agreement
from xtoken.losses.pkl import pkl
from xtoken.losses.prefix_kl.formula import prefix
from xtoken.losses.ranked import ranked
from xtoken.losses.ranked import ranked as gold
from xtoken.losses.uld import uld
from xtoken.projection import Entries, column_set, common_pairs, project, restrict

__all__ = [
    "EPSILON", "LOWEST_LOGIT", "Chunks", "Entries", "Rows", "column_set", "common_pairs", "diagnosis",
    "event_agreement", "gold", "kd", "pkl", "predictable", "prefix", "project", "ranked", "restrict", "uld",
]  # fmt: skip
