"""Training on top of transformers' Trainer; importing this package imports transformers."""

from .config import XTokenConfig
from .teachers import TeacherModel, load_model
from .trainer import XTokenTrainer

__all__ = ["TeacherModel", "XTokenConfig", "XTokenTrainer", "load_model"]
