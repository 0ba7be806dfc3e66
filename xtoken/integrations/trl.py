"""The losses of xtoken in trainers of TRL: `replace_loss` for `GOLDTrainer`, `distil` for `SFTTrainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xtoken.alignment import Aligner
from xtoken.audit import LossChoice, choose_loss
from xtoken.losses import Needs, Teacher, XTokenLoss, registered
from xtoken.losses.backends import IGNORED
from xtoken.losses.call import check_choice
from xtoken.pieces import PieceIndex
from xtoken.projection import ProjectionMatrix
from xtoken.vocabulary import Vocabulary

from .sft import DistilCollator, distil

__all__ = ["DistilCollator", "GOLDLoss", "distil", "replace_loss"]


class GOLDLoss(nn.Module):
    """What a `GOLDTrainer` calls instead of TRL's ``ULDLoss``: ``ce_weight CE + kd_weight KD`` on the completions.

    The student's ids are aligned as they are, sampled ones too; nothing is decoded and tokenized again.

    Parameters
    ----------
    criterion : XTokenLoss
        Of one teacher.
    aligner : Aligner
        Of the student's and the teacher's tokenizer.
    pads : (int, int)
        Pad tokens of both. Where one is an end token too, ends of completions count, since they are labelled.
    skipped_ends : (int or None, int or None)
        End tokens that are not to be taught, of both.

    Attributes
    ----------
    parts : dict of tensors
        What `XTokenLoss` told of the last call.
    """

    use_extended_uld = False  # TRL need not make byte offsets
    use_hybrid_loss = False

    def __init__(
        self,
        criterion: XTokenLoss,
        aligner: Aligner,
        pads: tuple[int, int],
        skipped_ends: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__()
        self.criterion, self.aligner, self.pads, self.skipped_ends = criterion, aligner, pads, skipped_ends
        self.parts: dict[str, Tensor] = {}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_labels: Tensor,
        teacher_labels: Tensor,
        student_input_ids: Tensor,
        teacher_input_ids: Tensor,
        **offsets: Any,
    ) -> Tensor:
        """The loss of a batch: logits [B, T, V], labels (-100: not part of a completion) and ids [B, T] of both."""
        ids, labels = (student_input_ids, teacher_input_ids), (student_labels, teacher_labels)
        masks = [(i != pad) | (wanted != IGNORED) for i, pad, wanted in zip(ids, self.pads, labels, strict=True)]
        taught = [
            wanted if end is None else wanted.masked_fill(wanted == end, IGNORED)
            for wanted, end in zip(labels, self.skipped_ends, strict=True)
        ]
        alignment = self.aligner.align(*(i.cpu() for i in ids), *(mask.cpu() for mask in masks))
        alignment = alignment.supervised(*(wanted.cpu() for wanted in taught))
        teacher_logits = teacher_logits[..., : len(self.aligner.teacher)]  # without the columns of no token
        total: Tensor
        total, self.parts = self.criterion(student_logits, student_labels, teacher_logits, alignment)
        return total


def replace_loss(trainer: Any, loss: str = "auto", **options: Any) -> LossChoice | None:
    """Replaces the loss of TRL's `GOLDTrainer`, made with ``use_uld_loss=True``, by one of xtoken.

    Of `GOLDConfig` count ``uld_crossentropy_weight``, ``uld_distillation_weight``, the temperatures (which must be one)
    and ``uld_skip_student_eos`` and ``uld_skip_teacher_eos``; what else it says of ULD does not. Both models must see
    the same text, as they do there.

    Parameters
    ----------
    trainer : trl.experimental.gold.GOLDTrainer
    loss : str
        "auto": as `xtoken.choose_loss` says; or the name of a registered loss.
    **options
        Of the loss, such as ``beta``.

    Returns
    -------
    LossChoice or None
        What was chosen and why, for "auto".

    Raises
    ------
    ValueError
        If the trainer has no loss of this kind to replace, or temperatures that differ.
    TypeError
        For an option that the loss does not have.

    Examples
    --------
    >>> trainer = GOLDTrainer(  # doctest: +SKIP
    ...     model, teacher_model=teacher, args=GOLDConfig(use_uld_loss=True, teacher_tokenizer_name_or_path=name), ...
    ... )
    >>> xtoken.integrations.trl.replace_loss(trainer)  # doctest: +SKIP
    """
    if getattr(trainer, "uld_loss_fn", None) is None or getattr(trainer, "teacher_tokenizer", None) is None:
        raise ValueError(
            "trainer: expected a GOLDTrainer made with use_uld_loss=True and teacher_tokenizer_name_or_path, "
            f"got {type(trainer).__name__} without"
        )
    args, tokenizers = trainer.args, (trainer.processing_class, trainer.teacher_tokenizer)
    if args.uld_student_temperature != args.uld_teacher_temperature:
        raise ValueError(
            "uld_student_temperature: expected that of the teacher, since both distributions are compared at one "
            f"temperature, got {args.uld_student_temperature} and {args.uld_teacher_temperature}"
        )
    check_choice(loss, "loss", ("auto", *registered()))
    student, teacher = (Vocabulary.from_tokenizer(tokenizer) for tokenizer in tokenizers)
    choice = choose_loss(student, teacher) if loss == "auto" else None
    name = loss if choice is None else choice.loss
    if args.uld_student_temperature != 1.0:
        options = {"temperature": args.uld_student_temperature, **options}
    needs = registered()[name].needs
    projection = ProjectionMatrix.build(student, teacher) if needs is Needs.PROJECTION else None
    pieces = PieceIndex.build(student, teacher) if needs is Needs.PIECES else None
    one = Teacher(projection, name, pieces=pieces, **options)
    criterion = XTokenLoss(
        [one], "fixed", args.uld_crossentropy_weight, args.uld_distillation_weight, vocab_size=len(student)
    )
    skipped = args.uld_skip_student_eos, args.uld_skip_teacher_eos
    ends = [tokenizer.eos_token_id if skip else None for tokenizer, skip in zip(tokenizers, skipped, strict=True)]
    pads = [tokenizer.pad_token_id for tokenizer in tokenizers]
    trainer.uld_loss_fn = GOLDLoss(criterion, Aligner(student, teacher), (pads[0], pads[1]), (ends[0], ends[1]))
    return choice
