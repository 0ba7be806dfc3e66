"""What a pair of tokenizers needs to be compared: the loss, and W or pieces, which are kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias, TypeVar

import torch

from xtoken import _core
from xtoken.audit import ClassCoverage, CoverageReport, LossChoice, choose_loss, coverage_audit, same_tokens
from xtoken.losses import Needs, Teacher, registered
from xtoken.losses.call import check_choice
from xtoken.outputs import check_folder
from xtoken.pieces import PieceIndex
from xtoken.projection import ProjectionMatrix
from xtoken.sample import sample_texts
from xtoken.storage import Index
from xtoken.vocabulary import Vocabulary

KINDS: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", bool), int: ("an integer", Integral), float: ("a number", Real),
}  # fmt: skip
"""Types of options of losses: how they are called, and what is one."""

RULES = 2
"""Raised where W, audits or pieces are made by other rules than before, so that kept ones are made again."""

Made = TypeVar("Made")
Built = TypeVar("Built", ProjectionMatrix, PieceIndex)
Folder: TypeAlias = "str | os.PathLike[str] | None"


def check_dtype(dtype: str, name: str) -> None:
    """Raises ValueError for what is neither "auto" nor the name of a type of torch."""
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        known = "'auto', 'float32', 'bfloat16', 'float16' or another type of torch"
        raise ValueError(f"{name}: expected {known}, got {dtype!r}")


def check_device(device: str, name: str) -> str:
    """The same; ValueError for what is neither "auto" nor a device of torch."""
    try:
        return device if device == "auto" else str(torch.device(device))
    except RuntimeError as error:
        known = "'auto', or a device of torch such as 'cpu' or 'cuda:1'"
        raise ValueError(f"{name}: expected {known}, got {device!r}") from error


def cache_folder() -> Path:
    """``$XTOKEN_CACHE``, else ``xtoken`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XTOKEN_CACHE") or Path(base) / "xtoken")


def cached(kind: type[Built], student: Vocabulary, teacher: Vocabulary, folder: Folder = None, **options: Any) -> Built:
    """``kind.build(student, teacher, **options)``, read from the cache if it has been built before.

    Files are named by the fingerprints of both vocabularies, the options and the version of this library; damaged ones
    are built again.
    """
    path = _path(folder, kind.FILE_NAME, student, teacher, options)
    return _cached(
        path,
        lambda: kind.load(path, student, teacher),
        lambda: kind.build(student, teacher, **options),
        lambda made: made.save(path),
    )


def cached_audit(
    student: Vocabulary, teacher: Vocabulary, projection: ProjectionMatrix, folder: Folder = None
) -> CoverageReport:
    """`coverage_audit` of the pair, likewise."""
    path = _path(folder, "audit.json", student, teacher, projection.metadata)
    index = Index(path.name, 1, "an audit")

    def read() -> CoverageReport:
        with index.read(path.parent) as content:
            facts = content["report"]
            classes = {name: ClassCoverage(**counts) for name, counts in facts.pop("classes").items()}
            return CoverageReport(classes, **facts)

    return _cached(
        path,
        read,
        lambda: coverage_audit(student, teacher, projection),
        lambda made: index.write(path.parent, {"report": json.loads(made.to_json())}),
    )


def cached_choice(
    student: Vocabulary, teacher: Vocabulary, folder: Folder = None, *, learn_projection: bool = False, **options: Any
) -> LossChoice:
    """`choose_loss` of the pair by its cached audit and, where the answer depends on them, cached pieces; the options
    are those of `ProjectionMatrix.build`."""
    report = pieces = None
    if not same_tokens(student, teacher):
        projection = cached(ProjectionMatrix, student, teacher, folder, **options)
        report = cached_audit(student, teacher, projection, folder)
        if report.keeps_critical and not learn_projection:
            pieces = cached(PieceIndex, student, teacher, folder)
    return choose_loss(student, teacher, learn_projection=learn_projection, report=report, pieces=pieces)


def build_objective(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    loss: str = "auto",
    weight: float = 1.0,
    loss_options: Mapping[str, Any] | None = None,
    gamma: float = 0.1,
    learn_projection: bool = False,
    texts: Iterable[str] | Callable[[], Iterable[str]] = (),
    cache: Folder = None,
    trust_top_k: int | None = None,
) -> tuple[Teacher, tuple[str, ...]]:
    """How a student learns from a teacher, and why so, in words.

    Parameters
    ----------
    student, teacher : Vocabulary
    loss : str
        The name of a registered loss, or "auto": what `choose_loss` recommends.
    weight : float
        Of `Teacher`.
    loss_options : mapping, optional
        Options of losses by name; those that the loss does not have are left out, see `check_losses`. Where an
        option is a count or None (``top_k``), 0 is None.
    gamma : float
        Of `ProjectionMatrix.build`.
    learn_projection : bool
        Whether the weights of W are trained, if the loss can.
    texts : iterable of str, or a function that returns one
        Text like that of the training data, for `PieceIndex.build`, beside `sample_texts`; only read if it is needed.
    cache : path, optional
        Folder for W, audits and pieces; default: `cache_folder`.
    trust_top_k : int, optional
        Of `Teacher`.

    Raises ValueError for an unknown loss.
    """
    check_choice(loss, "loss", ("auto", *registered()))
    reasons: list[str] = []
    if loss == "auto":
        choice = cached_choice(student, teacher, cache, learn_projection=learn_projection, gamma=gamma)
        loss, reasons = choice.loss, [*(choice.report.reasons if choice.report else ()), *choice.reasons]
    kind = registered()[loss]
    projection: Any = None
    pieces = None
    if kind.needs is Needs.PIECES:
        own = list(texts() if callable(texts) else texts)
        if own:
            pieces = PieceIndex.build(student, teacher, texts=[*sample_texts(student, teacher), *own])
        else:
            pieces = cached(PieceIndex, student, teacher, cache)
        reasons += [pieces.merged().summary()]
    if kind.needs not in (Needs.PIECES, Needs.SAME_TOKENIZER):
        projection = cached(ProjectionMatrix, student, teacher, cache, gamma=gamma)
    reasons += [repr(one) for one in (pieces, projection) if one is not None]
    if learn_projection and kind.trains_projection:
        projection = projection.learnable()
    kinds = kind.kinds()
    given = {
        name: None if {int, NoneType} <= {*kinds[name]} and value == 0 else value
        for name, value in (loss_options or {}).items()
        if name in kinds
    }
    return Teacher(projection, loss, weight, pieces=pieces, trust_top_k=trust_top_k, **given), tuple(reasons)


def check_losses(losses: Sequence[str], loss_options: Mapping[str, Any] | None, learn_projection: bool) -> None:
    """Raises ValueError for an option that none of the losses has."""
    chosen = [registered()[loss] for loss in losses]
    for name in loss_options or {}:
        if not any(name in one.options() for one in chosen):
            raise ValueError(f"{name}: none of the chosen losses has it: {', '.join(losses)}")
    if learn_projection and not any(one.trains_projection for one in chosen):
        raise ValueError(f"learn_projection: none of the chosen losses can train W: {', '.join(losses)}")


def option_kinds(loss: str) -> dict[str, list[Any]]:
    """Of each option of a loss what it takes beside None: types, or words."""
    return {name: [one for one in kinds if one is not NoneType] for name, kinds in registered()[loss].kinds().items()}


def check_loss_options(given: Any) -> None:
    """Raises ValueError if they are no mapping from names, or a number or switch is something else."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"loss_options: expected names and their values, got {given!r}")
    for name, value in (given or {}).items():
        kinds = list(dict.fromkeys(kind for loss in registered() for kind in option_kinds(loss).get(name, ())))
        if value is None or not kinds or not KINDS.keys() >= set(kinds):
            continue
        of = [KINDS[kind] for kind in kinds]
        if not any(isinstance(value, kind) and isinstance(value, bool) == (kind is bool) for _, kind in of):
            raise ValueError(
                f"loss_options: expected {' or '.join(word for word, _ in of)} for {name!r}, got {value!r}"
            )


def one_each(values: Sequence[Any] | None, default: Any, count: int, name: str) -> list[Any]:
    """A value for each teacher, from one for all, one for each, or none."""
    values = [default] if values is None else list(values)
    if len(values) not in (1, count):
        raise ValueError(f"{name}: expected one, or one for each of the {count} teachers, got {len(values)}")
    return values * count if len(values) == 1 else values


def weights_of(given: Sequence[float] | None, count: int, selects: bool = False) -> list[float]:
    """The teachers' weights: equal shares of 1 if none are given, or 1 where one of them is selected; and of one fewer
    than teachers the first is what is missing to 1."""
    if given is None:
        return [1.0 if selects else 1.0 / count] * count
    if len(given) == count - 1:
        given = [1.0 - sum(given), *given]
    if len(given) != count:
        raise ValueError(f"teacher_weight: expected one for each of the {count} teachers, got {len(given)}")
    return list(given)


def _path(folder: Folder, name: str, student: Vocabulary, teacher: Vocabulary, options: dict[str, Any]) -> Path:
    """The file of that name for a pair and these options."""
    facts = [student.fingerprint(), teacher.fingerprint(), sorted(options.items()), _core.version, RULES]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    kind, ending = name.split(".")
    return Path(folder or cache_folder()) / f"{kind}-{digest[:32]}.{ending}"


def _cached(path: Path, read: Callable[[], Made], make: Callable[[], Made], write: Callable[[Made], None]) -> Made:
    if path.exists():
        try:
            return read()
        except (ValueError, TypeError, KeyError):
            pass  # damaged, or of another version: made again
    check_folder(path.parent, "cache")
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(made)
    return made
