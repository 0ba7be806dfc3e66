"""The launchers of the CUDA kernels, and facts about their build."""

from collections.abc import Mapping
from typing import Any

architectures: str
cuda_version: int
max_threads: int
resident_blocks: int

def driver_version() -> int: ...
def compute_capability(device: int) -> int: ...
def launch(name: str, fields: Mapping[str, Any], blocks: int, threads: int, stream: int, device: int) -> None: ...
def workspace(name: str, fields: Mapping[str, Any], device: int) -> int: ...
