"""The options of a run: defaults and checks."""

from __future__ import annotations

from dataclasses import dataclass

from ..alignment import METHODS

SHARD_BYTES = 64 << 20
"""Default size of a shard in bytes of input: half a minute of work for one core."""


KNOWN: dict[str, tuple[str, ...]] = {"method": METHODS, "engine": ("local", "ray"), "on_error": ("raise", "skip")}
"""What an option may be."""


@dataclass(frozen=True)
class Options:
    """The options of `xtoken.align_corpus`, which documents them. Raises ValueError for values that are not known."""

    text_column: str = "text"
    max_length: int | None = None
    method: str = "auto"
    engine: str = "local"
    workers: int | None = None
    resume: bool = False
    on_error: str = "raise"
    shard_bytes: int = SHARD_BYTES
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("max_length", "workers", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
