"""Backends: who computes a loss. A table of operations with one signature, and the rule that picks one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from xtoken.alignment import Chunks
from xtoken.projection import column_set
from xtoken.reference import LOWEST_LOGIT

IGNORED = -100
"""Label of a token that no loss looks at, as in PyTorch and transformers."""

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that the reference backend works on at a time, by device type; its temporaries are of that size."""


class Options(Protocol):
    """Everything about one call of a loss that is not a logit, a weight or a chunk; a frozen dataclass."""

    operation: ClassVar[str]

    def reference(self, student: Tensor, teacher: Tensor, chunks: Chunks, weight: Tensor | None) -> Tensor:
        """The loss of each chunk [K] by `xtoken.reference`; logits are matrices of rows."""
        ...


@dataclass(frozen=True)
class Problem:
    """One call of a loss.

    Parameters
    ----------
    student : [B, T_s, V_student]
        Vocabulary columns only; any strides. Row ``r`` of `chunks` is ``student[r // T_s, r % T_s]``.
    teacher : [B, T_t, V_teacher]
    chunks : Chunks
    options : Options
    weight : [nnz], optional
        The weights of W, if they need a gradient (P-KL).
    """

    student: Tensor
    teacher: Tensor
    chunks: Chunks
    options: Options
    weight: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the losses: the widest type of the logits, at least float32."""
        return torch.promote_types(torch.promote_types(self.student.dtype, self.teacher.dtype), torch.float32)


@dataclass(frozen=True)
class Labels:
    """The student's next-token cross-entropy, wanted from the same call.

    Parameters
    ----------
    ids : int64 [B * T_s]
        The token that each row should predict, -100 where none.
    losses : [B * T_s]
        Receives the cross-entropy of each row (temperature 1, vocabulary columns only), 0 where there is no label.
    scale : float64 []
        On the device of `ids`. Factor of the gradient ``softmax(z) - onehot(label)`` of each labelled row.
    """

    ids: Tensor
    losses: Tensor
    scale: Tensor


class Operation(Protocol):
    """Computes the loss of every chunk and, into buffers of the caller, gradients.

    Parameters
    ----------
    problem : Problem
    student_grad : [B, T_s, >= V_student], contiguous, in the student's type, uninitialised, optional
        Every element is written: ``sum_k scale_k d loss_k / d student``, and zero elsewhere.
    weight_grad : like ``problem.weight``, optional
        ``sum_k scale_k d loss_k / d weight`` is added.
    scale : [K], optional
        Default: ones.
    labels : Labels, optional
        Only for operations that the backend lists as `fused_labels`: also the cross-entropy, its gradient
        added to ``student_grad``.

    Returns
    -------
    Tensor
        [K], in ``problem.dtype``.
    """

    def __call__(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        labels: Labels | None = None,
    ) -> Tensor: ...


class CrossEntropy(Protocol):
    """Cross-entropy of each row: fills ``labels.losses``, and adds its gradient to `factor` (default: 1) times what
    ``student_grad``, if given, holds; its columns beyond the vocabulary are zeros."""

    def __call__(
        self, student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
    ) -> None: ...


def run_cross_entropy(
    student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
) -> None:
    """Cross-entropy in plain PyTorch, block by block; see `CrossEntropy`."""
    if student_grad is not None and factor is not None:
        student_grad.mul_(factor)
    rows = labels.ids.numel()
    labels.losses.zero_()
    labelled = (labels.ids != IGNORED).nonzero()[:, 0]
    length = student.shape[1]
    step = max(1, BLOCK_ELEMENTS.get(student.device.type, BLOCK_ELEMENTS["cpu"]) // max(1, student.shape[2]))
    flat = None if student_grad is None else student_grad.view(rows, -1)[:, : student.shape[2]]
    for index in labelled.split(step):
        logits = student[index // length, index % length].to(labels.losses.dtype).clamp_min_(LOWEST_LOGIT)
        label = labels.ids[index, None]
        log_p = logits.log_softmax(-1)
        labels.losses[index] = -log_p.gather(1, label)[:, 0]
        if flat is not None:
            grad = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=log_p.dtype)).mul_(labels.scale)
            flat[index] = (flat[index] + grad).to(flat.dtype)


SCALE: dict[str, Callable[[Tensor, Tensor], object]] = {}
"""How to multiply a contiguous tensor by a scalar tensor in place, by type of device; where there is a better way than
`Tensor.mul_`, which reads and writes everything even for a factor of 1."""


def can_do_anything(problem: Problem) -> str | None:
    """The reason of a backend that takes every problem."""
    return None


@dataclass(frozen=True)
class Backend:
    """A named table of operations.

    Parameters
    ----------
    name : str
    operation : callable
        The `Operation` of a loss, None if it has none.
    missing : callable
        Why it cannot work on a device, or None if it can.
    unsupported : callable
        Why it cannot take a problem on such a device (a type of logits, say), or None if it can.
    cross_entropy : CrossEntropy
        For operations without labels of their own.
    column_set : callable
        `xtoken.reference.column_set` for logits of any type.
    fused_labels : set of operations that take `Labels`
    masked : set of operations that take chunks with a mask (see `Chunks`); the others wait for the device for it
    """

    name: str
    operation: Callable[[str], Operation | None]
    missing: Callable[[torch.device], str | None]
    unsupported: Callable[[Problem], str | None] = can_do_anything
    cross_entropy: CrossEntropy = run_cross_entropy
    column_set: Callable[[Tensor, int | None], Tensor] = column_set
    fused_labels: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()

    def run(
        self,
        problem: Problem,
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """The operation of the problem, with labels whether or not it has them fused."""
        if problem.chunks.mask is not None and problem.options.operation not in self.masked:
            chunks, kept = problem.chunks.kept()
            part = None if scale is None else scale[kept]
            few = self.run(replace(problem, chunks=chunks), student_grad, weight_grad, part, labels)
            return few.new_zeros(len(problem.chunks)).index_copy_(0, kept, few)
        operation = self.operation(problem.options.operation)
        assert operation is not None
        if labels is None or problem.options.operation in self.fused_labels:
            return operation(problem, student_grad, weight_grad, scale, labels)
        losses = operation(problem, student_grad, weight_grad, scale)
        self.cross_entropy(problem.student, labels, student_grad)
        return losses


class Block(NamedTuple):
    """Consecutive chunks with copies of their rows, numbered within those copies."""

    span: slice
    chunks: Chunks
    student_index: tuple[Tensor, Tensor]
    student: Tensor
    teacher: Tensor


def blocks(student: Tensor, teacher: Tensor, chunks: Chunks) -> Iterator[Block]:
    """The chunks in groups of about `BLOCK_ELEMENTS` logits; a group holds at least one whole chunk."""
    student_length, teacher_length = student.shape[1], teacher.shape[1]
    cost = chunks.student.count * student.shape[2] + chunks.teacher.count * teacher.shape[2]
    group = (cost.cumsum(0) - 1) // BLOCK_ELEMENTS.get(cost.device.type, BLOCK_ELEMENTS["cpu"])
    sizes = group.unique_consecutive(return_counts=True)[1].tolist()
    start = 0
    for size in sizes:
        stop = start + size
        student_rows, student_row = chunks.student.block(start, stop)
        teacher_rows, teacher_row = chunks.teacher.block(start, stop)
        student_index = student_row // student_length, student_row % student_length
        teacher_index = teacher_row // teacher_length, teacher_row % teacher_length
        yield Block(
            slice(start, stop),
            Chunks(student_rows, teacher_rows, chunks.used[start:stop]),
            student_index,
            student.detach()[student_index],
            teacher.detach()[teacher_index],
        )
        start = stop


_AUTOGRAD_KEYS = [
    key
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutogradOther")
    if (key := getattr(torch._C.DispatchKey, name, None)) is not None
]


@contextmanager
def _autograd_recording(wanted: bool) -> Iterator[None]:
    """Records operations for autograd, also inside an operator, where torch has switched that off."""
    if not wanted:
        with torch.no_grad():
            yield
        return
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def run_reference(
    problem: Problem,
    student_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    scale: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """The formulas of `xtoken.reference`, block by block, each block differentiated at once by autograd."""
    assert not labels
    parts = []
    for block in blocks(problem.student, problem.teacher, problem.chunks):
        weight = problem.weight if problem.weight is None else problem.weight.detach()
        wanted = []
        if student_grad is not None:
            wanted.append(block.student.requires_grad_())
        if weight_grad is not None and weight is not None:
            wanted.append(weight.requires_grad_())
        with _autograd_recording(bool(wanted)):
            losses = problem.options.reference(block.student, block.teacher, block.chunks, weight)
        parts.append(losses.detach())
        if wanted:
            upstream = torch.ones_like(losses) if scale is None else scale[block.span].to(losses.dtype)
            grads = list(torch.autograd.grad(losses, wanted, upstream))
            if student_grad is not None:
                student_grad[..., : problem.student.shape[2]][block.student_index] = grads.pop(0)
            if weight_grad is not None:
                weight_grad += grads.pop(0)
    if student_grad is not None:  # last, so that the gradient may take the place of the logits
        unused = torch.ones(student_grad.shape[:2], dtype=torch.bool, device=student_grad.device)
        unused.view(-1)[problem.chunks.student.index()] = False
        student_grad[unused] = 0
        student_grad[..., problem.student.shape[2] :] = 0
    return torch.cat(parts) if parts else problem.student.new_zeros(0, dtype=problem.dtype)


PACKAGES = {"pkl": "pkl", "gold": "ranked", "uld": "ranked", "kd": "kd", "prefix": "prefix_kl"}


def kernels_of(loss: str, backend: str) -> Any:
    """The module of a loss's folder that calls the kernels of a backend, None if there is none."""
    if loss not in PACKAGES:
        return None
    return importlib.import_module(f"xtoken.losses.{PACKAGES[loss]}.{backend}")


