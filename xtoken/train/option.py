"""Options of ``xtoken train`` as fields of dataclasses."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help; `metadata` are further arguments for argparse."""
    return field(default=default, metadata={"help": help, **metadata})
