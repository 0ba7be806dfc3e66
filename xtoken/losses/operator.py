"""The torch operators behind every loss: `xtoken::loss` with its fake kernel and its autograd formula.

An operator takes tensors and scalars only, so `Inputs` and `Settings` list what one call of a loss is made of.
Everything that depends on the values in tensors (which chunks have a predictor, which columns are largest) happens
inside it, so that a step compiles into one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.alignment import Chunks, to_device
from xtoken.losses.backends import IGNORED, SCALE, Labels, Problem, backend_of, select
from xtoken.losses.logits import DenseSource, LinearSource, Source, TopKSource, row_blocks


class Inputs(NamedTuple):
    """The tensors of one call.

    `student` and `teacher` are logits [B, T, >= V]; or hidden states [B, T, D] if there is a `*_head` [V, D]; the
    teacher may also be log-probabilities [B, T, k] of the tokens `teacher_top` [B, T, k].
    """

    student: Tensor
    student_head: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    teacher_top: Tensor | None
    spans: Tensor | None  # int32 [K, 4]; None: every position is a chunk, on both sides the same (kd)
    offsets: Tensor | None  # int64 [B + 1]
    predicted: Tensor | None  # bool [K], or [B, T] without spans
    student_ids: Tensor | None  # int64 [B, T], for merge="chain" and prefix KL
    teacher_ids: Tensor | None
    packed: Tensor | None  # int64 [n]: `Alignment._flat`, if it is there; its other tensors are not
    row_ptr: Tensor | None  # W
    col: Tensor | None
    weight: Tensor | None
    columns: Tensor | None  # int64 [C], given column set
    pieces: Tensor | None  # int32 [n], data of a PieceIndex
    labels: Tensor | None  # int64 [B, T], at the tokens' own positions


class Settings(NamedTuple):
    """The scalars of one call; see the loss functions."""

    operation: str
    backend: str
    reduction: str
    student_size: int
    teacher_size: int
    temperature: float
    tail: str
    reverse: bool = False
    merge: str = "first"
    support: str = "all"
    top_k: int | None = None
    min_weight: float = 1.0
    uncommon_top_k: int = 8192


class Result(NamedTuple):
    """Loss and cross-entropy, reduced, and the gradients of `Inputs` of the same names; empty where not wanted."""

    loss: Tensor
    cross_entropy: Tensor
    student: Tensor
    student_head: Tensor
    student_bias: Tensor
    weight: Tensor


class Prepared(NamedTuple):
    """What a loss makes of its inputs: the chunks and the options of its backends."""

    chunks: Chunks
    options: Any


PREPARE: dict[str, Callable[[Inputs, Settings, Source, Source], Prepared]] = {}
"""How each operation prepares a call; filled by the modules of the losses."""


def _loss(
    inputs: Inputs,
    settings: Settings,
    student_wanted: bool,
    weight_wanted: bool,
    upstream: Tensor | None,
    label_upstream: Tensor | None,
    inplace: bool = False,
) -> Result:
    """Losses, and gradients for the given upstream gradients (default: 1)."""
    student = _source(inputs.student, inputs.student_head, inputs.student_bias, None, settings.student_size, "")
    teacher = _source(
        inputs.teacher, inputs.teacher_head, inputs.teacher_bias, inputs.teacher_top, settings.teacher_size,
        settings.tail,
    )  # fmt: skip
    prepared = PREPARE[settings.operation](inputs, settings, student, teacher)
    chunks = prepared.chunks
    weight = None
    if weight_wanted and inputs.weight is not None:
        weight = inputs.weight.detach().to(inputs.student.device)
    scale = _chunk_scale(chunks, settings.reduction, upstream, inputs.student)
    labels = _labels(inputs.labels, inputs.student, settings.student_size, settings.reduction, label_upstream)
    grads = _Gradients(inputs, weight, student_wanted, inplace)
    parts = []
    for problem, span, rows in _problems(student, teacher, prepared, weight):
        backend = backend_of(settings.backend, problem)
        part = None if labels is None else Labels(labels.ids[rows], labels.losses[rows], labels.scale)
        logits_grad = grads.logits(problem, rows)
        parts.append(backend.run(problem, logits_grad, grads.weight, None if scale is None else scale[span], part))
        grads.add(logits_grad, rows)
    losses = torch.cat(parts) if len(parts) != 1 else parts[0]
    count = inputs.predicted.numel() if inputs.predicted is not None else inputs.student.shape[:2].numel()
    return Result(
        _reduce(losses, chunks, count, settings.reduction),
        losses.new_zeros(()) if labels is None else _reduced_labels(labels, settings.reduction),
        *grads.results(),
    )


def _source(
    rows: Tensor, head: Tensor | None, bias: Tensor | None, top: Tensor | None, size: int, tail: str
) -> DenseSource | LinearSource | TopKSource:
    if head is not None:
        return LinearSource(rows, head, bias, size)
    if top is not None:
        return TopKSource(top, rows, tail, size)
    return DenseSource(rows, size)


def _problems(student: Source, teacher: Source, prepared: Prepared, weight: Tensor | None) -> Any:
    """One problem if all logits are in memory, else one for each block of rows: (problem, chunks, student rows)."""
    if isinstance(student, DenseSource) and isinstance(teacher, DenseSource):
        problem = Problem(student.logits, teacher.logits, prepared.chunks, prepared.options, weight)
        yield problem, slice(None), slice(None)
        return
    for block in row_blocks(student, teacher, prepared.chunks):
        student_rows, teacher_rows = block.dense(student, teacher)
        problem = Problem(student_rows, teacher_rows, block.chunks, prepared.options, weight)
        yield problem, block.span, block.student


class _Gradients:
    """Buffers of the gradients that are wanted."""

    def __init__(self, inputs: Inputs, weight: Tensor | None, student_wanted: bool, inplace: bool) -> None:
        self.inputs, self.wanted = inputs, student_wanted
        head, bias = inputs.student_head, inputs.student_bias
        self.student = inputs.student.new_empty(0)  # an operator's results must not share memory
        self.head = inputs.student.new_empty(0)
        self.bias = inputs.student.new_empty(0)
        if self.wanted:
            contiguous = torch.contiguous_format
            self.student = inputs.student if inplace else torch.empty_like(inputs.student, memory_format=contiguous)
        if self.wanted and head is not None:
            self.head = torch.zeros_like(head)
        if self.wanted and bias is not None:
            self.bias = torch.zeros_like(bias)
        self.weight = None if weight is None else torch.zeros_like(weight)

    def logits(self, problem: Problem, rows: slice) -> Tensor | None:
        """Where the gradient of the logits of these rows goes: [B, T, >= V]."""
        if not self.wanted:
            return None
        if self.inputs.student_head is not None:
            return torch.empty_like(problem.student)
        if rows == slice(None):
            return self.student
        return self.student.flatten(0, 1)[rows][None]

    def add(self, logits_grad: Tensor | None, rows: slice) -> None:
        """Takes a block's gradient of the logits on to the hidden states and the output layer."""
        head, bias = self.inputs.student_head, self.inputs.student_bias
        if logits_grad is None or head is None:
            return
        grad = logits_grad[0]
        size = grad.shape[1]
        hidden = self.inputs.student.flatten(0, 1)[rows]
        torch.mm(grad, head[:size], out=self.student.flatten(0, 1)[rows])
        self.head[:size].addmm_(grad.t(), hidden)
        if bias is not None:
            self.bias[:size] += grad.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.weight is None or self.inputs.weight is None:
            return self.student, self.head, self.bias, self.inputs.student.new_empty(0)
        return self.student, self.head, self.bias, self.weight.to(self.inputs.weight.device)


