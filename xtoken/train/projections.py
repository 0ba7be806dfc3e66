"""Training W: an optimizer of its own, since its weights are not part of the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class ProjectionSteps(TrainerCallback):
    """A step of Adam for the trainable weights of W after each step of the Trainer's optimizer.

    That one cannot have them too: FSDP and DeepSpeed look up each of its parameters in the model that they shard. Every
    process has all of W and makes the same step, with the mean of their gradients. The learning rate is
    ``projection_learning_rate`` times what the Trainer's schedule has left of ``learning_rate``; nothing is clipped or
    decayed.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.weights = list(trainer.criterion.parameters())
        args = trainer.args
        self.optimizer = torch.optim.Adam(
            self.weights, args.projection_learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the gradients the mean over the processes, as DDP does the student's, without the factor of fp16."""
        accelerator = self.trainer.accelerator
        factor = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        for weight in self.weights:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad / factor
            weight.grad = accelerator.reduce(grad, reduction="mean") if accelerator.num_processes > 1 else grad

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step, unless the student's was left out (an overflow of fp16)."""
        if self.trainer.accelerator.optimizer_step_was_skipped:
            return
        left = self.trainer._get_learning_rate() / args.learning_rate if args.learning_rate else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = args.projection_learning_rate * left
        self.optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's moments of each weight, by ``number.name``."""
        moments = self.optimizer.state_dict()["state"]
        return {f"{number}.{name}": value for number, one in moments.items() for name, value in one.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