_BACKENDS: dict[str, Backend] = {}
_NOT_BUILT = {
    "cuda": "this build of xtoken has no CUDA kernels",
}


def register_backend(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name. ``"auto"`` prefers those that were added later."""
    if backend.name == "auto":
        raise ValueError("backend: the name 'auto' is reserved")
    _BACKENDS[backend.name] = backend


def unregister_backend(name: str) -> None:
    """Remove a backend."""
    del _BACKENDS[name]


def backend_names() -> tuple[str, ...]:
    """Backends of this build; ``"auto"`` prefers the later ones."""
    return tuple(_BACKENDS)


def backends_with(operation: str) -> tuple[str, ...]:
    """Those of `backend_names` that have the operation."""
    return tuple(name for name in _BACKENDS if _BACKENDS[name].operation(operation) is not None)


def check_backend(requested: str) -> None:
    """``requested`` is "auto" or the name of a backend, built or not."""
    if requested != "auto" and requested not in _BACKENDS and requested not in _NOT_BUILT:
        known = ", ".join(repr(name) for name in dict.fromkeys(["auto", *_BACKENDS, *_NOT_BUILT]))
        raise ValueError(f"backend: expected one of {known}, got {requested!r}")


def select_backend(requested: str, device: torch.device | str, operation: str | None = None) -> str:
    """The name of the backend that computes a loss.

    Parameters
    ----------
    requested : str
        ``"auto"``, or a backend's name.
    device : torch.device
        Where the logits are.
    operation : str, optional
        ``"pkl"``, ``"gold"`` (H-KL too), ``"uld"``, ``"kd"`` or ``"prefix"``; default: any.

    Returns
    -------
    str
        For ``"auto"`` the fastest backend that works on the device, ``"reference"`` if there is no other. (A call
        with logits of a type that this backend does not take uses the next one.)

    Raises
    ------
    ValueError
        If there is no backend of that name at all.
    RuntimeError
        If the backend exists but cannot do this; the message says why.
    """
    return select(requested, torch.device(device), operation).name


def backend_of(requested: str, problem: Problem) -> Backend:
    """The selected backend for a problem.

    Raises
    ------
    ValueError, RuntimeError
        As `select_backend`; RuntimeError also if the requested backend does not take this problem.
    """
    return select(requested, problem.student.device, problem.options.operation, problem)


def select(
    requested: str, device: torch.device, operation: str | None = None, problem: Problem | None = None
) -> Backend:
    """The backend of `select_backend`, or of `backend_of` with a problem."""
    if requested == "auto":
        for name in reversed(_BACKENDS):
            if _reason(name, device, operation, problem) is None:
                return _BACKENDS[name]
        raise RuntimeError(f"backend: none has the operation {operation!r}")
    check_backend(requested)
    reason = _reason(requested, device, operation, problem)
    if reason is not None:
        raise RuntimeError(f"backend: {requested!r} is not available: {reason}")
    return _BACKENDS[requested]


def _reason(name: str, device: torch.device, operation: str | None, problem: Problem | None) -> str | None:
    if name not in _BACKENDS:
        return _NOT_BUILT[name]
    backend = _BACKENDS[name]
    if operation is not None and backend.operation(operation) is None:
        return f"it has no operation {operation!r}"
    return backend.missing(device) or (None if problem is None else backend.unsupported(problem))


register_backend(Backend("reference", lambda loss: run_reference if loss in PACKAGES else None, lambda device: None))
