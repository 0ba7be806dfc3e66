"""Whether an output can be written, asked before the work for it begins."""

from __future__ import annotations

import os
from pathlib import Path

from .remote import is_url


def check_file(path: str | os.PathLike[str], name: str = "output") -> None:
    """Raises OSError, which says what to do, for a file that cannot be written: a folder, one in a folder that is not
    there, or one without permission."""
    file = Path(path).absolute()
    if file.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got a folder: {path}; such as {Path(path) / file.name}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {file.parent}; make it first")
    _check_permission(file.parent, name)
    if file.exists():
        _check_permission(file, name)


def check_folder(path: str | os.PathLike[str], name: str = "output") -> None:
    """The same for a folder, which need not be there, nor those above it; of a URL the run itself asks, at once."""
    if is_url(path):
        return
    folder = Path(path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, but {folder} is a file")
    _check_permission(folder, name)


def _check_permission(path: Path, name: str) -> None:
    if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
        raise PermissionError(f"{name}: no permission to write to {path}")
