"""The way from the arguments of a public loss to its operator, and the checks of what all losses have."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack as Unpack

from xtoken.alignment import Alignment
from xtoken.alignment.alignment import as_tensor
from xtoken.losses.backends import check_backend
from xtoken.losses.logits import AnyLogits, LinearLogits, OrderedLogits, Parts, TopKLogits, check_floating, widened
from xtoken.losses.loss import Loss, Needs
from xtoken.losses.operator import Call, Expected, run
from xtoken.losses.ordered import in_order
from xtoken.terminal import did_you_mean

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
CP_LAYOUTS = ("contiguous", "zigzag")
SIDES = "student_logits", "teacher_logits"

Losses = Tensor | tuple[Tensor, Tensor]
"""The loss, or with ``labels=`` (the loss, the cross-entropy)."""


class Options(TypedDict, total=False):
    """Keyword arguments of every public loss, beside ``labels``."""

    temperature: float
    reduction: Reduction
    inplace: bool
    backend: str
    tp_group: Any
    cp_group: Any
    cp_layout: str


class DivergenceOptions(Options, total=False):
    """Those of a loss with other divergences than KL(teacher || student)."""

    reverse: bool
    beta: float
    skew: float


PARAMETERS = """\
    student_logits : float16, bfloat16, float32 or float64 [B, T_s, >= V_student], or [T_s, >= V_student]
        Row ``t`` predicts token ``t + 1``. Columns beyond the vocabulary take no part and get zero gradient. Or
        `LinearLogits`: hidden states and output layer, of which logits are made a block of rows at a time.
    teacher_logits : floating [B, T_t, >= V_teacher], or [T_t, >= V_teacher]
        On the same device. Or `TopKLogits` (a cached or served teacher), `LinearLogits`, or `OrderedLogits`. Gets no
        gradient.
    alignment : Alignment
        Of the same batch. Chunks without a predictor on either side are left out. To leave out prompts, which are not
        supervised, give ``alignment.supervised(labels)``.
    projection : ProjectionMatrix
        W [V_student, V_teacher]; or any object with ``row_ptr``, ``col``, ``weight`` and ``shape``.
    pieces : PieceIndex
        Of the student's and the teacher's tokenizer.
    labels : int64 [B, T_s] or [T_s], optional
        Token ids at their own positions, -100 where ignored. Also returns the student's next-token
        cross-entropy, from the same pass over the logits. They do not choose chunks. Ids that do not fit raise
        ValueError on the CPU; elsewhere a check would wait for the device, and they make the cross-entropy nan.
    temperature : float
        Divides all logits; the loss is multiplied by its square.
    uncommon_top_k : int
        At most so many of the largest probabilities of uncommon tokens are compared; 0: the common part alone, as
        logits in parts (``tp_group``) need it.
    agree : bool
        Leaves out the chunks that the two tokenizers begin with other text: those where W has no entry for the first
        token of both (needs the alignment's ids). By default they count.
    reverse : bool
        Exchanges the two distributions of the KL: KL(student || teacher).
    beta : float in [0, 1]
        Generalised Jensen-Shannon: ``beta KL(teacher || M) + (1 - beta) KL(student || M)`` with
        ``M = beta teacher + (1 - beta) student``, as in TRL's GKD; 0 is KL(teacher || student), 1 KL(student ||
        teacher).
    skew : float in [0, 1)
        Mixes so much of the KL's first distribution into its second, which keeps it finite:
        KL(teacher || skew teacher + (1 - skew) student), with ``reverse`` the two exchanged. Not with ``beta`` inside
        its range.
    reduction : "mean", "sum" or "none"
        "mean" is over the chunks used; no chunk gives 0. "none" gives the losses of all chunks of the
        alignment [K], 0 where a chunk has no predictor.
    inplace : bool
        The gradient overwrites ``student_logits``, whose values are lost. Only for contiguous logits that a
        model computed, with one loss for all chunks, without labels, outside ``torch.compile``.
    backend : "auto", "reference", ...
        See `select_backend`.
    tp_group : torch.distributed.ProcessGroup, optional
        Vocabulary parallel: each rank has consecutive columns of ``student_logits`` (or of the output layer), in the
        order of the ranks; of ``teacher_logits`` likewise, or all of them. Parts have no padding (a `DTensor` may).
        Everything else is the same on all ranks, and so are the results. Each gets the gradient of its own columns;
        that of hidden states and weights of W is whole. Every rank must make the call, and backward. A `DTensor` that
        is sharded so says it by itself.
    cp_group : torch.distributed.ProcessGroup, optional
        Context parallel: each rank has some positions of ``student_logits`` and ``teacher_logits``. Everything else
        (alignment, labels, mask, ``reduction="none"``) is that of the whole sequences and the same on all ranks, and so
        are the results. Each gets the gradient of its own positions, so gradients of parameters add up over the ranks.
    cp_layout : "contiguous" or "zigzag"
        Which positions: consecutive ones in the order of the ranks; or of 2 n equal parts rank r has r and 2 n - 1 - r.
