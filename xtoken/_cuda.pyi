"""The launchers of the CUDA kernels, and facts about their build."""

from collections.abc import Mapping
from typing import Any

architectures: str
cuda_version: int
max_threads: int

def launch(name: str, fields: Mapping[str, Any], blocks: int, threads: int, stream: int) -> None: ...
def workspace(name: str, fields: Mapping[str, Any]) -> int: ...
