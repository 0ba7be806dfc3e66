"""Checkpoints to go on from: the newest that is complete, with all that a run needs to go on as if nothing had been."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xtoken.report.run import STATE as STATE
from xtoken.report.run import checkpoints_in
from xtoken.storage import named

logger = logging.getLogger(__name__)

WEIGHTS = ("*model*.safetensors", "*model*.bin", "*.distcp", "*model_fsdp*")
"""Files with the weights of a model, or of its adapters; one of DeepSpeed has a folder ``global_step*``."""


def fault(folder: Path) -> str | None:
    """What a checkpoint lacks that was killed while it was written; None if it is complete.

    The Trainer writes its state last. Files that end early are found by what stands at their beginning or end; those of
    `torch.save`, which have checksums that `torch.load` does not look at, are read. Raises OSError for a file that
    cannot be read, as without permission, which says nothing of what it holds.
    """
    for path in folder.rglob("*"):  # reading a pipe or a device may never end
        if path.exists() and not path.is_file() and not path.is_dir():
            return f"{path.relative_to(folder)} is no regular file"
    try:
        state = json.loads(_text(folder / STATE))
        steps, most, epochs = state["global_step"], state.get("max_steps", 0), state.get("num_train_epochs", 0)
        if not all(type(one) is int and one >= 0 for one in (steps, most, epochs)) or steps > most > 0:
            return f"{STATE} is damaged"
    except FileNotFoundError:
        return f"no {STATE}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{STATE} is damaged"
    if not any(folder.glob("global_step*")) and not any(any(folder.rglob(name)) for name in WEIGHTS):
        return "no weights of the model"
    for path in folder.glob("*.index.json"):  # weights in several files
        try:
            lacking = {*json.loads(_text(path))["weight_map"].values()} - {one.name for one in folder.iterdir()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{path.name} is damaged"
        if lacking:
            return f"no {min(lacking)}"
    for path in sorted(folder.rglob("*.safetensors")):  # adapters may have folders of their own
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.relative_to(folder)} is damaged"
    pickled = sorted(one for ending in ("pt", "pth", "bin") for one in folder.glob(f"*.{ending}"))
    damaged = (one.name for one in pickled if not _is_whole(one))
    return next((f"{name} is damaged" for name in damaged), None)


def _is_whole(path: Path) -> bool:
    """Whether a zip file's contents have their checksums."""
    try:
        with named(path), zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception as error:  # of many kinds, by what is damaged
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place that the file lacks
            raise
        return False


@contextlib.contextmanager
def saving(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of writing as OSError that names the folder: what torch, safetensors and tokenizers say of a full disk
    names no file, and is of no kind of its own."""
    try:
        with named(folder):
            yield
    except Exception as error:
        if type(error) in (Exception, RuntimeError, SafetensorError):
            raise OSError(f"{folder}: cannot write to it: {error}") from error
        raise


def _text(path: Path) -> str:
    with named(path):
        return path.read_text()


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of an output folder; says which later ones are not."""
    for path in checkpoints_in(Path(folder)):
        why = fault(path)
        if why is None:
            return path
        logger.warning("%s is left out: it was not written to its end (%s)", path, why)
    return None


def check_output(folder: Path, resume: bool, resumed: str | os.PathLike[str] | None) -> None:
    """Raises ValueError if an output folder holds a model or checkpoints, which the run would write over, and the
    checkpoint that is `resumed` is none of them."""
    if resumed is not None and Path(resumed).resolve().parent == folder.resolve():
        return
    held = sorted(one.name for name in WEIGHTS for one in folder.glob(name))
    held += [] if resume else [one.name for one in checkpoints_in(folder)]
    if held:
        what = f"{folder} holds {held[0]}" + (" but no complete checkpoint" if resume else "")
        how = "" if resume else ", or resume (--resume) what is in it"
        raise ValueError(f"output: {what}; give another folder{how}")


def check(folder: Path, weights_only: bool) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises ValueError if it is not complete, or has no optimizer, scheduler or state of random numbers, unless
    `weights_only` wants none of these; FileNotFoundError if there is no checkpoint.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no such folder: {folder}")
    if (why := fault(folder)) is not None:
        raise ValueError(f"resume_from_checkpoint: {folder} was not written to its end: {why}")
    is_deepspeed = any(folder.glob("global_step*"))
    has_optimizer = is_deepspeed or any((*folder.glob("optimizer*.pt"), *folder.glob("optimizer*.bin"),
                                         *folder.glob("optimizer_*")))  # fmt: skip
    missing = [] if has_optimizer else ["optimizer.pt"]
    missing += [] if is_deepspeed or (folder / "scheduler.pt").exists() else ["scheduler.pt"]
    missing += [] if any(folder.glob("rng_state*.pth")) else ["rng_state.pth"]
    if missing and not weights_only:
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {' and no '.join(missing)}, so that the run would not go on as "
            "it began; resume_weights_only=True goes on with a new optimizer and schedule"
        )
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def is_finished(state: dict[str, Any], max_steps: int, epochs: float) -> bool:
    """Whether a run of so many steps (or epochs, where those are not above 0) has nothing left to do."""
    if max_steps > 0:
        return bool(state["global_step"] >= max_steps)
    return bool(state["global_step"] >= state.get("max_steps", 0) > 0 and epochs <= state.get("num_train_epochs", 0))
