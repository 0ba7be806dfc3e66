"""Files on disk: written complete or not at all; safetensors files and JSON indices that say what they are, with a
checksum of what they hold."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .outputs import target
from .remote import LastRun, Place, Remote, check_regular, sizes
from .vocabulary import TokenizerLike, Vocabulary

Made = TypeVar("Made")

TEMPORARY = ".tmp"
"""Ending of files that are being written."""

LOCK = ".lock"
"""In an output folder: held by the run that writes to it."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextmanager
def named(path: str | os.PathLike[str] | Remote) -> Iterator[None]:
    """Errors of the system about a file, with its name: what is said of a read or a write has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic(path: str | os.PathLike[str] | Remote) -> Iterator[Path]:
    """Gives a path to write to. Without an exception, the file there takes the name `path`, even if the machine stops:
    it appears complete or not at all; `outputs.target` says what cannot be written. What killed writes of the same
    file have left is removed. A file of a `Remote` is written to the folder for temporary files, and sent."""
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.upload(temporary)
        return
    path = target(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        with suppress(OSError):
            if (held := _hold(leftover, os.O_RDWR)) is not None:
                leftover.unlink()
                os.close(held)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}{TEMPORARY}")
    held = _hold(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with named(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def _hold(path: Path, flags: int) -> int | None:
    """Opens a file and locks it for as long as the descriptor is open; None if another process or run holds it.

    The system lets go of what a killed process held. Where it knows no locks, only new files are ours.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if flags & os.O_CREAT and error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return descriptor
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # who held it has removed it


def only_run(folder: Place) -> AbstractContextManager[Any]:
    """Keeps other runs out of an output folder. A `Remote` has no locks: of two runs the one that began first finds out
    when its `check` is called, and ends."""
    return FolderLock(folder) if isinstance(folder, Path) else LastRun(folder, LOCK)


class FolderLock(AbstractContextManager["FolderLock"]):
    """Keeps other runs out of an output folder, which is made if need be; ValueError if one is there."""

    _held: int | None = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOCK
        self._held = _hold(self._path, os.O_RDWR | os.O_CREAT)
        if self._held is None:
            raise ValueError(f"output: another run writes to {folder}; wait for its end, or give another folder")

    def check(self) -> None:
        """The lock holds."""

    def __exit__(self, *_: object) -> None:
        held, self._held = self._held, None  # what fails is not done again, when the number may be another file's
        if held is not None:
            self._path.unlink(missing_ok=True)
            os.close(held)

    def __del__(self) -> None:
        self.__exit__()


def write_atomically(path: str | os.PathLike[str] | Remote, data: bytes) -> None:
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


