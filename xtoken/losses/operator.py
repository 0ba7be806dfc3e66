"""One torch operator a loss, made of its fields: `xtoken::<name>`, with its fake kernel and its autograd formula.

An operator takes tensors and scalars only: those of `Call`, which every loss has, and the loss's own. Everything that
depends on the values in tensors (which chunks have a predictor, which columns are largest) happens inside it, so that a
step compiles into one graph.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from xtoken.alignment import Alignment
from xtoken.alignment.chunks import Chunks, to_device
from xtoken.losses import gradient_memory
from xtoken.losses.backends import IGNORED, Labels, Prepared, Problem, checked_ids, select
from xtoken.losses.logits import DenseSource, LinearSource, Parts, Source, autocasts, row_blocks
from xtoken.losses.loss import REGISTER, Loss, Matrix, Needs
from xtoken.losses.numerics import statistics_dtype, temporary_elements


class Call(NamedTuple):
    """What a call of any loss is made of.

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
    spans: Tensor | None  # int32 [K, 4]; None: every position is a chunk, the same on both sides
    offsets: Tensor | None  # int64 [B + 1]
    predicted: Tensor | None  # bool [K], or [B, T] without spans
    student_ids: Tensor | None  # int64 [B, T], for losses that need the realised tokens
    teacher_ids: Tensor | None
    flat: Tensor | None  # int64 [n]: the alignment in one tensor on the device, if it is there; the others are not
    mask: Tensor | None  # bool [K]: those of the `predicted` chunks that count, where only the device knows
    labels: Tensor | None  # int64 [B, T], at the tokens' own positions
    student_size: int
    teacher_size: int
    tail: str
    student_scale: float  # of hidden states with their output layer, see `LinearLogits`
    student_softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    reduction: str
    backend: str

    @classmethod
    def of(
        cls,
        loss: Loss,
        student: Parts,
        teacher: Parts,
        alignment: Alignment | None,
        *,
        sizes: tuple[int, int],
        mask: Tensor | None,
        labels: Tensor | None,
        reduction: str,
        backend: str,
    ) -> Call:
        """Of logits [B, T, ...] and what a loss needs of an alignment, or the mask of positions."""
        host = None if alignment is None else alignment.host
        ids = (host.student_ids, host.teacher_ids) if host is not None and loss.realised else (None, None)
        student_ids, teacher_ids = (one if one is None or one.dim() == 2 else one[None] for one in ids)
        return cls(
            student=student.rows, student_head=student.head, student_bias=student.bias,
            teacher=teacher.rows, teacher_head=teacher.head, teacher_bias=teacher.bias, teacher_top=teacher.top,
            spans=None if host is None else host.spans,
            offsets=None if host is None else host.offsets,
            predicted=mask if host is None else host.predicted,
            student_ids=student_ids, teacher_ids=teacher_ids,
            flat=None if alignment is None else alignment._flat,
            mask=None if alignment is None else alignment.mask,
            labels=labels, student_size=sizes[0], teacher_size=sizes[1], tail=teacher.tail,
            student_scale=student.scale, student_softcap=student.softcap,
            teacher_scale=teacher.scale, teacher_softcap=teacher.softcap,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    def chunks(self, realised: bool) -> Chunks:
        """The chunks of the alignment, or without one the positions."""
        if self.spans is None:
            rows = self.student.shape[0] * self.student.shape[1]
            return Chunks.of_positions(rows, self.predicted, self.student.device)
        alignment = Alignment._trusted(
            spans=self.spans,
            offsets=self.offsets,
            batched=True,
            _ids={"student": self.student_ids, "teacher": self.teacher_ids},
            predicted=self.predicted,
            _flat=self.flat,
        )
        lengths = self.student.shape[1], self.teacher.shape[1]
        chunks = Chunks.of(alignment, *lengths, self.student.device, realised)
        return chunks if self.mask is None else chunks.masked(self.mask)

    def parts(self) -> tuple[Parts, Parts]:
        """The logits of both sides."""
        head, bias, scale, softcap = self.student_head, self.student_bias, self.student_scale, self.student_softcap
        student = Parts(self.student, head, bias, scale=scale, softcap=softcap)
        head, bias, scale, softcap = self.teacher_head, self.teacher_bias, self.teacher_scale, self.teacher_softcap
        return student, Parts(self.teacher, head, bias, self.teacher_top, self.tail, scale, softcap)


class Result(NamedTuple):
    """Loss and cross-entropy, reduced; gradients of the fields of `Call` and of W's weights, empty where unwanted.

    `lifted` is float32 []: what the gradients are multiplied by, see `_is_lifted`; empty if nothing.
    """

    loss: Tensor
    cross_entropy: Tensor
    student: Tensor
    student_head: Tensor
    student_bias: Tensor
    weight: Tensor
    lifted: Tensor


class Flags(NamedTuple):
    """Which gradients are wanted, and the upstream gradients of loss and cross-entropy (default: 1)."""

    student_wanted: bool
    head_wanted: bool  # with the student's, those of its output layer
    weight_wanted: bool
    upstream: Tensor | None
    label_upstream: Tensor | None


_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "str": "str", "float": "float", "bool": "bool", "int": "SymInt",
    "int | None": "SymInt?",
}  # fmt: skip
_MATRIX = {"row_ptr": "Tensor", "col": "Tensor", "weight": "Tensor", "kind": "Tensor | None"}
_WEIGHT = "W_weight"
_OF_A_TEACHER = "projection", "loss", "weight", "trust_top_k"
"""What a `Teacher` takes beside options of a loss."""
_L = TypeVar("_L", bound=type[Loss])


