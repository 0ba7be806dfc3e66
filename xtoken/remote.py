"""Files and folders by URL (``s3://``, ``gs://``, ...), on the file systems of fsspec."""

from __future__ import annotations

import io
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
"""Bytes that are fetched at a time; a file that is read keeps `BLOCKS` of them."""

BLOCKS = 4

THREADS = 16
"""Threads that ask for something of each of many files, since each answer takes its time."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Extras of this package that bring the libraries of file systems, by protocol."""

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return isinstance(path, str) and "://" in path


class Remote:
    """A file or folder at a URL, with those methods of `pathlib.Path` that inputs and outputs need.

    What fails is an OSError that names the URL, or FileNotFoundError; ImportError without the file system's library;
    ValueError for an unknown protocol.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._find()

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    def open(self, mode: str = "rb") -> _Reader:
        """The file, to read bytes from; it can seek."""
        options = {"block_size": BLOCK_BYTES, "cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}}
        with self._at() as (system, path):
            return _Reader(self, system.open(path, mode, **options))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of the file."""
        with self._at() as (system, path):
            return bytes(system.cat_file(path)).decode(encoding)

    def stamp(self) -> tuple[int, str]:
        """Size in bytes, and what changes when the file does: the ETag, or its like."""
        with self._at() as (system, path):
            info = system.info(path)
        version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), "")
        return int(info["size"]), version.strip('"')

    def sizes(self) -> dict[str, int]:
        """The names in the folder, with sizes in bytes; none if it does not exist."""
        found = []
        with self._at() as (system, path), suppress(FileNotFoundError):
            found = system.ls(path, detail=True)
        entries = {entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"] or 0) for entry in found}
        return {name: size for name, size in entries.items() if name and name != self.name}

    def is_dir(self) -> bool:
        """Whether it is a folder, or what an object store has in its place."""
        return self._type() == "directory"

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._type() == "file"

    def _type(self) -> str | None:
        with self._at() as (system, path), suppress(FileNotFoundError):
            return str(system.info(path)["type"])
        return None

    def root_is_missing(self) -> str:
        """The bucket, or first folder, of the URL if it does not exist; else an empty text."""
        with self._at() as (system, path):
            rest = path.lstrip("/")
            root = path[: len(path) - len(rest)] + rest.partition("/")[0]
            return "" if system.exists(root) else root

    def glob(self) -> list[str]:
        """The URLs of the files that the URL stands for as a pattern, sorted."""
        with self._at() as (system, path):
            found = system.glob(path, detail=True)
        return sorted(system.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file")

    def upload(self, data: Path | bytes) -> None:
        """Writes the file, which object stores show complete or not at all."""
        with self._at() as (system, path):
            if isinstance(data, bytes):
                system.pipe_file(path, data)
            else:
                system.put_file(str(data), path)

    def unlink(self) -> None:
        """Removes the file."""
        with self._at() as (system, path):
            system.rm_file(path)

    def _find(self) -> tuple[Any, str]:
        """File system and path; looked up each time, so that processes can be sent this, and forked."""
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            how = f"; pip install 'xtoken[{extra}]' brings it" if extra else ""
            raise ImportError(f"{self.url}: the library of {protocol}:// is not installed ({error}){how}") from error
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from error
        system.invalidate_cache()  # another process may have written since
        return system, path

    @contextmanager
    def _at(self) -> Iterator[tuple[Any, str]]:
        """File system and path, with `told` errors."""
        found = self._find()
        with self.told():
            yield found

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the file system's library, each of which has its own kinds, as OSError that names the URL."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}: {error}") from error
        except Exception as error:
            raise OSError(f"{self.url}: {error or type(error).__name__}") from error


class _Reader(io.RawIOBase):
    """A file that is read, with the errors of `Remote`."""

    def __init__(self, remote: Remote, file: Any) -> None:
        self._remote, self._file = remote, file

    def readinto(self, buffer: Any) -> int:
        with self._remote.told():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


Place = Path | Remote


def located(path: str | os.PathLike[str], name: str = "path") -> Place:
    """The file or folder that a path or URL stands for; of paths, and of file:// URLs, the absolute path.

    ValueError, which names the argument, for a file:// URL of another machine, and for a URL of nothing.
    """
    text = os.fspath(path)
    if not is_url(text):
        return Path(text).absolute()
    protocol, _, rest = text.partition("://")
    if protocol.lower() == "file":
        if not rest.startswith("/"):
            raise ValueError(f"{name}: expected file:///PATH, with three slashes, got {text}")
        return Path(rest)
    if not rest.strip("/"):
        raise ValueError(f"{name}: expected {protocol}://BUCKET/PATH or its like, got {text}")
    return Remote(f"{protocol.lower()}://{rest}")


def sizes(folder: Place) -> dict[str, int]:
    """The names in a folder, with sizes in bytes; none if it does not exist."""
    if isinstance(folder, Remote):
        return folder.sizes()
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], at_once: int = THREADS) -> Iterator[Any]:
    """``map(work, items)`` on threads, or on as many as the system gives, if need be this one alone; reads no further
    ahead than they need."""
    with ThreadPoolExecutor(at_once) as threads:
        waiting: deque[Future[Any]] = deque()
        are_there = False
        for item in items:
            waiting.append(Future())
            try:
                threads.submit(_do, waiting[-1], work, item)
                are_there = True
            except RuntimeError:  # of a thread that the system refuses; what it was to do waits for the others
                if not are_there:
                    _do(waiting[-1], work, item)
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _do(future: Future[Any], work: Callable[[Any], Any], item: Any) -> None:
    if not future.done():
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)


def check_regular(place: Place) -> None:
    """Raises ValueError for a pipe, a device or a folder: reading it may never end."""
    if isinstance(place, Path) and place.exists() and not place.is_file():
        raise ValueError(f"{place}: cannot read it: expected a regular file")


def arrow_file(place: Place) -> Any:
    """The file as one of pyarrow, to read from; not mapped, since a file may shrink."""
    import pyarrow as pa

    check_regular(place)
    return pa.OSFile(str(place)) if isinstance(place, Path) else pa.PythonFile(place.open(), "r")


class LastRun(AbstractContextManager["LastRun"]):
    """What stands for a lock where the file system has none: a file `name` that says which run began last to write to
    a folder. Making it says at once if the folder cannot be written to, or is a file."""

    def __init__(self, folder: Remote, name: str) -> None:
        self._place, self._run = folder / name, uuid.uuid4().hex
        try:
            if folder.is_file():
                raise ValueError(f"output: expected a folder, but {folder} is a file")
            self._place.upload(self._run.encode())
        except OSError as error:
            raise type(error)(f"output: {folder} cannot be written to: {error.__cause__}") from error

    def check(self) -> None:
        """ValueError if another run has begun since."""
        try:
            found = self._place.read_text()
        except FileNotFoundError:
            found = ""
        if found != self._run:
            folder = self._place.url.rpartition("/")[0]
            raise ValueError(f"output: another run writes to {folder}; wait for its end, or give another folder")

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, ValueError):
            self.check()
            self._place.unlink()
