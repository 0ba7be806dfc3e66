"""The options of a run, for `xtoken.align_corpus` and the command line alike: defaults, checks, and a line of help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from ..alignment import METHODS

SHARD_BYTES = 64 << 20
"""Default size of a shard in bytes of input: half a minute of work for one core."""


def _option(default: Any, help: str, kind: type = str, known: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "type": kind, "known": known})


@dataclass(frozen=True)
class Options:
    """The options of `xtoken.align_corpus`, which documents them. Raises ValueError for values that are not known."""

    text_column: str = _option("text", "column or field with the text")
    max_length: int | None = _option(None, "cut documents where both sides fit into so many tokens", int)
    method: str = _option("auto", "alignment method", known=METHODS)
    engine: str = _option("local", "where the shards are made", known=("local", "ray"))
    workers: int | None = _option(None, "processes (default: 1 with local, which uses all processors)", int)
    resume: bool = _option(False, "go on with a run that was stopped", bool)
    on_error: str = _option("raise", "what to do about broken lines", known=("raise", "skip"))
    shard_bytes: int = _option(SHARD_BYTES, "input bytes a shard", int)
    progress: bool | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value, known = getattr(self, one.name), one.metadata.get("known")
            if known and value not in known:
                raise ValueError(f"{one.name}: expected one of {known}, got {value!r}")
            if one.metadata.get("type") is int and value is not None and value < 1:
                raise ValueError(f"{one.name}: expected at least 1, got {value}")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Gives a command these options. What they may be is checked here, not by argparse."""
        for one in (one for one in fields(cls) if one.metadata):
            help, kind, known = (one.metadata[name] for name in ("help", "type", "known"))
            more: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind, "default": one.default}
            if known:
                more["metavar"] = "{" + ",".join(known) + "}"
            if kind is not bool and one.default is not None:
                help += " (default %(default)s)"
            parser.add_argument("--" + one.name.replace("_", "-"), help=help, **more)

    @classmethod
    def given(cls, namespace: argparse.Namespace) -> dict[str, Any]:
        """The options among parsed arguments, by name."""
        return {one.name: getattr(namespace, one.name) for one in fields(cls) if one.metadata}
