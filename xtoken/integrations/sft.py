"""A teacher with another tokenizer for TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtoken.alignment import Aligner, Alignment, pad_rows
from xtoken.losses import XTokenLoss
from xtoken.once import Once
from xtoken.train.collator import OnHost, row_alignment
from xtoken.train.encode import ExampleEncoder
from xtoken.train.example import Ints
from xtoken.train.limits import Limits
from xtoken.train.reader import Reader
from xtoken.train.routing import label_spans
from xtoken.train.teachers import TeacherModel, check_teacher
from xtoken.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

COLUMNS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
"""Of a data set, beside the student's ids: by them a teacher writes a chat with its own template."""


class DistilCollator:
    """The batch of `SFTTrainer`'s collator, what a teacher reads of the same texts, and both aligned.

    The student's ids are taken as they are. A chat is written by the teacher's own chat template, if the row still has
    its messages; only contents and ends of turns are compared then. Any other text is what the ids spell, as the
    teacher's tokenizer writes it, with its own special tokens for those of the same role.

    Parameters
    ----------
    collator : callable
        As `SFTTrainer` has it: each example a row, padded on the right, or with ``padding_free`` all in one row.
    student_tok, teacher : tokenizer, TeacherModel
    """

    def __init__(self, collator: Any, student_tok: Any, teacher: TeacherModel) -> None:
        self.collator = collator
        self.student = Vocabulary.from_tokenizer(student_tok)
        self.is_text = self.student.is_text
        self.reader = Reader(teacher.tokenizer, teacher.name)
        self.limit = teacher.limits.positions
        self._warn_once = Once(logger.warning)
        self.reads_student_ids = teacher.reads_student_ids
        self.encoder = ExampleEncoder(student_tok, [teacher.tokenizer], teacher_names=[teacher.name])
        self.aligner = Aligner(self.student, self.reader.vocabulary)
        roles = self.reader.vocabulary.roles
        self._same: dict[int, int | None] = {}
        for role, token in self.student.roles.items():
            same = None if role == "pad" else roles.get(role)
            if same is not None or role in ("bos", "eos", "pad"):  # which may be left out
                self._same[token] = self._same.get(token) if same is None else same

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """That batch, with ``teacher``: ``input_ids`` and ``attention_mask`` int64 [D, L] of its D documents; and
        ``host``, an `OnHost` of ``labels``, ``alignment`` (of the student's rows), ``rows``: which documents a row has,
        and ``lengths`` of these.

        Raises ValueError for a row without its messages whose special tokens the teacher has no like of, or which is
        not in the batch.
        """
        batch = self.collator(examples)
        documents = [list(_documents(example)) for example in examples]
        if getattr(self.collator, "padding_free", False):
            documents = [[one for row in documents for one in row]]
        numbers = itertools.count()
        rows = [[next(numbers) for _ in row] for row in documents]
        ours = [ids for row in documents for ids, _ in row]
        theirs = [self._read(np.asarray(ids, np.int64), example) for row in documents for ids, example in row]
        self._check(batch["input_ids"], documents)
        ids = [tokens for tokens, _ in theirs]
        entry = {"input_ids": pad_rows(ids, 0), "attention_mask": pad_rows([np.ones_like(one) for one in ids], 0)}
        alignment = None if self.reads_student_ids else self._align(ours, theirs, rows, batch["input_ids"])
        host = {
            "labels": batch["labels"], "alignment": alignment, "rows": rows, "lengths": [len(one) for one in ids],
        }  # fmt: skip
        return {**batch, "teacher": entry, "host": OnHost(host)}

    def _read(self, ids: Ints, example: Mapping[str, Any]) -> tuple[Ints, Ints]:
        """The teacher's ids of a document, and the chunks [K, 4] of both."""
        if self.reads_student_ids:
            return ids, np.zeros((0, 4), np.int64)
        row = {name: example[name] for name in COLUMNS if example.get(name) is not None}
        if "messages" in row or isinstance(row.get("completion"), list):
            read, spans = self._as_chat(ids, row)
        else:
            read = np.asarray(self._as_text(ids), np.int64)
            spans = self.aligner.align(ids, read).spans.numpy()
        if self.limit is not None and len(read) > self.limit:
            self._warn_once("cut", f"texts of more than {self.limit} tokens are cut for {self.reader.name}")
            read, spans = read[: self.limit], spans[spans[:, 3] <= self.limit]
        return read, spans

    def _as_chat(self, ids: Ints, row: Mapping[str, Any]) -> tuple[Ints, Ints]:
        """What the teacher's template writes of the messages, and the chunks of contents and ends of turns.

        They are those of what the student's template writes, from which the ids may be cut.
        """
        made = next(iter(self.encoder.encode([row])[0]), None)
        if made is None:
            return np.zeros(1, np.int64), np.zeros((0, 4), np.int64)
        written, entry = made["student_ids"], made["teachers"][0]
        is_same = entry["ids"] is None
        read, spans = (written, label_spans(made["labels"])) if is_same else (entry["ids"], entry["spans"])
        shortest, shift = min(len(ids), len(written)), len(ids) - len(written)
        head = _agreeing(ids[:shortest], written[:shortest])
        tail = _agreeing(ids[::-1][: shortest - head], written[::-1][: shortest - head])
        if head + tail < len(ids):
            self._warn_once(
                "other",
                "some rows are not what the student's chat template writes of their messages: what differs is compared "
                "with nothing",
            )
        at_head, at_tail = spans[:, 1] <= head, spans[:, 0] >= len(written) - tail
        return read, np.concatenate([spans[at_head], spans[at_tail & ~at_head] + [shift, shift, 0, 0]])

    def _as_text(self, ids: Ints) -> list[int]:
        """The teacher's ids of the text that the student's spell."""
        read, is_text = list(self.reader.prefix), self.is_text[ids]
        for stretch in np.split(ids, np.flatnonzero(np.diff(is_text)) + 1) if len(ids) else ():
            if self.is_text[stretch[0]]:
                text = self.student.decode(stretch).decode("utf-8", "ignore")  # documents may be cut in a character
                read += self.reader.backend.encode(text, add_special_tokens=False).ids
                continue
            for token in stretch.tolist():
                if token not in self._same:
                    raise ValueError(
                        f"train_dataset: expected rows with their messages, or text, got one whose special token "
                        f"{self.student[token].decode(errors='replace')!r} has no like in the teacher's tokenizer; "
                        "without packing a teacher reads chats by its own template"
                    )
                same = self._same[token]
                read += [] if same is None or read == [same] == self.reader.prefix else [same]
        return read or [0]

    def _align(self, ours: Any, theirs: Any, rows: Sequence[Sequence[int]], input_ids: Tensor) -> Alignment:
        """Of the rows of a batch; no chunk begins at the first token of a document, which nothing predicts."""
        parts = [(spans, len(ids), len(read)) for ids, (read, spans) in zip(ours, theirs, strict=True)]
        read = pad_rows([np.concatenate([theirs[k][0] for k in row]) for row in rows], 0)
        return row_alignment([[parts[k] for k in row] for row in rows], input_ids, read)

    @staticmethod
    def _check(input_ids: Tensor, documents: Sequence[Sequence[tuple[Any, Any]]]) -> None:
        rows = [np.concatenate([np.asarray(ids, np.int64) for ids, _ in row]) for row in documents]
        if len(rows) != len(input_ids) or not all(
            np.array_equal(input_ids[k, : len(row)], row) for k, row in enumerate(rows)
        ):
            raise ValueError(
                "data_collator: expected the examples' input_ids as rows, padded on the right, or all in one row with "
                "padding_free"
            )