class _Layout:
    """Where the fields of a loss are among the arguments of its operator."""

    def __init__(self, loss: type[Loss]) -> None:
        if not issubclass(loss, Loss) or "__dataclass_fields__" not in vars(loss):
            raise TypeError(f"loss: expected a dataclass of xtoken.losses.Loss under @register, got {loss!r}")
        self.loss = loss
        kinds = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(loss)}
        self.fields = [(name, kind == "Matrix") for name, kind in kinds.items()]
        of_matrices = {f"{name}_{part}" for name, is_matrix in self.fields if is_matrix for part in _MATRIX}
        if taken := kinds.keys() & {*Call._fields, *Flags._fields, *dir(Loss), *Loss.__annotations__, *_OF_A_TEACHER}:
            raise TypeError(f"{loss.__name__}.{min(taken)}: expected another name, this one is every loss's")
        if taken := kinds.keys() & of_matrices:
            raise TypeError(f"{loss.__name__}.{min(taken)}: expected another name, this one is a part of its matrix")
        self.switches = tuple(name for name, kind in kinds.items() if kind == "bool")
        own: dict[str, str] = {}
        for name, kind in kinds.items():
            if kind == "Matrix":
                own.update({f"{name}_{part}": of for part, of in _MATRIX.items()})
            elif kind in _TYPES:
                own[name] = kind
            else:
                raise TypeError(f"{loss.__name__}.{name}: expected one of {['Matrix', *_TYPES]}, got {kind}")
        arguments = {name: str(kind) for part in (Call, Flags) for name, kind in _annotations(part).items()}
        flags = {name: arguments.pop(name) for name in Flags._fields}
        self.names = [*arguments, *own]
        wanted = ("student", "student_head", "student_bias", _WEIGHT)
        self.places = {name: self.names.index(name) for name in wanted if name in self.names}
        """Of the arguments that get a gradient."""
        self.schema = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in {**arguments, **own, **flags}.items())

    def flat(self, loss: Loss) -> list[Any]:
        """The fields as the operator takes them."""
        values: list[Any] = []
        for name, is_matrix in self.fields:
            value = getattr(loss, name)
            values += [getattr(value, part) for part in _MATRIX] if is_matrix else [value]
        return values

    def parts(self, arguments: tuple[Any, ...]) -> tuple[Call, Loss, Flags]:
        """The arguments of the operator, put together again."""
        first, last = len(Call._fields), len(arguments) - len(Flags._fields)
        call, values = Call(*arguments[:first]), iter(arguments[first:last])
        shape = call.student_size, call.teacher_size
        made = {
            name: Matrix(**{part: next(values) for part in _MATRIX}, shape=shape) if is_matrix else next(values)
            for name, is_matrix in self.fields
        }
        return call, self.loss(**made), Flags(*arguments[last:])


