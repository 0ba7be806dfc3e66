"""Nothing in training waits for the device: the whole Trainer on the fake one, which writes down every wait.

The models are tables, and the loop, the DataLoader, the optimizer and autograd are those of transformers, accelerate
and torch; so what is counted is everything that happens between two micro-batches.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from fake_device import DEVICE, DeviceTensor, fake_device
from small import SMALL_TEXTS, collate, encode, make_config, make_teacher, make_tokenizer
from torch import Tensor
from transformers import TrainerCallback

from xtoken.train import XTokenTrainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))]


class Table(torch.nn.Module):
    """A row of logits for each token; NaN in the calls from `spoiled` on."""

    def __init__(self, size: int, seed: int, on_device: bool, spoiled: float = math.inf) -> None:
        super().__init__()
        values = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        self.table = torch.nn.Parameter(DeviceTensor(values, DEVICE) if on_device else values)
        self.calls, self.spoiled = 0, spoiled

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.nn.functional.embedding(input_ids, self.table)
        self.calls += 1
        if self.calls > self.spoiled:
            place = torch.arange(logits.shape[1], device=logits.device)[:, None]
            logits = torch.where(place == 1, math.nan, logits)
        return SimpleNamespace(logits=logits)


class Waits(TrainerCallback):
    """What the device saw in each step, and in between."""

    def __init__(self, device: Any) -> None:
        self.device, self.steps = device, []  # type: ignore[var-annotated]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(list(self.device.waits))
        self.device.waits.clear()


@pytest.fixture(scope="module")
def toks() -> Any:
    return make_tokenizer(300, "{1,3}", "<s>"), make_tokenizer(280, "", "<|begin|>")


@pytest.fixture(autouse=True)
def scalars_reach_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.tensor(x, device=...)` is made by torch itself on a device that it knows."""
    make = torch.tensor

    def tensor(*args: Any, device: Any = None, **options: Any) -> Tensor:
        made = make(*args, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)


def train(
    folder: Path, toks: Any, device: Any, twins: bool = False, spoiled: float = math.inf, **options: Any
) -> tuple[XTokenTrainer, list[list[str]]]:
    """A run of three steps of two micro-batches, on the device if there is one, and the waits of each step."""
    student_tok, other_tok = toks
    teachers = [
        make_teacher(student_tok, None if twins else other_tok, name="T"),
        make_teacher(student_tok, None, 2, name="twin"),
    ]
    examples = encode(SMALL_TEXTS[:12], student_tok, None if twins else other_tok, None)
    on_device = device is not None
    for teacher, size, bad in zip(teachers, (len(toks[not twins]), len(student_tok)), (spoiled, math.inf), strict=True):
        teacher.model = Table(size, 1, on_device, bad).eval().requires_grad_(False)
    config = make_config(
        folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
        accelerator_config={"non_blocking": True}, **{"logging_steps": 3, **options},
    )  # fmt: skip
    if on_device:
        vars(config)["_setup_devices"] = DEVICE
    waits = Waits(device) if on_device else None
    trainer = XTokenTrainer(
        model=Table(len(student_tok), 0, on_device), args=config, teachers=teachers, data_collator=collate,
        train_dataset=examples, processing_class=student_tok, callbacks=[waits] if waits is not None else [],
    )  # fmt: skip
    if on_device:
        trainer.accelerator.state.device = DEVICE
    try:
        trainer.train()
    finally:
        trainer.accelerator.state.device = torch.device("cpu")
    return trainer, [] if waits is None else waits.steps


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, []),
        ({"teacher_mode": "select"}, ["_to_copy to cpu"] * 2),  # which teacher is the better one, once a micro-batch
        ({"teacher_mode": "average", "twins": True}, []),
    ],
    ids=["sum", "select", "average"],
)
def test_a_step_does_not_wait(tmp_path, toks, options, waits):
    """From the second step on; the first looks at W and at the ids. And the run is that of the host."""
    with fake_device() as device:
        trainer, steps = train(tmp_path, toks, device, **options)
    assert len(steps) == 3
    assert steps[1:] == [waits, waits]
    (got,) = [one for one in trainer.state.log_history if "ce" in one]
    (want,) = [one for one in train(tmp_path, toks, None, **options)[0].state.log_history if "ce" in one]
    for name, value in want.items():
        if not name.startswith(("time", "tokens_per")):
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_logits_that_are_not_numbers_are_named_later(tmp_path, toks):
    """Nothing waits for them; what is logged, evaluated or saved next says where they were seen first."""
    with fake_device() as device, pytest.raises(ValueError, match=r"T: logits are not a number at step 2, first in sam"
                                                                  "ple 0 at position 1"):  # fmt: skip
        train(tmp_path, toks, device, spoiled=3)
    with fake_device() as device, pytest.raises(ValueError, match="T: logits are not a number at step 1"):
        train(tmp_path, toks, device, spoiled=1, logging_steps=100, save_strategy="steps", save_steps=2)
    assert not list(tmp_path.glob("checkpoint-*/*.safetensors"))