def _chunk_scale(chunks: Chunks, reduction: str, upstream: Tensor | None, student: Tensor) -> Tensor | None:
    if reduction == "none":
        return None if upstream is None else upstream.flatten()[chunks.used]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    scale = torch.ones(len(chunks), dtype=dtype, device=student.device)
    if reduction == "mean":
        scale = scale / at_least_one(chunks.number)
    return scale if upstream is None else scale * upstream


def _labels(
    labels: Tensor | None, student: Tensor, size: int, reduction: str, upstream: Tensor | None
) -> Labels | None:
    if labels is None:
        return None
    following = torch.nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED).flatten()
    if following.device.type == "cpu":  # elsewhere this would wait for the device; a bad id there makes the loss nan
        bad = ((following < 0) | (following >= size)) & (following != IGNORED)
        if bool(bad.any()):
            got = int(following[bad][0])
            raise ValueError(f"labels: expected token ids in 0 ... {size - 1}, or {IGNORED}, got {got}")
    following = to_device(following, student.device)
    scale = torch.ones((), dtype=torch.float64, device=student.device) if upstream is None else upstream.double()
    if reduction == "mean":
        scale = scale / (following != IGNORED).sum().clamp_min(1)
    dtype = torch.promote_types(student.dtype, torch.float32)
    return Labels(following, torch.empty(len(following), dtype=dtype, device=student.device), scale)


def _reduced_labels(labels: Labels, reduction: str) -> Tensor:
    total = labels.losses.sum(dtype=torch.float64)
    if reduction == "mean":
        total = total / (labels.ids != IGNORED).sum().clamp_min(1)
    return total.to(labels.losses.dtype)