def _annotations(kind: Any) -> dict[str, str]:
    return {name: getattr(value, "__forward_arg__", value) for name, value in kind.__annotations__.items()}


OPERATORS: dict[str, Any] = {}
"""The operator of each loss, by the loss's name."""

_RECORDED: dict[str, Any] = {}
"""The same as functions of autograd: an operator's own way there, and to its kernel, takes longer than the loss."""

_LAYOUTS: dict[str, _Layout] = {}


def register(name: str, title: str, needs: Needs, kernels: str | None = None) -> Callable[[_L], _L]:
    """Registers a frozen dataclass as a loss: everything that reads the register knows it from then on.

    Parameters
    ----------
    name : str
        Of the loss in `Teacher` and on the command line, and of its operator.
    title : str
        As people write it.
    needs : Needs
    kernels : str, optional
        The package with the modules of its kernels. Default: the loss's own.

    Raises
    ------
    ValueError
        If there is a loss or an operator of that name.
    TypeError
        If the class is no dataclass of `Loss`, lacks the field of what it needs, or has a field whose name or type no
        operator takes.
    """

    def decorate(loss: _L) -> _L:
        is_taken = name in (*REGISTER, "auto") or hasattr(torch.ops.xtoken, name)
        if is_taken or not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"name: expected an identifier that no loss or operator has yet, got {name!r}")
        layout = _Layout(loss)
        need = Needs(needs)
        field = {Needs.PROJECTION: "W", Needs.PIECES: "pieces"}.get(need)
        if field is not None and field not in dict(layout.fields):
            raise TypeError(f"{loss.__name__}: expected a field {field!r}, since it needs {need.value}")
        loss.name, loss.title, loss.needs, loss.kernels = name, title, need, kernels or loss.__module__
        loss.switches = layout.switches
        _define(name, layout)
        REGISTER[name] = loss
        return loss

    return decorate


def _define(name: str, layout: _Layout) -> None:
    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        call, loss, flags = layout.parts(arguments)
        kind = call.student.device.type
        with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():  # types are as given
            return tuple(_compute(loss, call, flags))

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        first, last = len(Call._fields), len(arguments) - len(Flags._fields)
        given = dict(zip(layout.names, arguments, strict=False))
        return _fake(Call(*arguments[:first]), given.get(_WEIGHT), Flags(*arguments[last:]))

    schema = f"({layout.schema}) -> ({', '.join(['Tensor'] * len(Result._fields))})"
    operator = torch.library.custom_op(f"xtoken::{name}", kernel, mutates_args=(), schema=schema)
    backward = partial(_backward, name, layout)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=_setup_context)

    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = (operator if _is_watched(arguments) else kernel)(*arguments)
        _setup_context(ctx, arguments, results)
        return results[:2]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    OPERATORS[name], _LAYOUTS[name] = operator, layout
    _RECORDED[name] = type(f"xtoken_{name}", (torch.autograd.Function,), methods)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, bool, str}


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a mode, or a kind of tensors, is to see the operator and not what it does."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or not _PLAIN.issuperset(map(type, arguments))