class TensorReader(AbstractContextManager["TensorReader"]):
    """A safetensors file, checked and read piece by piece.

    Nothing is mapped: tensors do not change with the file, and a file that shrinks is an error.
    """

    def __init__(self, path: str | os.PathLike[str], title: str) -> None:
        self.path = path
        check_regular(Path(path))
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed by who opened it
        except FileNotFoundError:
            raise FileNotFoundError(f"path: no such file: {path}") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error}") from error
        try:
            self._begin, size = 8, os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._bytes(0, min(8, size)), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes in {size}")
            header = json.loads(self._bytes(8, 8 + length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.parts: dict[str, tuple[str, list[int], int]] = {}
            end = 0
            for name, part in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                kind, shape, (first, last) = part["dtype"], part["shape"], part["data_offsets"]
                if not all(type(n) is int and n >= 0 for n in (*shape, first, last)) or len(shape) > 64:
                    raise ValueError(f"{name} has the shape {shape}")
                if first != end or last - first != math.prod(shape) * _DTYPES[kind].itemsize:
                    raise ValueError(f"{name} {kind} {shape} has the bytes {first} to {last}")
                self.parts[name] = (kind, shape, 8 + length + first)
                end = last
            if end != size - 8 - length or not all(isinstance(one, str) for one in self.metadata.values()):
                raise ValueError(f"expected {end} bytes of tensors, got {size - 8 - length}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._file.close()
            raise ValueError(f"{path}: not {title}: not a complete safetensors file: {error}") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows ``start ... stop - 1``."""
        kind, shape, begin = self.parts[name]
        dtype, stop = _DTYPES[kind], shape[0] if stop is None and shape else stop
        if shape:
            size = math.prod(shape[1:]) * dtype.itemsize
            shape, begin = [(stop or 0) - start, *shape[1:]], begin + start * size
        data = self._bytes(begin, begin + math.prod(shape) * dtype.itemsize)
        if not data:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _bytes(self, first: int, last: int) -> bytearray:
        data = bytearray(last - first)
        view = memoryview(data)
        with named(self.path):
            while view and (count := os.preadv(self._file.fileno(), [view], last - len(view))):
                view = view[count:]
        if view:
            raise ValueError(f"{self.path}: was cut short while it is read")
        return data

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _data(tensor: Tensor) -> Any:
    """The bytes of a tensor."""
    if not tensor.numel():  # those of NumPy have a stride of 0
        tensor = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return tensor.reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class TensorFile:
    """A kind of safetensors file; messages call it `title`.

    `metadata` is written into each file and required of it: ``format``, then ``version``. `tensors` are all that a file
    holds, each with its type, as safetensors names it, and its number of dimensions; None: any. The checksum in the
    metadata is of everything but the `unsummed` ones, which have sums of their own. `rebuild`: how to make another.
    """

    title: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, int]] | None = None
    unsummed: tuple[str, ...] = ()
    rebuild: str = ""

    def save(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], **metadata: str) -> None:
        """Writes a file: complete, or not at all. Equal content gives equal bytes."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        names = sorted(held, key=lambda name: (-held[name].dtype.itemsize, name))
        parts = {name: (_NAMES[held[name].dtype], list(held[name].shape)) for name in names}
        metadata = {**metadata, **self.metadata}
        metadata["checksum"] = self._checksum(metadata, parts, held.__getitem__)
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for name in names:
            start, end = end, end + held[name].nbytes
            header[name] = {"dtype": parts[name][0], "shape": parts[name][1], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(_data(held[name]))

    def open(self, path: str | os.PathLike[str]) -> TensorReader:
        """A file to read from; FileNotFoundError, or ValueError if format, version, tensors or checksum are wrong."""
        file = TensorReader(path, self.title)
        try:
            found = file.metadata
            if found.get("format") != self.metadata.get("format"):
                raise ValueError(f"{path}: not {self.title}{self._hint}")
            version, wanted = found.get("version"), self.metadata.get("version")
            if version != wanted:
                raise ValueError(f"{path}: format version {version}, this xtoken reads version {wanted}{self._hint}")
            held = {name: (kind, len(shape)) for name, (kind, shape, _) in file.parts.items()}
            if self.tensors is not None and held != self.tensors:
                raise ValueError(f"{path}: not {self.title}: expected the tensors {dict(self.tensors)}, got {held}")
            parts = {name: (kind, shape) for name, (kind, shape, _) in file.parts.items()}
            if found.get("checksum") != self._checksum(found, parts, file.read):
                raise ValueError(f"{path}: damaged: the checksum does not fit the content{self._hint}")
        except ValueError:
            file.__exit__()
            raise
        return file

    @property
    def _hint(self) -> str:
        return f"; {self.rebuild} makes it again" if self.rebuild else ""

    def _checksum(self, metadata: Mapping[str, str], parts: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> str:
        """SHA-256 of the metadata, and of names, types, shapes and bytes of the tensors."""
        said = {name: value for name, value in metadata.items() if name != "checksum"}
        digest = hashlib.sha256(json.dumps([sorted(said.items()), sorted(parts.items())]).encode())
        for name in sorted(set(parts) - set(self.unsummed)):
            digest.update(_data(tensor(name)))
        return digest.hexdigest()

    def load(self, path: str | os.PathLike[str], make: Callable[[dict[str, Tensor], dict[str, str]], Made]) -> Made:
        """What `make` makes of a file's tensors and metadata; its errors become "damaged", with the path."""
        with self.open(path) as file:
            tensors = {name: file.read(name) for name in file.parts}
        own = {*self.metadata, "checksum"}
        try:
            return make(tensors, {name: value for name, value in file.metadata.items() if name not in own})
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error


def read_yaml(path: Path, name: str | None = None) -> Any:
    """The content of a file. Raises FileNotFoundError; ValueError that names it, as `name`, for what is no YAML."""
    import yaml

    check_regular(path)
    try:
        with named(path):
            return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # of whatever a value of YAML is made with
        raise ValueError(f"{name or path}: not YAML: {error}") from error


@dataclass(frozen=True)
class Index:
    """A JSON file that says what is in an output folder, such as "an index of aligned shards" (`title`)."""

    name: str
    version: str | int
    title: str
    rebuild: str = ""

    def write(self, folder: Place, content: Mapping[str, Any]) -> None:
        """Writes the index; it is replaced as a whole or not at all."""
        content = {"format": self.version, **content}
        text = json.dumps({**content, "checksum": _json_digest(content)}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / self.name, text.encode())

    @contextmanager
    def read(self, folder: Place) -> Iterator[Any]:
        """The content of a folder's index; what the block misses in it becomes a ValueError that names the file."""
        path = folder / self.name
        check_regular(path)
        try:
            try:
                with named(path):
                    content = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise TypeError(error) from error
            if content["format"] != self.version:
                hint = f"; {self.rebuild} makes it again" if self.rebuild else ""
                raise ValueError(f"{path}: expected format {self.version}, got {content['format']!s:.20}{hint}")
            if content.pop("checksum", None) != _json_digest(content):
                raise ValueError(f"{path}: damaged: the checksum does not fit the content")
            yield content
        except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: not {self.title}: {error!r}") from error

    def prepare(self, folder: Place, resume: bool, kind: str) -> bool:
        """Makes an output folder; whether it holds an index to go on with.

        Refuses what `check` refuses; removes what an earlier run left half written.
        """
        leftovers = self.check(folder, resume, kind)
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        for name in leftovers:
            (folder / name).unlink()
        return self.name in sizes(folder)

    def check(self, folder: Place, resume: bool, kind: str) -> set[str]:
        """Refuses a folder that holds something and is not to be resumed, or something else than `kind`; returns the
        names of what an earlier run left half written."""
        held = set(sizes(folder)) - {LOCK}
        if held and not resume:
            raise ValueError(f"output: {folder} is not empty; give another folder, or resume (--resume) what is in it")
        hidden = {name for name in held if name.startswith(".")}
        leftovers = {name for name in hidden if name.endswith(TEMPORARY) or name.startswith(f".{self.name}.")}
        if held - leftovers and self.name not in held:
            raise ValueError(f"output: {folder} holds {min(held - leftovers)} but no {self.name}; expected {kind}")
        return leftovers


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def check_present(metadata: Mapping[str, str]) -> None:
    """Raises ValueError if what `fingerprints` returns is not all there."""
    for side in ("student", "teacher"):
        if not re.fullmatch("[0-9a-f]{64}", metadata.get(f"{side}_fingerprint", "")):
            raise ValueError(f"{side}_fingerprint: expected 64 hex digits, got {metadata.get(f'{side}_fingerprint')!r}")


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
    name: str, made: Any, metadata: Mapping[str, str], student_tok: TokenizerLike, teacher_tok: TokenizerLike
) -> None:
    """Raises ValueError if the argument `name` was built for other tokenizers than those given (None: not given)."""
    recorded = {side: metadata.get(f"{side}_fingerprint") for side in ("student", "teacher")}
    given = [None if one is None else Vocabulary.from_tokenizer(one) for one in (student_tok, teacher_tok)]
    for side, built_for, got in other_tokenizers(recorded, *given):
        other = f"another {side} tokenizer (fingerprint {built_for}) than {side}_tok ({got})"
        hint = f"build it again with {type(made).__name__}.build, or xtoken project"
        raise ValueError(f"{name}: built for {other}; {hint}")
    for side, size, one in zip(recorded, made.shape, given, strict=True):
        if recorded[side] and one is not None and size != len(one):
            raise ValueError(f"{name}: expected the {len(one)} tokens of {side}_tok, got {size}")
