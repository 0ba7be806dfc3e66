"""Backends: who computes a loss. A table of kernels with one signature, and the rule that picks one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xtoken.alignment.alignment import IGNORED as IGNORED
from xtoken.alignment.chunks import Chunks
from xtoken.losses.numerics import statistics_dtype
from xtoken.once import Once
from xtoken.terminal import did_you_mean

if TYPE_CHECKING:
    from xtoken.losses.loss import Loss


class Prepared(NamedTuple):
    """What a loss makes of a call: the chunks, and itself as kernels and formula get it."""

    chunks: Chunks
    options: Loss


T_co = TypeVar("T_co", bound="Loss", covariant=True)


@dataclass(frozen=True)
class Problem(Generic[T_co]):
    """One call of a loss.

    Parameters
    ----------
    loss : str
        Its name in the register.
    student : [B, T_s, V_student]
        Vocabulary columns only; any strides. Row ``r`` of `chunks` is ``student[r // T_s, r % T_s]``.
    teacher : [B, T_t, V_teacher]
    chunks : Chunks
    options
        As `Prepared`.
    weight : [nnz], optional
        The weights of W, if they need a gradient.
    """

    loss: str
    student: Tensor
    teacher: Tensor
    chunks: Chunks
    options: T_co
    weight: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the losses: the widest type of the logits, at least float32."""
        return statistics_dtype(self.student, self.teacher)


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

    def part(self, rows: slice) -> Labels:
        """Those of some rows."""
        return Labels(self.ids[rows], self.losses[rows], self.scale)


def predicted_labels(labels: Tensor) -> Tensor:
    """int64 [..., T]: of labels at the tokens' own positions the one that each row predicts, -100 for the last."""
    return torch.nn.functional.pad(labels.long(), (0, 1), value=IGNORED)[..., 1:]


def checked_ids(labels: Tensor, size: int) -> Tensor:
    """int64 [rows]: `predicted_labels`; raises ValueError for an id beyond a vocabulary of so many tokens.

    Only on the CPU: elsewhere that would wait for the device, and a bad id there makes the loss nan.
    """
    following = predicted_labels(labels).flatten()
    if following.device.type == "cpu":
        bad = following[((following < 0) | (following >= size)) & (following != IGNORED)]
        if len(bad):
            raise ValueError(f"labels: expected token ids in 0 ... {size - 1}, or {IGNORED}, got {int(bad[0])}")
    return following


class Run(Protocol):
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
        Only where `Kernel.fuses_labels`: also the cross-entropy, its gradient added to ``student_grad``.

    Returns
    -------
    Tensor
        [K], in ``problem.dtype``.
    """

    def __call__(
        self,
        problem: Problem[Any],
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        labels: Labels | None = None,
    ) -> Tensor: ...


class Kernel(NamedTuple):
    """A loss on a backend."""

    run: Run
    fuses_labels: bool = False
    takes_mask: bool = False
    """Whether chunks may have a mask (see `Chunks`), as those on CUDA must; else the backend waits for the device."""


class CrossEntropy(Protocol):
    """Cross-entropy of each row: fills ``labels.losses``, and adds its gradient to `factor` (default: 1) times what
    ``student_grad``, if given, holds; its columns beyond the vocabulary are zeros."""

    def __call__(
        self, student: Tensor, labels: Labels, student_grad: Tensor | None = None, factor: Tensor | None = None
    ) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A named table of kernels.

    Parameters
    ----------
    name : str
    kernel : callable
        The `Kernel` of a loss by the loss's name, None if it has none.
    missing : callable
        Why it cannot work on a device, or None if it can.
    cross_entropy : CrossEntropy
        For kernels without labels of their own.
    column_set : callable
        `xtoken.reference.column_set` for logits of any type.
    unsupported : callable
        Why it cannot take a problem on such a device (a type of logits, say), or None if it can.
    scale : callable
        Multiplies a contiguous tensor on its device by a scalar tensor, in place.
    """

    name: str
    kernel: Callable[[str], Kernel | None]
    missing: Callable[[torch.device], str | None]
    cross_entropy: CrossEntropy
    column_set: Callable[[Tensor, int | None], Tensor]
    unsupported: Callable[[Problem[Any]], str | None] = lambda problem: None
    scale: Callable[[Tensor, Tensor], object] = Tensor.mul_

    def run(
        self,
        problem: Problem[Any],
        student_grad: Tensor | None = None,
        weight_grad: Tensor | None = None,
        scale: Tensor | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """The problem's loss, with labels and masks whether or not its kernel takes them."""
        kernel = self.kernel(problem.loss)
        if kernel is None:
            raise RuntimeError(f"backend: {self.name!r} has no kernel of {problem.loss!r}")
        if problem.chunks.mask is not None and not kernel.takes_mask:
            chunks, kept = problem.chunks.kept()
            part = None if scale is None else scale[kept]
            few = self.run(replace(problem, chunks=chunks), student_grad, weight_grad, part, labels)
            return few.new_zeros(len(problem.chunks)).index_copy_(0, kept, few)
        if labels is None or kernel.fuses_labels:
            return self._checked(problem, kernel.run(problem, student_grad, weight_grad, scale, labels))
        losses = self._checked(problem, kernel.run(problem, student_grad, weight_grad, scale))
        self.cross_entropy(problem.student, labels, student_grad)
        return losses

    def _checked(self, problem: Problem[Any], losses: Tensor) -> Tensor:
        got: tuple[Any, ...] = (type(losses).__name__,)
        if isinstance(losses, Tensor):
            if losses.shape == (len(problem.chunks),) and losses.dtype == problem.dtype:
                return losses
            got = losses.dtype, list(losses.shape)
        expected = f"{problem.dtype} [{len(problem.chunks)}], a loss for each chunk"
        raise RuntimeError(
            f"{problem.loss}: expected {expected}, of backend {self.name!r}, got {' '.join(map(str, got))}"
        )


def kernels_of(loss: str, backend: str) -> ModuleType | None:
    """The module that calls a loss's kernels of a backend, None if there are none."""
    from xtoken.losses.loss import REGISTER

    if loss not in REGISTER:
        return None
    return _module(f"{REGISTER[loss].kernels}.{backend}")


@functools.cache
def _module(name: str) -> ModuleType | None:
    return importlib.import_module(name) if _exists(name) else None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the loss's own module is no package
        return False


_BACKENDS: dict[str, Backend] = {}
_NOT_BUILT = {"cuda": "this build of xtoken has no CUDA kernels"}


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


def backends_with(loss: str) -> tuple[str, ...]:
    """Those of `backend_names` that have a kernel of the loss."""
    return tuple(name for name in _BACKENDS if _BACKENDS[name].kernel(loss) is not None)


def check_backend(requested: str, name: str = "backend") -> None:
    """``requested`` is "auto" or the name of a backend, built or not."""
    if requested != "auto" and requested not in _BACKENDS and requested not in _NOT_BUILT:
        known = dict.fromkeys(["auto", *_BACKENDS, *_NOT_BUILT])
        hint = did_you_mean(requested, tuple(known))
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {requested!r}{hint}")


def select_backend(requested: str, device: torch.device | str, loss: str | None = None) -> str:
    """The name of the backend that computes a loss.

    Parameters
    ----------
    requested : str
        ``"auto"``, or a backend's name.
    device : torch.device
        Where the logits are.
    loss : str, optional
        The name of a loss; default: any.

    Returns
    -------
    str
        For ``"auto"`` the fastest backend that works on the device, ``"reference"`` if there is no other. (A call
        with logits of a type that this backend does not take uses the next one.) Where that is "reference" on a CUDA
        device, since this build has no kernels or they cannot run there, a warning says why, once.

    Raises
    ------
    ValueError
        If there is no backend of that name at all.
    RuntimeError
        If the backend exists but cannot do this; the message says why.
    """
    return select(requested, torch.device(device), loss).name


def select(
    requested: str, device: torch.device, loss: str | None = None, problem: Problem[Any] | None = None
) -> Backend:
    """The backend of `select_backend`; RuntimeError also if the requested one does not take this problem."""
    if requested == "auto":
        for name in reversed(_BACKENDS):
            if why_not(name, device, loss, problem) is None:
                if name == "reference" and device.type in _NOT_BUILT:
                    _tell(device, loss)
                return _BACKENDS[name]
        raise RuntimeError(f"backend: none has the operation {loss!r}")
    check_backend(requested)
    reason = why_not(requested, device, loss, problem)
    if reason is not None:
        raise RuntimeError(f"backend: {requested!r} is not available: {reason}")
    return _BACKENDS[requested]


def _tell(device: torch.device, loss: str | None) -> None:
    """Says why a loss that has kernels for such devices does without."""
    reason = why_not(device.type, device)
    if reason is not None and (loss is None or kernels_of(loss, device.type) is not None):
        message = f"losses on {device} are computed in plain PyTorch, since backend {device.type!r} cannot: {reason}"
        _warn_once(message, message)


_warn_once = Once(functools.partial(warnings.warn, stacklevel=2))


def why_not(
    name: str, device: torch.device, loss: str | None = None, problem: Problem[Any] | None = None
) -> str | None:
    """Why the backend of that name cannot work on a device (for a loss, for a problem), None if it can."""
    if name not in _BACKENDS:
        return _NOT_BUILT[name]
    backend = _BACKENDS[name]
    if loss is not None and backend.kernel(loss) is None:
        return f"it has no operation {loss!r}"
    return backend.missing(device) or (None if problem is None else backend.unsupported(problem))