def _compute(loss: Loss, call: Call, flags: Flags, inplace: bool = False) -> Result:
    """The loss of a call, and the gradients that are wanted."""
    leaves, others = call.parts()
    student, teacher = leaves.source(call.student_size), others.source(call.teacher_size)
    loss.check_tables()
    loss.check()
    prepared = loss.prepare(call, student, teacher)
    chunks = prepared.chunks
    trained = loss.trained if flags.weight_wanted else None
    weight = None if trained is None else trained.detach().to(call.student.device)
    upstream, label_upstream = flags.upstream, flags.label_upstream
    lifted = call.student.new_empty(0, dtype=torch.float32)
    if upstream is None and _is_lifted(call):
        upstream = label_upstream = lifted = _power_of_two(chunks.number, call.student.device)
    scale = chunk_scale(chunks, call.reduction, upstream, call.student)
    labels, number = _labels(call.labels, call.student, call.student_size, call.reduction, label_upstream)
    grads = Gradients(leaves, weight, flags, inplace)
    losses = computed(loss.name, (student, teacher), prepared, weight, call.backend, grads, scale, labels)
    head_grad, bias_grad = grads.in_types()
    count = call.predicted.numel() if call.predicted is not None else call.student.shape[:2].numel()
    return Result(
        _reduce(losses, chunks, count, call.reduction),
        losses.new_zeros(()) if labels is None else _reduced_labels(labels, number),
        grads.student,
        head_grad,
        bias_grad,
        call.student.new_empty(0) if grads.weight is None or trained is None else grads.weight.to(trained.device),
        lifted,
    )


def _is_lifted(call: Call) -> bool:
    """Whether the gradient that forward prepares is multiplied by (nearly) the number of chunks, which backward undoes.

    Float16 would lose small gradients of a mean: a loss scaler's factor, which is to prevent that, comes in backward.
    """
    return call.student.dtype == torch.float16 and call.reduction == "mean"


def _power_of_two(number: int | Tensor, device: torch.device) -> Tensor:
    """float32 []: the largest power of two up to a number, so that nothing is rounded again; 1 for 0."""
    count = torch.full((), number, device=device) if isinstance(number, int) else number
    return count.clamp_min(1).float().log2().floor().exp2()


def computed(
    name: str,
    sources: tuple[Source, Source],
    prepared: Prepared,
    weight: Tensor | None,
    backend: str,
    grads: Gradients | None,
    scale: Tensor | None,
    labels: Labels | None,
) -> Tensor:
    """The losses [K], by a backend; `grads`, if there are any, and `labels` get what comes with them."""
    student, parts = sources[0], []
    for problem, span, rows in _problems(name, *sources, prepared, weight):
        part = labels if labels is None or rows == slice(None) else labels.part(rows)
        logits_grad = None if grads is None else grads.logits(problem, rows)
        weight_grad = None if grads is None else grads.weight
        own_scale = scale if scale is None or span == slice(None) else scale[span]
        chosen = select(backend, problem.student.device, name, problem)
        parts.append(chosen.run(problem, logits_grad, weight_grad, own_scale, part))
        if grads is not None and logits_grad is not None and isinstance(student, LinearSource):
            grads.add(student, logits_grad[0], problem.student[0], rows)
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _problems(
    name: str, student: Source, teacher: Source, prepared: Prepared, weight: Tensor | None
) -> Iterator[tuple[Problem[Any], slice, slice]]:
    """One problem if all logits are in memory, else one for each block of rows: (problem, chunks, student rows)."""
    if isinstance(student, DenseSource) and isinstance(teacher, DenseSource):
        problem = Problem(name, student.logits, teacher.logits, prepared.chunks, prepared.options, weight)
        yield problem, slice(None), slice(None)
        return
    for block in row_blocks(student, teacher, prepared.chunks):
        z, y = block.rows(student, teacher)
        yield Problem(name, z[None], y[None], block.chunks, prepared.options, weight), block.span, block.student