"""
"""Of the docstring of a public loss, where it says nothing else: each parameter with its text."""

RESULTS = """\
    Returns
    -------
    Tensor, or with ``labels`` a pair (loss, cross-entropy)
        Scalar, or [K] for ``reduction="none"`` (not with labels); float32, or float64 if an input is. The
        cross-entropy is a mean over labels, or for ``reduction="sum"`` their sum. Deterministic on the CPU.

    Raises
    ------
    ValueError, TypeError
        For shapes, types or options that do not fit; the message names the argument.
    RuntimeError
        If the backend cannot do it.

    Notes
    -----
    Forward computes the gradient at once, in the student logits' type and size; other temporaries are bounded.
    Backward only scales it (with ``reduction="none"`` it computes it, and so does a second backward through the same
    graph). Second derivatives raise RuntimeError. Works inside ``torch.compile``.
"""

_F = TypeVar("_F", bound=Callable[..., Any])


def public_loss(function: _F) -> _F:
    """Completes a public loss: its ``**call`` are the parameters that every loss has, with the defaults of `compute`,
    and ``{a, b}`` on a line of its own in its docstring stands for their texts, ``{results}`` for what is returned and
    raised."""
    own, shared = (inspect.signature(one).parameters for one in (function, compute))
    others = [one for name, one in shared.items() if name in Options.__annotations__]
    positional = [one for one in own.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    named = [one for one in own.values() if one.kind is one.KEYWORD_ONLY]
    parameters = [*positional, shared["labels"], *named, *others]
    known = tuple(one.name for one in parameters)

    @functools.wraps(function)
    def loss(*arguments: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
        return function(*arguments, **options)

    loss.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    loss.__doc__ = _documented(function.__doc__ or "")
    return loss  # type: ignore[return-value]


def _documented(doc: str) -> str:
    names = re.findall(r"^    (\w+) : .*\n(?:        .*\n)+", PARAMETERS, re.MULTILINE)
    texts = {"results": RESULTS, **dict(zip(names, re.split(r"(?m)^(?=    \w+ : )", PARAMETERS)[1:], strict=True))}
    lines = []
    for line in doc.splitlines(keepends=True):
        given = line.strip()
        is_given = given.startswith("{") and given.endswith("}")
        lines.append("".join(texts[name.strip()] for name in given[1:-1].split(",")) if is_given else line)
    return "".join(lines)


def compute(
    loss: Loss,
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment | None,
    *,
    sizes: tuple[int | None, int | None],
    mask: Any = None,
    expected: Expected | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    cp_group: Any = None,
    cp_layout: str = "contiguous",
) -> Losses:
    """Checks what every loss has, and calls the operator.

    Parameters
    ----------
    sizes : (int or None, int or None)
        Of the two vocabularies; None: all columns.
    mask : bool [B, T] or [T], optional
        Without an alignment, which means that both models read the same tokens: the rows to use. Default: all.
    expected : Expected, optional
        What the results will be multiplied by.
    """
    if isinstance(teacher_logits, OrderedLogits):
        loss, teacher_logits, alignment = in_order(loss, teacher_logits, alignment)
    if (tp_group, cp_group) != (None, None) or has_dtensor(student_logits, teacher_logits):
        from xtoken.parallel.call import Given, Groups
        from xtoken.parallel.call import compute as compute_in_parts

        of = loss, student_logits, teacher_logits, alignment, labels, sizes, mask, reduction, inplace, backend
        found: Losses = compute_in_parts(Given(*of), Groups(tp_group, cp_group, cp_layout))
        return found
    given = check_call(loss, student_logits, teacher_logits, alignment, labels, reduction, backend, cp_layout)
    if loss.needs is Needs.SAME_TOKENIZER and sizes == (None, None):
        widths = [one.width for one in given if one.width is not None]
        sizes = (min(widths),) * 2 if widths else sizes
    student_size, teacher_size = (vocabulary_size(loss, k, one, sizes[k]) for k, one in enumerate(given))
    student, teacher = given[0].batched(), given[1].batched().detached()
    if student.head is None:
        student = student.with_rows(widened(student.rows, student_size))
    if mask is not None:
        mask = checked_mask(given[0].leading_shape, mask)
    for side, one in enumerate(given):
        if one.width is not None and one.width < (student_size, teacher_size)[side]:
            check_known(side, one.width, labels, alignment)
    if labels is not None:
        labels = checked_labels(given[0].leading_shape, labels)
    if inplace:
        _check_inplace(student_logits, labels, reduction, loss)
    call = Call.of(
        loss, student, teacher, alignment,
        sizes=(student_size, teacher_size), mask=mask, labels=labels, reduction=reduction, backend=backend,
    )  # fmt: skip
    result, cross_entropy = run(loss, call, inplace, expected)
    if alignment is None and reduction == "none":
        result = result.view(given[0].leading_shape)
    return result if labels is None else (result, cross_entropy)


def has_dtensor(*logits: AnyLogits) -> bool:
    """Whether one of them is a `DTensor`, or made of one."""
    # There is none before it is imported; torch 2.4 has it in the second module.
    modules: Any = sys.modules.get("torch.distributed.tensor"), sys.modules.get("torch.distributed._tensor")
    kinds = tuple(module.DTensor for module in modules if hasattr(module, "DTensor"))
    if not kinds:
        return False
    inner = [one.logits if isinstance(one, OrderedLogits) else one for one in logits]
    parts = [part for one in inner for part in ((one.hidden, one.weight) if isinstance(one, LinearLogits) else (one,))]
    return any(isinstance(part, kinds) for part in parts)


def check_call(
    loss: Loss,
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    alignment: Alignment | None,
    labels: Tensor | None,
    reduction: str,
    backend: str,
    cp_layout: str,
) -> tuple[Parts, Parts]:
    """What can be said of a call before anything is known of sizes. Both logits as they were given."""
    loss.check_switches()
    check_choice(cp_layout, "cp_layout", CP_LAYOUTS)
    check_logits(student_logits, teacher_logits)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_backend(backend)
    if isinstance(student_logits, TopKLogits):
        raise TypeError("student_logits: expected logits or LinearLogits, which have a gradient, got TopKLogits")
    student, teacher = Parts.of(student_logits), Parts.of(teacher_logits)
    if alignment is not None:
        check_alignment(alignment, student.batched().rows.shape[0])
    elif loss.needs is not Needs.SAME_TOKENIZER:
        raise TypeError("alignment: expected an xtoken.Alignment, got NoneType")
    elif teacher.leading_shape != student.leading_shape:
        raise ValueError(
            f"teacher_logits: expected the positions of student_logits {list(student.leading_shape)}, got "
            f"{list(teacher.leading_shape)}; pass an alignment if they differ"
        )
    if labels is not None and reduction == "none":
        raise ValueError("labels: expected reduction='mean' or 'sum' with labels, got 'none'")
    return student, teacher


def check_logits(student_logits: AnyLogits, teacher_logits: AnyLogits) -> None:
    """Same device, same number of dimensions (2 or 3), same batch, floating point."""
    for name, logits in zip(SIDES, (student_logits, teacher_logits), strict=True):
        if isinstance(logits, (TopKLogits, LinearLogits)):
            continue
        if isinstance(logits, OrderedLogits):
            raise TypeError(f"{name}: expected columns in the tokenizer's order, got OrderedLogits")
        check_floating(name, logits)
        if logits.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape [B, T, V] or [T, V], got {list(logits.shape)}")
    student, teacher = Parts.of(student_logits), Parts.of(teacher_logits)
    if student.rows.device != teacher.rows.device:
        raise ValueError(
            f"teacher_logits: expected the device of student_logits ({student.rows.device}), got {teacher.rows.device}"
        )
    if student.leading_shape[:-1] != teacher.leading_shape[:-1]:
        raise ValueError(
            f"teacher_logits: expected the batch of student_logits {list(student.leading_shape)}, "
            f"got {list(teacher.leading_shape)}"
        )


def check_alignment(alignment: Alignment, samples: int) -> None:
    """An alignment of so many samples."""
    if not isinstance(alignment, Alignment):
        raise TypeError(f"alignment: expected an xtoken.Alignment, got {type(alignment).__name__}")
    alignment.check_form()
    if len(alignment) != samples:
        raise ValueError(f"alignment: expected {samples} samples (the batch of the logits), got {len(alignment)}")


def checked_mask(shape: torch.Size, mask: Any, note: str = "") -> Tensor:
    """A mask of positions of this shape."""
    given = as_tensor(mask)
    if given.dtype != torch.bool or given.shape != shape:
        raise ValueError(f"mask: expected bool {list(shape)}{note}, got {given.dtype} {list(given.shape)}")
    return given


def checked_labels(
    shape: torch.Size, labels: Tensor, name: str = "labels", note: str = "that of the logits' rows"
) -> Tensor:
    """Labels [B, T] for positions of this shape."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    if labels.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({note}), got {list(labels.shape)}")
    return labels if labels.dim() == 2 else labels[None]


