"""Files on disk: written complete or not at all; safetensors files and JSON indices that say what they are."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .vocabulary import TokenizerLike, Vocabulary

Made = TypeVar("Made")

TEMPORARY = ".tmp"
"""Ending of files that are being written."""


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to. Without an exception, the file there takes the name `path`, even if the machine stops:
    it appears complete or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}{TEMPORARY}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears complete or not at all, even if the machine stops."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def _sync(path: Path) -> None:
    """fsync of a file, or of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lasting(values: Tensor) -> Tensor:
    """The tensor; a copy of one of inference mode, which would not tell whether it was changed."""
    if not values.is_inference():
        return values
    with torch.inference_mode(False), torch.no_grad():
        return values.clone()


@dataclass(frozen=True)
class TensorFile:
    """A kind of safetensors file; messages call it `title`.

    `metadata` is written into each file and required of it: ``format``, then ``version``. `tensors` are all that a file
    holds, each with its type, as safetensors names it, and its number of dimensions; None: any.
    """

    title: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, int]] | None = None

    def save(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], **metadata: str) -> None:
        """Writes a file: complete, or not at all."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save(held, {**metadata, **self.metadata} or None))

    def open(self, path: str | os.PathLike[str]) -> Any:
        """A file mapped into memory; FileNotFoundError, or ValueError if format, version or tensors are not right."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: no such file: {path}")
        try:
            file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not {self.title}: not a complete safetensors file: {error}") from error
        found = file.metadata() or {}
        if found.get("format") != self.metadata.get("format"):
            raise ValueError(f"{path}: not {self.title}")
        version, wanted = found.get("version"), self.metadata.get("version")
        if version != wanted:
            raise ValueError(f"{path}: format version {version}, this xtoken reads version {wanted}")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        held = {name: (part.get_dtype(), len(part.get_shape())) for name, part in parts.items()}
        if self.tensors is not None and held != self.tensors:
            raise ValueError(f"{path}: not {self.title}: expected the tensors {dict(self.tensors)}, got {held}")
        return file

    def load(self, path: str | os.PathLike[str], make: Callable[[dict[str, Tensor], dict[str, str]], Made]) -> Made:
        """What `make` makes of a file's tensors and metadata; its errors become "damaged", with the path."""
        with self.open(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            metadata = {name: value for name, value in (file.metadata() or {}).items() if name not in self.metadata}
        try:
            return make(tensors, metadata)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error


@dataclass(frozen=True)
class Index:
    """A JSON file that says what is in an output folder, such as "an index of aligned shards" (`title`)."""

    name: str
    version: str | int
    title: str

    def write(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Writes the index; it is replaced as a whole or not at all."""
        text = json.dumps({"format": self.version, **content}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / self.name, text.encode())

    @contextmanager
    def read(self, folder: Path) -> Iterator[Any]:
        """The content of a folder's index; what the block misses in it becomes a ValueError that names the file."""
        path = folder / self.name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != self.version:
                raise ValueError(f"{path}: expected format {self.version}, got {content['format']}")
            yield content
        except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not {self.title}: {error!r}") from error

    def prepare(self, folder: Path, resume: bool, kind: str) -> bool:
        """Makes an output folder; whether it holds an index to go on with.

        Refuses a folder that holds something and is not to be resumed, or something else than `kind`; removes what an
        earlier run left half written.
        """
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if held and not resume:
            raise ValueError(f"output: {folder} is not empty; give another folder, or resume (--resume) what is in it")
        leftovers = {name for name in held if name.startswith(".") and name.endswith(TEMPORARY)}
        if held - leftovers and self.name not in held:
            raise ValueError(f"output: {folder} holds {min(held - leftovers)} but no {self.name}; expected {kind}")
        folder.mkdir(parents=True, exist_ok=True)
        for name in leftovers:
            (folder / name).unlink()
        return self.name in held


class Numbering:
    """Items that are numbered through, across shards with so many items each."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, index: int) -> tuple[int, int]:
        """The shard of an item, and its number in there. IndexError if there is no such item; -1 is the last one."""
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"index: expected -{len(self)} to {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, position - int(self.starts[shard])


def fingerprints(student: Vocabulary, teacher: Vocabulary) -> dict[str, str]:
    """For the metadata of what is built for a pair of tokenizers; see `check_fingerprints`."""
    return {"student_fingerprint": student.fingerprint(), "teacher_fingerprint": teacher.fingerprint()}


def other_tokenizers(
    recorded: Mapping[str, str | None], student_tok: TokenizerLike = None, teacher_tok: TokenizerLike = None
) -> Iterator[tuple[str, str, str]]:
    """The sides whose tokenizer, if given, is not the recorded one: side, recorded and given fingerprint, shortened."""
    for side, tokenizer in (("student", student_tok), ("teacher", teacher_tok)):
        before = recorded.get(side)
        if tokenizer is not None and before is not None:
            now = Vocabulary.from_tokenizer(tokenizer).fingerprint()
            if before != now:
                yield side, before[:12], now[:12]


def check_fingerprints(
    name: str, made: object, metadata: Mapping[str, str], student_tok: TokenizerLike, teacher_tok: TokenizerLike
) -> None:
    """Raises ValueError if the argument `name` was built for other tokenizers than those given (None: not given)."""
    recorded = {side: metadata.get(f"{side}_fingerprint") for side in ("student", "teacher")}
    for side, built_for, got in other_tokenizers(recorded, student_tok, teacher_tok):
        other = f"another {side} tokenizer (fingerprint {built_for}) than {side}_tok ({got})"
        raise ValueError(f"{name}: built for {other}; build it again with {type(made).__name__}.build")