class Gradients:
    """Buffers of the gradients that are wanted; an operator's results must not share memory."""

    def __init__(self, leaves: Parts, weight: Tensor | None, flags: Flags, inplace: bool) -> None:
        self.leaves, self.wanted, self.head_wanted = leaves, flags.student_wanted, flags.head_wanted
        self.student, self.head, self.bias = (leaves.rows.new_empty(0) for _ in range(3))
        if self.wanted:
            self.student = leaves.rows if inplace else gradient_memory.empty_like(leaves.rows)
        if self.head_wanted:
            self.head, self.bias = (
                empty if of is None else torch.zeros_like(of, dtype=statistics_dtype(of))
                for of, empty in ((leaves.head, self.head), (leaves.bias, self.bias))
            )
        self.weight = None if weight is None else torch.zeros_like(weight)

    def logits(self, problem: Problem[Any], rows: slice) -> Tensor | None:
        """Where the gradient of the logits of these rows goes: [B, T, >= V]."""
        if not self.wanted:
            return None
        if self.leaves.head is not None:
            return torch.empty_like(problem.student)
        if rows == slice(None):
            return self.student
        return self.student.flatten(0, 1)[rows][None]

    def add(self, source: Source, grad: Tensor, logits: Tensor, rows: slice | Tensor) -> None:
        """Takes the gradient [R, V] of logits to what they are made of: all there is of a range of rows, or more of
        single ones int64 [R], onto what they have already."""
        into, size = self.student.flatten(0, 1), grad.shape[1]
        if not isinstance(source, LinearSource):
            if isinstance(rows, slice):
                into[rows, :size], into[rows, size:] = grad[:, : into.shape[1]], 0
            else:
                into[:, :size].index_add_(0, rows, grad[:, : into.shape[1]])
            return
        grad, head = source.of_product(grad, logits), self.leaves.head
        assert head is not None
        size = grad.shape[1]
        if isinstance(rows, slice):
            torch.mm(grad, head[:size], out=into[rows])
        else:
            into.index_add_(0, rows, grad @ head[:size])
        if self.head_wanted:
            self._add_head(grad, self.leaves.rows.flatten(0, 1)[rows])

    def _add_head(self, grad: Tensor, hidden: Tensor) -> None:
        size = grad.shape[1]
        if self.head.dtype == grad.dtype:
            self.head[:size].addmm_(grad.t(), hidden)
        else:  # a sum of many blocks in 16 bits would lose the small ones
            step = max(1, temporary_elements(grad.device) // hidden.shape[1])
            for start in range(0, size, step):
                part = slice(start, min(start + step, size))
                self.head[part] += grad[:, part].t() @ hidden
        if self.leaves.bias is not None:
            self.bias[:size] += grad.sum(0, dtype=self.bias.dtype)

    def in_types(self) -> tuple[Tensor, Tensor]:
        """Those of output layer and bias, in the types of these."""
        head, bias = self.leaves.head, self.leaves.bias
        return (
            self.head if head is None else self.head.to(head.dtype),
            self.bias if bias is None else self.bias.to(bias.dtype),
        )


def chunk_scale(chunks: Chunks, reduction: str, upstream: Tensor | None, student: Tensor) -> Tensor | None:
    if reduction == "none":
        return None if upstream is None else upstream.flatten()[chunks.used]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    scale = torch.ones(len(chunks), dtype=dtype, device=student.device)
    if reduction == "mean":
        scale = scale / never_zero(chunks.number)
    return scale if upstream is None else scale * upstream


def _labels(
    labels: Tensor | None, student: Tensor, size: int, reduction: str, upstream: Tensor | None
) -> tuple[Labels | None, Tensor | None]:
    """Labels for a backend, and what a mean divides by."""
    if labels is None:
        return None, None
    following = to_device(checked_ids(labels, size), student.device)
    scale = torch.ones((), dtype=torch.float64, device=student.device) if upstream is None else upstream.double()
    number = (following != IGNORED).sum().clamp_min(1) if reduction == "mean" else None
    losses = torch.empty(len(following), dtype=statistics_dtype(student), device=student.device)
    return Labels(following, losses, scale if number is None else scale / number), number


def _reduced_labels(labels: Labels, number: Tensor | None) -> Tensor:
    total = labels.losses.sum(dtype=torch.float64)
    return (total if number is None else total / number).to(labels.losses.dtype)


def _reduce(losses: Tensor, chunks: Chunks, total: int, reduction: str) -> Tensor:
    """``"mean"`` over the chunks used, ``"sum"``, or ``"none"``: [total], zero where a chunk was not used."""
    if reduction == "none":
        return losses.new_zeros(total).index_copy(0, chunks.used, losses)
    loss = losses.sum(dtype=torch.float64)
    return (loss / never_zero(chunks.number) if reduction == "mean" else loss).to(losses.dtype)


def never_zero(number: int | Tensor) -> int | Tensor:
    """A divisor, which may be counted on a device: 0 counts as 1, where the sum that it divides is 0."""
    return number + (number == 0) if isinstance(number, Tensor) else number or 1


def _fake(call: Call, weight: Tensor | None, flags: Flags) -> tuple[Tensor, ...]:
    student = call.student
    dtype = statistics_dtype(student, call.teacher)
    shape: tuple[Any, ...] = ()
    if call.reduction == "none":
        shape = (call.spans.shape[0] if call.spans is not None else student.shape[0] * student.shape[1],)

    def like(value: Tensor | None, wanted: bool) -> Tensor:
        return student.new_empty(0) if value is None or not wanted else value.new_empty(value.shape)

    labels_dtype = dtype if call.labels is None else statistics_dtype(student)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((), dtype=labels_dtype),
        like(student, flags.student_wanted),
        like(call.student_head, flags.head_wanted),
        like(call.student_bias, flags.head_wanted),
        like(weight, flags.weight_wanted),
        student.new_empty(() if flags.upstream is None and _is_lifted(call) else 0, dtype=torch.float32),
    )


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor`` for a scalar ``factor``, in place; a tracer gets a new tensor, and fuses the product."""
    if type(grad) is not Tensor:
        return grad * factor
    if grad.numel() == 0:
        return grad
    if grad.device.type != "cpu":
        select("auto", grad.device).scale(grad, factor.to(grad.device))
    elif float(factor) != 1.0:
        grad.mul_(factor)
    return grad


def _add_cross_entropy(
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
    wanted, _ = _labels(labels, student, size, reduction, factor)
    if wanted is not None:
        select(backend, student.device).cross_entropy(student[..., :size], wanted, grad, scale)


add_cross_entropy_ = torch.library.custom_op(
    "xtoken::add_cross_entropy_",
    _add_cross_entropy,
    mutates_args=("grad",),
    # torch 2.4 cannot read it off annotations that are strings.
    schema="(Tensor(a!) grad, Tensor student, Tensor labels, Tensor scale, Tensor factor, SymInt size, str reduction,"
    " str backend) -> ()",
)


class _OnceOnly(torch.autograd.Function):
    """The first argument, as a function of all of them that has no derivative: an error, where torch would take 0."""

    @staticmethod
    def forward(grad: Tensor, *origins: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "xtoken losses have no second derivative: the gradient is computed in forward; "
            "differentiate the formulas in xtoken.reference instead"
        )


def once_only(grad: Tensor, *origins: Any) -> Tensor:
    """A gradient that raises an error where it is differentiated by what it came from."""
    found: Tensor = _OnceOnly.apply(grad, *(x for x in origins if isinstance(x, Tensor) and x.requires_grad))
    return found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # torch would make zeros of the size of every gradient
    # Tensors made in inference mode, as a teacher's logits often are, cannot be saved; they never need a gradient.
    saved = [x if isinstance(x, Tensor) and not x.is_inference() else None for x in inputs]
    ctx.save_for_backward(*saved)
    ctx.others = [x if one is None else None for x, one in zip(inputs, saved, strict=True)]
    ctx.forms = tuple((one.shape, one.dtype) for one in output[:2])
    flags = Flags(*inputs[-len(Flags._fields) :])
    # Buffers to scale and give away once. They are no outputs that anybody sees, so no saved-tensor hook needs them.
    is_prepared = flags.student_wanted or flags.weight_wanted
    ctx.prepared = tuple(grad.detach() for grad in output[2:-1]) if is_prepared else None
    ctx.lifted = output[-1].detach() if output[-1].numel() else None


def _rounding(label_upstream: Tensor) -> float:
    """How far a factor may be from what was expected: both came here by a few operations, in different orders. The
    cross-entropy's type is the student's, and so never wider than the loss's."""
    return 8 * torch.finfo(label_upstream.dtype).eps


