"""W and the audit of a pair of tokenizers, made once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from xtoken import _core
from xtoken.audit import ClassCoverage, CoverageReport, LossChoice, choose_loss, coverage_audit, same_tokens
from xtoken.projection import ProjectionMatrix
from xtoken.storage import Index
from xtoken.vocabulary import Vocabulary

Made = TypeVar("Made")
Folder: TypeAlias = "str | os.PathLike[str] | None"


def cache_folder() -> Path:
    """``$XTOKEN_CACHE``, else ``xtoken`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XTOKEN_CACHE") or Path(base) / "xtoken")


def cached_projection(
    student: Vocabulary, teacher: Vocabulary, folder: Folder = None, **options: Any
) -> ProjectionMatrix:
    """`ProjectionMatrix.build` of the same arguments, read from the cache if it has been built before.

    Files are named by the fingerprints of both vocabularies, the options and the version of this library; damaged ones
    are built again.
    """
    path = _path(folder, "projection.safetensors", student, teacher, options)
    return _cached(
        path,
        lambda: ProjectionMatrix.load(path, student, teacher),
        lambda: ProjectionMatrix.build(student, teacher, **options),
        lambda made: made.save(path),
    )


def cached_audit(
    student: Vocabulary, teacher: Vocabulary, projection: ProjectionMatrix, folder: Folder = None
) -> CoverageReport:
    """`coverage_audit` of the pair, likewise."""
    path = _path(folder, "audit.json", student, teacher, projection.metadata)
    index = Index(path.name, 1, "an audit")
    return _cached(
        path,
        lambda: _report(index, path.parent),
        lambda: coverage_audit(student, teacher, projection),
        lambda made: index.write(path.parent, {"report": json.loads(made.to_json())}),
    )


def cached_choice(
    student: Vocabulary, teacher: Vocabulary, folder: Folder = None, *, learn_projection: bool = False, **options: Any
) -> LossChoice:
    """`choose_loss` of the pair by its cached audit; the options are those of `cached_projection`."""
    report = None
    if not same_tokens(student, teacher):
        report = cached_audit(student, teacher, cached_projection(student, teacher, folder, **options), folder)
    return choose_loss(student, teacher, learn_projection=learn_projection, report=report)


def _path(folder: Folder, name: str, student: Vocabulary, teacher: Vocabulary, options: dict[str, Any]) -> Path:
    """The file of that name for a pair and these options."""
    facts = [student.fingerprint(), teacher.fingerprint(), sorted(options.items()), _core.version]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    kind, ending = name.split(".")
    return Path(folder or cache_folder()) / f"{kind}-{digest[:32]}.{ending}"


def _cached(path: Path, read: Callable[[], Made], make: Callable[[], Made], write: Callable[[Made], None]) -> Made:
    if path.exists():
        try:
            return read()
        except (ValueError, TypeError, KeyError):
            pass  # damaged, or of another version: made again
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(made)
    return made


def _report(index: Index, folder: Path) -> CoverageReport:
    with index.read(folder) as content:
        facts = content["report"]
        classes = {name: ClassCoverage(**counts) for name, counts in facts.pop("classes").items()}
        return CoverageReport(classes, **facts)