def _check_inplace(student_logits: AnyLogits, labels: Tensor | None, reduction: str, loss: Loss) -> None:
    if labels is not None:
        raise ValueError("inplace: expected False with labels, whose gradient needs the logits again")
    if reduction == "none":
        raise ValueError("inplace: expected False with reduction='none', whose gradient needs the logits again")
    if loss.trained is not None and loss.trained.requires_grad:
        raise ValueError("inplace: expected False for a projection whose weights need a gradient")
    if not isinstance(student_logits, Tensor) or not student_logits.is_contiguous():
        raise ValueError("inplace: expected contiguous logits in memory to write the gradient to")
    if student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError("inplace: expected logits computed by a model, got a leaf, whose values you still own")


def vocabulary_size(loss: Loss, side: int, logits: Parts, size: int | None) -> int:
    """Columns of a side (0: the student): those of its vocabulary, or of its logits if that is not known.

    Raises ValueError if there are fewer, unless those that are missing take no part in the loss (`Loss.may_lack`).
    """
    name = SIDES[side]
    if size is None:
        if logits.width is None:
            raise ValueError(
                f"{name}: expected the size of the vocabulary too, which TopKLogits do not tell: as the function's "
                "vocab_size or teacher_vocab_size, or by a Teacher with a projection or pieces"
            )
        return logits.width
    if logits.width is not None and logits.width < size and not loss.may_lack(side, logits.width):
        raise ValueError(
            f"{name}: expected at least {size} columns (the vocabulary), got {logits.width} "
            f"in shape {[*logits.leading_shape, logits.width]}"
        )
    return size