def _common_factor(upstream: Tensor, label_upstream: Tensor, expected: Tensor, label_expected: Tensor) -> Tensor:
    """The factor of a prepared gradient that is the sum of the loss's and the cross-entropy's; nan if these come with
    different ones."""
    dtype, rounding = upstream.dtype, _rounding(label_upstream)
    expected, label_expected = expected.to(dtype), label_expected.to(dtype)
    is_first = expected.abs() >= label_expected.abs()
    factor = torch.where(is_first, upstream / expected, label_upstream / label_expected)
    factor = torch.where((factor - 1).abs() <= rounding, 1.0, factor)
    factor = torch.where((expected == 0) & (label_expected == 0), 0.0, factor)
    off = (upstream - factor * expected).abs(), (label_upstream - factor * label_expected).abs()
    is_common = (off[0] <= rounding * upstream.abs()) & (off[1] <= rounding * label_upstream.abs())
    return torch.where(is_common, factor, torch.nan)


def _remaining(
    upstream: Tensor, label_upstream: Tensor, expected: Tensor | None, label_expected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What backward has left to do: the factor of the prepared gradient, and that of the cross-entropy it lacks."""
    if expected is None or label_expected is None:
        return upstream, label_upstream - upstream
    rounding = _rounding(label_upstream)
    factor = upstream / expected.to(upstream.dtype)
    factor = torch.where((factor - 1).abs() <= rounding, 1.0, factor)
    lacking = label_upstream - label_expected * factor
    return factor, torch.where(lacking.abs() <= rounding * label_upstream.abs(), 0.0, lacking)


def _backward(
    name: str, layout: _Layout, ctx: Any, upstream: Tensor | None, label_upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's arguments."""
    arguments = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    count = len(layout.names)
    call, expected = Call(*arguments[: len(Call._fields)]), Flags(*arguments[count:])
    upstreams = zip((upstream, label_upstream), ctx.forms, strict=True)
    upstream, label_upstream = (
        call.student.new_zeros(shape, dtype=dtype) if one is None else one for one, (shape, dtype) in upstreams
    )
    needed = {argument: ctx.needs_input_grad[place] for argument, place in layout.places.items()}
    head_wanted = needed["student_head"] or needed["student_bias"]
    student_wanted = needed["student"] or head_wanted
    prepared, ctx.prepared = ctx.prepared, None
    with torch.no_grad():
        if prepared is None:
            weight_wanted = layout.loss.trains_projection and needed[_WEIGHT]
            flags = Flags(student_wanted, head_wanted, weight_wanted, upstream, label_upstream)
            prepared = getattr(torch.ops.xtoken, name)(*arguments[:count], *flags)[2:-1]
        else:
            factors = (expected.upstream, expected.label_upstream) if ctx.lifted is None else (ctx.lifted,) * 2
            if _is_mixed(call):
                factor, lacking = _common_factor(upstream, label_upstream, *factors), None
            else:
                factor, lacking = _remaining(upstream, label_upstream, *factors)
            if lacking is not None and call.labels is not None and student_wanted:
                is_traced = type(prepared[0]) is not Tensor
                (add_cross_entropy_ if is_traced else _add_cross_entropy)(
                    prepared[0], call.student, call.labels, factor, lacking, call.student_size, call.reduction,
                    call.backend,
                )  # fmt: skip
                prepared = prepared[0], *(_scaled(grad, factor) for grad in prepared[1:])
            else:
                prepared = tuple(_scaled(grad, factor) for grad in prepared)
    given: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for (argument, place), grad in zip(layout.places.items(), prepared, strict=False):
        if needed[argument] and grad.shape == arguments[place].shape:
            given[place] = once_only(grad, *arguments, upstream, label_upstream) if torch.is_grad_enabled() else grad
    return tuple(given)


class InplaceLoss(torch.autograd.Function):
    """A loss of dense logits that are given up: their gradient overwrites them. Not for torch.compile."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Loss, call: Call) -> Tensor:
        ctx.student, ctx.grad = student, student.detach()
        flags = Flags(True, False, False, None, None)
        result = _compute(loss, call._replace(student=ctx.grad), flags, inplace=True)
        torch.autograd.graph.increment_version(student)  # so that what needs the values in backward notices
        ctx.lifted = result.lifted if result.lifted.numel() else None
        return result.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("inplace: the gradient has overwritten the logits and is used up; backward works once")
        if ctx.lifted is not None:
            upstream = upstream / ctx.lifted
        if torch.is_grad_enabled():
            return once_only(grad.mul_(upstream.detach()), ctx.student, upstream), None, None
        return _scaled(grad, upstream), None, None


class Expected(NamedTuple):
    """What the results of a call will be multiplied by: float64 [].

    Forward prepares the gradient with these factors (not in float16); where they come true, backward has nothing left
    to do. With labels and an output layer it can only multiply both by the same, and anything else makes it nan.
    """

    loss: Tensor
    cross_entropy: Tensor


def _is_mixed(call: Call) -> bool:
    """Whether one gradient has the loss's and the cross-entropy's, which nothing can tell apart: that of a head."""
    return call.labels is not None and call.student_head is not None


def check_transformed(value: Tensor, name: str) -> None:
    """Raises RuntimeError if `torch.func` is to differentiate by a tensor."""
    of = torch._C._functorch
    while torch.is_grad_enabled() and of.is_functorch_wrapped_tensor(value):
        if of.is_gradtrackingtensor(value) and value.requires_grad:
            raise RuntimeError(
                f"{name}: xtoken losses have no derivative by torch.func (grad, vjp, jacrev, ...), got a tensor of "
                "it; use backward or torch.autograd.grad, or differentiate the formulas in xtoken.reference"
            )
        value = of.get_unwrapped(value)


def run(loss: Loss, call: Call, inplace: bool = False, expected: Expected | None = None) -> tuple[Tensor, Tensor]:
    """Loss and cross-entropy (0 without labels), connected to the inputs that need a gradient."""
    leaves = [call.student, call.student_head, call.student_bias]
    student_wanted = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    arguments = [*call, *_LAYOUTS[loss.name].flat(loss)]
    is_eager = not torch.compiler.is_compiling()
    is_transformed = is_eager and torch._C._are_functorch_transforms_active()
    for name, value in zip(_LAYOUTS[loss.name].names, arguments, strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.is_meta and not call.student.is_meta:
            # For one such tensor torch would call no kernel, and return what happens to be in memory.
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
        if is_eager and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f"{name}: xtoken losses have no derivative in forward mode, got a tensor with a tangent")
        if is_transformed:
            check_transformed(value, name)
    if inplace and student_wanted:
        return InplaceLoss.apply(call.student, loss, call), call.student.new_zeros(())
    trained = loss.trained
    weight_wanted = torch.is_grad_enabled() and trained is not None and trained.requires_grad
    # Forward prepares the gradient where backward can only scale it: not if every chunk has an upstream gradient of
    # its own, and not if gradients of the loss and of the cross-entropy are mixed with factors that are not known.
    # float16 would lose small gradients: a scaler's factor, which is to prevent that, comes in backward only.
    factors = expected if call.student.dtype != torch.float16 else None
    prepare = call.reduction != "none" and (factors is not None or not _is_mixed(call))
    if factors is not None and not _is_mixed(call):
        factors = Expected(torch.where(factors.loss == 0, 1.0, factors.loss), factors.cross_entropy)  # it is divided by
    head_wanted = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves[1:])
    flags = Flags(
        student_wanted and prepare, head_wanted and prepare, weight_wanted and prepare,
        *((None, None) if factors is None or not prepare else factors),
    )  # fmt: skip
    is_recorded = is_eager and not is_transformed and (student_wanted or weight_wanted)
    operator = _RECORDED[loss.name].apply if is_recorded else getattr(torch.ops.xtoken, loss.name)
    result = operator(*arguments, *flags)
    return result[0], result[1]
