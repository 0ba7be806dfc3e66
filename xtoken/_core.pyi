from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str
compiler: str
build_type: str
token_kinds: tuple[str, ...]
row_kinds: tuple[str, ...]

def cpu_features() -> list[str]: ...
def available_processors() -> int: ...
def byte_level_bytes(pieces: list[str], /) -> list[bytes]: ...
def byte_level_piece(bytes: bytes, /) -> str: ...

class Vocabulary:
    def __init__(self, tokens: list[bytes], kinds: NDArray[np.uint8], roles: list[tuple[str, int]]) -> None: ...
    def __len__(self) -> int: ...
    def join(self, ids: NDArray[np.int64], /) -> bytes: ...

class DpLimits:
    cell_budget: int
    window_edges: int
    all_ties: bool
    plain_cells: int
    first_slack: int
    slack_growth: int
    plain_share: int
    row_bytes: int

def dp_moves(
    student_tokens: list[bytes],
    teacher_tokens: list[bytes],
    student_special: list[bool] | None = None,
    teacher_special: list[bool] | None = None,
    limits: DpLimits = ...,
) -> tuple[NDArray[np.uint8], float, bool, int]: ...
def table_moves(
    student_tokens: list[bytes],
    teacher_tokens: list[bytes],
    student_special: list[bool] | None = None,
    teacher_special: list[bool] | None = None,
) -> tuple[NDArray[np.uint8], float]: ...

default_cell_budget: int

class AlignMethod(Enum):
    auto = ...
    bytes = ...
    dp = ...

class Aligner:
    def __init__(self, student: Vocabulary, teacher: Vocabulary, fold_space_punctuation: bool) -> None: ...
    def align(
        self,
        student_ids: list[NDArray[np.int64]],
        student_masks: list[NDArray[np.uint8]] | None,
        teacher_ids: list[NDArray[np.int64]],
        teacher_masks: list[NDArray[np.uint8]] | None,
        method: AlignMethod,
        cell_budget: int,
        threads: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]: ...

def exact_images(
    student: Vocabulary, teacher: Vocabulary, fold_space_punctuation: bool
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]: ...

class LongestMatch:
    def __init__(self, vocabulary: Vocabulary) -> None: ...
    def encode(self, text: bytes, /) -> list[int]: ...

_SparseRows = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]

def build_rows(
    image: NDArray[np.int32],
    rows: NDArray[np.int32],
    piece_ptr: NDArray[np.int64],
    piece_ids: NDArray[np.int32],
    teacher_size: int,
    beta: float,
    gamma: float,
    top_k: int,
) -> _SparseRows: ...
def add_reverse(
    row_ptr: NDArray[np.int64],
    col: NDArray[np.int32],
    weight: NDArray[np.float32],
    columns: NDArray[np.int32],
    piece_ptr: NDArray[np.int64],
    piece_ids: NDArray[np.int32],
    beta: float,
    gamma: float,
    top_k: int,
) -> _SparseRows: ...
def partners(student: Vocabulary, teacher: Vocabulary) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def build_piece_index(
    student: Vocabulary,
    teacher: Vocabulary,
    student_rows: NDArray[np.int32],
    student_ptr: NDArray[np.int64],
    student_ids: NDArray[np.int32],
    teacher_rows: NDArray[np.int32],
    teacher_ptr: NDArray[np.int64],
    teacher_ids: NDArray[np.int32],
) -> NDArray[np.int32]: ...
def merge_events(data: NDArray[np.int32], event_of: NDArray[np.int32]) -> NDArray[np.int32]: ...
def check_piece_index(data: NDArray[np.int32]) -> None: ...
def inner_boundaries(
    data: NDArray[np.int32],
    student_start: NDArray[np.int64],
    student_count: NDArray[np.int64],
    student_next: NDArray[np.int64],
    teacher_start: NDArray[np.int64],
    teacher_count: NDArray[np.int64],
    teacher_next: NDArray[np.int64],
) -> NDArray[np.int64]: ...
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...

class Built:
    """What `build` has made, for fields of launchers."""

    @property
    def kind(self) -> str: ...

def wrong_chunk(spans: NDArray[np.int32], offsets: NDArray[np.int64]) -> int: ...
def predictor_rows(
    spans: NDArray[np.int32], offsets: NDArray[np.int64], predicted: NDArray[np.bool_]
) -> NDArray[np.int64]: ...
def digest(bytes: NDArray[np.uint8], /) -> int: ...
def sliced_lists(
    begin: NDArray[np.int64], counts: NDArray[np.int32], lanes: int, longest: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]: ...
def build(name: str, fields: dict[str, Any]) -> Built: ...
def launch(name: str, fields: dict[str, Any], level: str, threads: int) -> None: ...