def check_known(side: int, width: int, labels: Tensor | None, alignment: Alignment | None) -> None:
    """Raises ValueError if a label, or a token of a chunk, is none of the columns; of those on the CPU."""
    name = ("student", "teacher")[side]
    if labels is not None and side == 0 and labels.device.type == "cpu" and int(labels.max()) >= width:
        raise ValueError(f"labels: expected token ids below {width}, the columns of {SIDES[0]}, got {labels.max()}")
    ids = None if alignment is None else getattr(alignment.host, f"{name}_ids")
    if ids is None or alignment is None:
        return
    alignment.host.check()
    alignment.host.check_reach(side, ids.shape[-1], f"{name}_ids", "token")
    largest = int(torch.where(alignment.host.chunk_ids(name, ids.shape[-1]).view(ids.shape) >= 0, ids, -1).max())
    if largest >= width:
        raise ValueError(f"alignment: expected {name} ids below {width}, the columns of {SIDES[side]}, got {largest}")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{did_you_mean(value, choices)}"
        )


def check_sequence(values: Any, name: str, of: str) -> None:
    """``values`` are several, and not one of them by itself."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a sequence of {of}, such as [one], got {type(values).__name__}")


def check_count(value: int | None, name: str, optional: bool = False, least: int = 1) -> None:
    """An integer of at least so much, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name}: expected an integer of at least {least}{' or None' if optional else ''}, got {value!r}"
        )
