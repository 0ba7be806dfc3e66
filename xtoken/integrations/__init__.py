"""The losses of xtoken in the trainers of other libraries."""

from . import trl as trl
