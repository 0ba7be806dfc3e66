"""Whether an output can be written, asked before the work for it begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .remote import Remote, is_url, located


def target(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The file that is written for a path. Where it is a symbolic link to a file, the link makes way: others may share
    what it points to, as in a cache.

    Raises OSError, which says what to do, for a folder, for what is there and no regular file, such as a device or a
    pipe, and for a file in a folder that is not there or has no permission; ValueError for a URL, and without a name.
    """
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a name")
    if is_url(path):
        raise ValueError(f"{name}: expected a local file, got the URL {path}")
    file = Path(path).absolute()
    if file.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got a folder: {path}; such as {Path(path) / file.name}")
    if file.exists() and not file.is_file():
        raise OSError(f"{name}: expected a regular file, which {path} is not")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {file.parent}; make it first")
    _check_permission(file.parent, name)
    return file


def check_file(path: str | os.PathLike[str], name: str = "output") -> None:
    """Raises what `target` does, and OSError for a file without permission."""
    file = target(path, name)
    if file.exists():
        _check_permission(file, name)


def check_folder(path: str | os.PathLike[str], name: str = "output", *, urls: bool = False) -> None:
    """The same for a folder, which need not be there, nor those above it; with `urls` also at a URL, of which the run
    itself asks, at once."""
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a name")
    if is_url(path) and not urls:
        raise ValueError(f"{name}: expected a local folder, got the URL {path}")
    folder = located(path, name)
    if isinstance(folder, Remote):
        return
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, but {folder} is a file")
    _check_permission(folder, name)


def check_apart(path: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]], name: str = "output") -> None:
    """Raises ValueError if one of the files or folders that are read is the output itself, or holds it as a file. What
    xtoken wrote into a folder before, W or a page, can be replaced."""
    file = Path(path).absolute()
    for source in sources:
        if not os.path.exists(source) or not os.path.lexists(file):
            continue
        is_within = not file.is_dir() and Path(source).resolve() in (file.parent.resolve() / file.name).parents
        if (is_within and not _is_own(file)) or (file.exists() and os.path.samefile(source, file)):
            raise ValueError(f"{name}: expected another place than {file}, which is read and would be overwritten")


def _is_own(file: Path) -> bool:
    """Whether it is a page, which no model has, or a safetensors file of xtoken."""
    if not file.is_file():  # a link to nothing
        return False
    with open(file, "rb") as opened:
        return file.suffix == ".html" or b'"format":"xtoken.' in opened.read(1024)


def _check_permission(path: Path, name: str) -> None:
    if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
        raise PermissionError(f"{name}: no permission to write to {path}")