def _agreeing(some: Ints, others: Ints) -> int:
    """How many elements at the beginning are the same."""
    differ = np.flatnonzero(some != others)
    return int(differ[0]) if len(differ) else len(some)


def _documents(example: Mapping[str, Any]) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """The ids of each document of an example, of which packing puts several into one."""
    ids = list(example["input_ids"])
    begin = 0
    for length in example.get("seq_lengths") or [len(ids)]:
        yield ids[begin : begin + length], example
        begin += length


class _Distillation:
    """What replaces the methods of one trainer."""

    def __init__(self, trainer: Any, criterion: XTokenLoss, teacher: TeacherModel) -> None:
        self.criterion, self.teacher = criterion, teacher
        self.get_batch_samples = trainer.get_batch_samples
        self.chunks: float | Tensor | None = None

    def count(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, as the trainer gets them; also counts their chunks, of all processes."""
        batches, items = self.get_batch_samples(*args, **kwargs)
        counts = [
            self.criterion.counts(host["labels"], [host["alignment"]])[1][0]
            for host in (batch["host"].batch for batch in batches)
        ]
        total = torch.tensor(float(sum(counts)), device=trainer.args.device)
        total = trainer.accelerator.reduce(total) if trainer.accelerator.num_processes > 1 else total
        self.chunks = float(total.clamp_min(1))
        return batches, items

    def compute_loss(
        self, trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        """``ce_weight CE + kd_weight KD`` of a micro-batch, as its share of the step where that has been counted."""
        host, entry = inputs["host"].batch, inputs["teacher"]
        given = {name: one for name, one in inputs.items() if name not in ("host", "teacher", "labels")}
        if trainer.aux_loss_enabled:
            given["output_router_logits"] = True
        outputs = model(**given, use_cache=False)
        logits = self._rows(self.teacher.logits(entry, inputs), host, outputs.logits.shape[1])
        is_share = trainer.model.training and num_items_in_batch is not None and self.chunks is not None
        divisors = (num_items_in_batch, self.chunks) if is_share else (None, None)
        total, parts = self.criterion(outputs.logits, host["labels"], logits, host["alignment"], *divisors)
        processes = trainer.accelerator.num_processes
        steps = trainer.current_gradient_accumulation_steps if is_share else 1
        if is_share:
            total = total * processes
        if trainer.aux_loss_enabled:
            total = total + trainer.router_aux_loss_coef * outputs.aux_loss / steps
        shown = torch.stack([parts["ce"], parts["kd"]])
        if processes > 1:
            shown = trainer.accelerator.reduce(shown) / (1 if is_share else processes)
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in zip(("ce", "kd"), shown.tolist(), strict=True):
            metrics[name].append(value * steps)  # the trainer shows their mean
        return (total, outputs) if return_outputs else total

    @staticmethod
    def _rows(logits: Any, host: Mapping[str, Any], width: int) -> Any:
        """The logits [D, L, V] of documents as the rows of the student's batch have them."""
        rows, lengths = host["rows"], host["lengths"]
        if any(len(row) > 1 for row in rows):
            logits = pad_sequence([torch.cat([logits[k, : lengths[k]] for k in row]) for row in rows], batch_first=True)
        if host["alignment"] is None:  # it stands where the student's does
            logits = torch.nn.functional.pad(logits, (0, 0, 0, width - logits.shape[1]))
        return logits


def distil(
    trainer: Any,
    teacher: Any,
    tokenizer: Any = None,
    loss: str = "auto",
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    scaling: str = "fixed",
    **options: Any,
) -> TeacherModel:
    """Gives TRL's `SFTTrainer` a teacher with another tokenizer: it trains on ``ce_weight CE + kd_weight KD``.

    The data stay as the trainer has prepared them: its template, its labels (``completion_only_loss``,
    ``assistant_only_loss``), its cuts, packed or not. The student's ids are never tokenized again, and only what is
    labelled is compared. The teacher reads each document alone:

    * a chat by its own chat template, as long as the row has its messages. Packing drops them, so packed chats are
      refused, unless the teacher has special tokens of the same roles.
    * other text as the student's ids spell it, with the teacher's special tokens for those of the same role.

    Sums are divided by the labels and chunks of the whole step, however it is cut. ``ce`` and ``kd`` are logged; TRL's
    entropy, token accuracy and number of tokens are not.

    Parameters
    ----------
    trainer : trl.SFTTrainer
    teacher : TeacherModel, model, or what `load_model` takes
    tokenizer : optional
        The teacher's, for a model that does not say where it was loaded from.
    loss : str
        "auto": as `xtoken.choose_loss` says; or the name of a registered loss. One that needs a shared tokenizer has
        the teacher read the student's ids.
    ce_weight, kd_weight, scaling
        As for `XTokenLoss`; "dynamic" is the ratio of each micro-batch.
    **options
        Of the loss, such as ``temperature``.

    Returns
    -------
    TeacherModel
        Its ``summary()`` says which loss it has and why.

    Raises
    ------
    TypeError
        For no teacher, or several.
    ValueError
        For a tokenizer, loss or options beside a TeacherModel, another trainer, one with a loss of its own, images, an
        option that the loss does not have, or a teacher that is served or does not go with its tokenizer. In training,
        for rows that the teacher cannot read.

    Examples
    --------
    >>> trainer = SFTTrainer(student, args=SFTConfig(...), train_dataset=dataset)  # doctest: +SKIP
    >>> xtoken.integrations.trl.distil(trainer, teacher="Qwen/Qwen3-4B")  # doctest: +SKIP
    """
    collator = getattr(trainer, "data_collator", None)
    if not hasattr(trainer, "aux_loss_enabled") or not hasattr(collator, "padding_free"):
        raise ValueError(
            f"trainer: expected an SFTTrainer of text with TRL's own data_collator, got {type(trainer).__name__} with "
            f"{type(collator).__name__}"
        )
    args = trainer.args
    own = {"loss_type": args.loss_type != "nll", "label_smoothing_factor": args.label_smoothing_factor > 0,
           "compute_loss_func": trainer.compute_loss_func is not None}  # fmt: skip
    if found := [name for name, is_given in own.items() if is_given]:
        raise ValueError(f"trainer: expected none with a loss of its own, got one with {found[0]}")
    if trainer.accelerator.num_processes > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices: expected True, since sums are divided by those of all processes"
        )
    check_teacher(teacher, "teacher")
    student_tok = trainer.processing_class
    if isinstance(teacher, TeacherModel):
        own = {"tokenizer": tokenizer is not None, "loss": loss != "auto", **dict.fromkeys(options, True)}
        if found := [name for name, is_given in own.items() if is_given]:
            raise ValueError(f"{found[0]}: expected none for a TeacherModel, which is built with its own")
        one = teacher
    else:
        one = TeacherModel.build(teacher, student_tok, tokenizer=tokenizer, loss=loss, loss_options=options)
    if one.model is None:
        raise ValueError(f"teacher: expected a model that runs here, got {one.name} without")
    student = Vocabulary.from_tokenizer(student_tok)
    limits = Limits.of(trainer.model, student, "student")
    one.check_student(student)
    one.place(args.device)
    objective = one.objective_for(limits.rows, args.device)
    size = None if objective.shape is not None else min(len(student), limits.rows or len(student))
    criterion = XTokenLoss([objective], scaling, ce_weight, kd_weight, vocab_size=size, diagnostics=False)
    own_methods = _Distillation(trainer, criterion, one)
    writer = copy.copy(student_tok)
    if getattr(trainer, "chat_template", None) is not None:  # one of TRL's own, that says what the assistant writes
        writer.chat_template = trainer.chat_template
    trainer.data_collator = DistilCollator(trainer.data_collator, writer, one)
    trainer._signature_columns = ["input_ids", "labels", "seq_lengths", *COLUMNS]
    trainer.get_batch_samples = MethodType(own_methods.count, trainer)
    trainer.compute_loss = MethodType(own_methods.compute_loss, trainer)
    return one