def _reduce(losses: Tensor, chunks: Chunks, total: int, reduction: str) -> Tensor:
    """``"mean"`` over the chunks used, ``"sum"``, or ``"none"``: [total], zero where a chunk was not used."""
    if reduction == "none":
        return losses.new_zeros(total).index_copy(0, chunks.used, losses)
    loss = losses.sum(dtype=torch.float64)
    return (loss / at_least_one(chunks.number) if reduction == "mean" else loss).to(losses.dtype)


def at_least_one(number: int | Tensor) -> int | Tensor:
    """A divisor that may be counted on a device."""
    return number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)


_FLAGS = "bool student_wanted, bool weight_wanted, Tensor? upstream, Tensor? label_upstream"
_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "str": "str", "float": "float", "bool": "bool", "int": "SymInt",
    "int | None": "SymInt?",
}  # fmt: skip
_ARGUMENTS = ", ".join(
    f"{_TYPES[kind.__forward_arg__]} {name}"
    for part in (Inputs, Settings)
    for name, kind in part.__annotations__.items()
)
_SPLIT = len(Inputs._fields)
_END = _SPLIT + len(Settings._fields)


def _parts(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings, tuple[Any, ...]]:
    return Inputs(*arguments[:_SPLIT]), Settings(*arguments[_SPLIT:_END]), arguments[_END:]


def _loss_kernel(*arguments: Any) -> Result:
    inputs, settings, rest = _parts(arguments)
    return tuple(_loss(inputs, settings, *rest))  # type: ignore[return-value]


loss_operator = torch.library.custom_op(
    "xtoken::loss",
    _loss_kernel,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, {_FLAGS}) -> ({', '.join(['Tensor'] * len(Result._fields))})",
)


@loss_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings, (student_wanted, weight_wanted, *_) = _parts(arguments)
    student = inputs.student
    dtype = torch.promote_types(torch.promote_types(student.dtype, inputs.teacher.dtype), torch.float32)
    shape: tuple[Any, ...] = ()
    if settings.reduction == "none":
        shape = (inputs.spans.shape[0] if inputs.spans is not None else student.shape[0] * student.shape[1],)

    def like(value: Tensor | None, wanted: bool) -> Tensor:
        if value is None or not wanted:
            return student.new_empty(0)
        return value.new_empty(value.shape)

    labels_dtype = dtype if inputs.labels is None else torch.promote_types(student.dtype, torch.float32)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((), dtype=labels_dtype),
        like(student, student_wanted),
        like(inputs.student_head, student_wanted),
        like(inputs.student_bias, student_wanted),
        like(inputs.weight, weight_wanted),
    )


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor`` for a scalar ``factor``, in place; a tracer gets a new tensor, and fuses the product."""
    if type(grad) is not Tensor:
        return grad * factor
    if grad.device.type != "cpu":
        SCALE.get(grad.device.type, Tensor.mul_)(grad, factor.to(grad.device))
    elif float(factor) != 1.0:
        grad.mul_(factor)
    return grad


@torch.library.custom_op(
    "xtoken::add_cross_entropy_",
    mutates_args=("grad",),
    # torch 2.4 cannot read it off annotations that are strings.
    schema="(Tensor(a!) grad, Tensor student, Tensor labels, Tensor scale, Tensor factor, SymInt size, str reduction,"
    " str backend) -> ()",
)
def add_cross_entropy_(
    grad: Tensor,
    student: Tensor,
    labels: Tensor,
    scale: Tensor,
    factor: Tensor,
    size: int,
    reduction: str,
    backend: str,
) -> None:
    """``grad = scale grad + factor d cross_entropy / d student`` for dense logits."""
    if grad.device.type == "cpu" and float(factor) == 0.0:
        _scaled(grad, scale)
        return
    wanted = _labels(labels, student, size, reduction, factor)
    if wanted is not None:
        select(backend, student.device).cross_entropy(student[..., :size], wanted, grad, scale)


class _OnceOnly(torch.autograd.Function):
    """Identity that cannot be differentiated, so that a second derivative is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "xtoken losses have no second derivative: the gradient is computed in forward; "
            "differentiate the formulas in xtoken.reference instead"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings, (student_wanted, weight_wanted, *expected) = _parts(inputs)
    ctx.set_materialize_grads(False)  # torch would make zeros of the size of every gradient
    # Tensors made in inference mode, as a teacher's logits often are, cannot be saved; they never need a gradient.
    ctx.inference = {k: x for k, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if k in ctx.inference else x for k, x in enumerate(tensors)), *expected)
    ctx.zeros = output[0].new_zeros(output[0].shape), output[1].new_zeros(())
    # Buffers to scale and give away once. They are no outputs that anybody sees, so no saved-tensor hook needs them.
    ctx.prepared = tuple(grad.detach() for grad in output[2:]) if student_wanted or weight_wanted else None


