from enum import Enum

import numpy as np
from numpy.typing import NDArray

version: str
compiler: str
build_type: str
token_kinds: tuple[str, ...]
row_kinds: tuple[str, ...]

def cpu_features() -> list[str]: ...
def available_processors() -> int: ...

class TokenSpelling(Enum):
    literal = ...
    byte_level = ...
    metaspace = ...
    wordpiece = ...

def spelled_bytes(pieces: list[str], spelling: TokenSpelling, word_prefix: str = "##") -> list[bytes]: ...
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

SparseRows = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]

def build_rows(
    image: NDArray[np.int32],
    rows: NDArray[np.int32],
    piece_ptr: NDArray[np.int64],
    piece_ids: NDArray[np.int32],
    teacher_size: int,
    beta: float,
    gamma: float,
    top_k: int,
) -> SparseRows: ...
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
) -> SparseRows: ...
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
def cpu_exp(
    x: NDArray[np.float32], centre: float, temperature: float, level: str
) -> tuple[NDArray[np.float32], float]: ...
def cpu_log(x: NDArray[np.float32], level: str) -> NDArray[np.float32]: ...
def cpu_to_float(x: NDArray[np.uint16], element: str, level: str) -> NDArray[np.float32]: ...
def cpu_from_float(x: NDArray[np.float32], element: str, level: str) -> NDArray[np.uint16]: ...

LogitsArgument = tuple[int, str, int, int, int, int, int]
RowsArgument = tuple[int, int, int]
LabelsArgument = tuple[int, float, int]

class CpuMatrix:
    def __init__(self, row_ptr: NDArray[np.int64], col: NDArray[np.int32], teacher_size: int) -> None: ...

class CpuPlan:
    def __init__(self, matrix: CpuMatrix, weight: NDArray[np.float32], columns: NDArray[np.int32]) -> None: ...
    def reweighted(self, matrix: CpuMatrix, weight: NDArray[np.float32]) -> CpuPlan: ...
    entries: int

def cpu_pkl(
    plan: CpuPlan,
    student: LogitsArgument,
    teacher: LogitsArgument,
    grad: LogitsArgument,
    student_rows: RowsArgument,
    teacher_rows: RowsArgument,
    chunks: int,
    scale: int,
    losses: int,
    weight_grad: int,
    labels: LabelsArgument,
    temperature: float,
    merge: str,
    reverse: bool,
    lowest: float,
    epsilon: float,
    level: str,
    threads: int,
) -> None: ...

class CpuGoldPlan:
    def __init__(
        self, student_ids: NDArray[np.int64], teacher_ids: NDArray[np.int64], students: int, teachers: int
    ) -> None: ...

def cpu_gold(
    plan: CpuGoldPlan | None,
    student: LogitsArgument,
    teacher: LogitsArgument,
    grad: LogitsArgument,
    student_rows: tuple[int, int, int],
    teacher_rows: tuple[int, int, int],
    chunks: int,
    scale: int,
    losses: int,
    temperature: float,
    reverse: bool,
    top_k: int,
    lowest: float,
    level: str,
    threads: int,
) -> None: ...
def cpu_kd(
    student: LogitsArgument,
    teacher: LogitsArgument,
    grad: LogitsArgument,
    student_rows: RowsArgument,
    teacher_rows: RowsArgument,
    chunks: int,
    scale: int,
    losses: int,
    labels: LabelsArgument,
    temperature: float,
    reverse: bool,
    lowest: float,
    columns: NDArray[np.int32] | None,
    level: str,
    threads: int,
) -> None: ...
def cpu_cross_entropy(
    student: LogitsArgument, grad: LogitsArgument, labels: LabelsArgument, lowest: float, level: str, threads: int
) -> None: ...
def cpu_largest_columns(logits: LogitsArgument, count: int, ids: int, level: str, threads: int) -> None: ...

class CpuPrefixPlan:
    def __init__(self, data: NDArray[np.int32]) -> None: ...

def cpu_prefix(
    plan: CpuPrefixPlan,
    student: LogitsArgument,
    teacher: LogitsArgument,
    grad: LogitsArgument,
    student_rows: RowsArgument,
    teacher_rows: RowsArgument,
    chunks: int,
    scale: int,
    losses: int,
    labels: LabelsArgument,
    temperature: float,
    reverse: bool,
    lowest: float,
    level: str,
    threads: int,
) -> None: ...