def _remaining(
    upstream: Tensor, label_upstream: Tensor, expected: Tensor | None, label_expected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What backward has left to do: the factor of the prepared gradient, and that of the cross-entropy it lacks."""
    if expected is None or label_expected is None:
        return upstream, label_upstream - upstream
    rounding = 8 * torch.finfo(upstream.dtype).eps  # both came here by a few operations, in different orders
    factor = upstream / expected.to(upstream.dtype)
    factor = torch.where((factor - 1).abs() <= rounding, 1.0, factor)
    lacking = label_upstream - label_expected * factor
    return factor, torch.where(lacking.abs() <= rounding * label_upstream.abs(), 0.0, lacking)


def _backward(
    ctx: Any, upstream: Tensor | None, label_upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    upstream = ctx.zeros[0] if upstream is None else upstream
    label_upstream = ctx.zeros[1] if label_upstream is None else label_upstream
    *saved, expected, label_expected = ctx.saved_tensors
    inputs = Inputs(*(ctx.inference.get(k, x) for k, x in enumerate(saved)))
    settings = ctx.settings
    needed = Inputs(*ctx.needs_input_grad[:_SPLIT])
    student_wanted = bool(needed.student or needed.student_head or needed.student_bias)
    prepared, ctx.prepared = ctx.prepared, None
    with torch.no_grad():
        if prepared is None:
            flags = student_wanted, bool(needed.weight) and settings.operation == "pkl", upstream, label_upstream
            prepared = torch.ops.xtoken.loss(*inputs, *settings, *flags)[2:]
        else:
            factor, lacking = _remaining(upstream, label_upstream, expected, label_expected)
            if inputs.labels is not None and student_wanted:
                add_cross_entropy_(
                    prepared[0], inputs.student, inputs.labels, factor, lacking, settings.student_size,
                    settings.reduction, settings.backend,
                )  # fmt: skip
                prepared = prepared[0], *(_scaled(grad, factor) for grad in prepared[1:])
            else:
                prepared = tuple(_scaled(grad, factor) for grad in prepared)
    student, head, bias, weight = prepared
    grads: dict[str, Tensor] = {"student": student, "student_head": head, "student_bias": bias, "weight": weight}
    if torch.is_grad_enabled():
        grads = {name: _OnceOnly.apply(grad.requires_grad_()) for name, grad in grads.items()}
    given: list[Tensor | None] = []
    for name, value, is_needed in zip(Inputs._fields, inputs, needed, strict=True):
        grad = grads.get(name) if is_needed else None
        given.append(grad if grad is not None and value is not None and grad.shape == value.shape else None)
    return (*given, *[None] * (len(ctx.needs_input_grad) - _SPLIT))


loss_operator.register_autograd(_backward, setup_context=_setup_context)


class InplaceLoss(torch.autograd.Function):
    """`xtoken::loss` for dense logits that are given up: their gradient overwrites them. Not for torch.compile."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
        ctx.grad = student.detach()
        return _loss(inputs._replace(student=ctx.grad), settings, True, False, None, None, inplace=True).loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("inplace: the gradient has overwritten the logits and is used up; backward works once")
        if torch.is_grad_enabled():
            return _OnceOnly.apply(grad.mul_(upstream.detach()).requires_grad_()), None, None
        return _scaled(grad, upstream), None, None


class Expected(NamedTuple):
    """Labels of a call, or none, with what its results will be multiplied by: float32 [], the first not 0.

    Forward prepares the gradient with these factors (not in float16); where they come true, backward has nothing left
    to do.
    """

    labels: Tensor | None
    loss: Tensor
    cross_entropy: Tensor


def run(
    inputs: Inputs, settings: Settings, inplace: bool = False, expected: Expected | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and cross-entropy (0 without labels), connected to the inputs that need a gradient."""
    leaves = [inputs.student, inputs.student_head, inputs.student_bias]
    student_wanted = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if inplace and student_wanted:
        return InplaceLoss.apply(inputs.student, inputs, settings), inputs.student.new_zeros(())
    weight_wanted = (
        settings.operation == "pkl"  # the others look at the weights only to choose pairs
        and torch.is_grad_enabled()
        and inputs.weight is not None
        and inputs.weight.requires_grad
    )
    # Forward prepares the gradient where backward can only scale it: not if every chunk has an upstream gradient of
    # its own, and not if gradients of the loss and of the cross-entropy are already mixed in those of a head.
    prepare = settings.reduction != "none" and (inputs.labels is None or inputs.student_head is None)
    # float16 would lose small gradients: a scaler's factor, which is to prevent that, comes in backward only.
    is_wide = inputs.student.dtype != torch.float16
    factors = expected[1:] if expected is not None and prepare and is_wide else (None, None)
    flags = student_wanted and prepare, weight_wanted and prepare, *factors
    result = torch.ops.xtoken.loss(*inputs, *settings, *flags)
    return result[0], result[1]
