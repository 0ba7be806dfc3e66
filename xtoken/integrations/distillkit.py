"""Log-probabilities that DistillKit has captured (``distillkit.sample_logits_vllm``), as a teacher cache of xtoken.

A capture is a folder with ``compression_config.yaml``, ``data_0.parquet`` and so on. A row is a document of T tokens:

===================== ================================================================================
input_ids             T token ids; a pad token may have been appended, so that the last real one has a row
bytepacked_indices    for tokens 1 ... T - 1, k ids of ceil(log2 d) bits each, the highest bit first
compressed_logprobs   for the same, bytes of k falling log-probabilities: `Compression`
===================== ================================================================================
"""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xtoken.corpus.files import find_files
from xtoken.losses import TopKLogits
from xtoken.remote import arrow_file
from xtoken.storage import read_yaml
from xtoken.teacher_cache import TeacherCache, TeacherCacheWriter
from xtoken.vocabulary import TokenizerLike

__all__ = ["Compression", "import_logits"]

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "bytepacked_indices", "compressed_logprobs")
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_CURVES = {"sqrt": np.sqrt, "exp": np.exp}
_MOST_BITS = 56
"""Of a number that is read: what float64 and shifts of int64 hold with room."""
_MOST_TOKENS = 1 << 24
_MOST_TERMS = 100

OVERFULL = 1.01
"""Listed probabilities of a row that sum to more are told: the approximation was coarse."""

ROWS = 64
"""Documents in memory at a time."""


@dataclass(frozen=True)
class Compression:
    """How a capture holds the k log-probabilities of a position, one after the other and the largest first.

    The first `exact_k` are numbers of `exact_dtype`. The others are ``sum_j c_j term_j(t)`` plus a residual, t = 0, 1,
    ... counting from the first of them (from 0 to 1 with `normalize_t`), with the coefficients as numbers of
    `term_dtype`; a term is a power of t, ``sqrt`` or ``exp``. The residuals follow bin by bin: a scale of
    `scale_dtype`, then `num_elements` integers of `element_bits`, the highest bit first, padded to whole bytes. With
    `delta_encoding` all of these are differences to the one before.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Mapping[str, Any], ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        counts = {"d": (self.d, 1, _MOST_TOKENS), "k": (self.k, 1, self.d), "exact_k": (self.exact_k, 0, self.k)}
        for k, one in enumerate(self.residual_bins):
            if not isinstance(one, Mapping) or one.keys() != {"scale_dtype", "element_bits", "num_elements"}:
                raise ValueError(
                    f"residual_bins: expected scale_dtype, element_bits and num_elements, got {reprlib.repr(one)}"
                )
            counts[f"residual_bins[{k}].element_bits"] = (one["element_bits"], 1, _MOST_BITS)
            counts[f"residual_bins[{k}].num_elements"] = (one["num_elements"], 1, self.k)
        for name, (value, low, high) in counts.items():
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {reprlib.repr(value)}")
        if sum(one["num_elements"] for one in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins: expected at most k - exact_k elements in all")
        for dtype in (self.exact_dtype, self.term_dtype, *(one["scale_dtype"] for one in self.residual_bins)):
            if type(dtype) is not str or dtype not in _BYTES:
                names = "exact_dtype, term_dtype, scale_dtype"
                raise ValueError(f"{names}: expected one of {', '.join(_BYTES)}, got {reprlib.repr(dtype)}")
        for term in self.polynomial_terms:
            if type(term) not in (int, str) or (term not in _CURVES and term not in range(_MOST_TERMS)):
                raise ValueError(f"polynomial_terms: expected powers, 'sqrt' or 'exp', got {reprlib.repr(term)}")
        if len(set(self.polynomial_terms)) < len(self.polynomial_terms):
            raise ValueError("polynomial_terms: expected each once")

    @classmethod
    def read(cls, content: Any) -> Compression:
        """From DistillKit's ``compression_config.yaml`` or ``logprob_compressor``. Raises ValueError, by the field."""
        if not isinstance(content, Mapping):
            raise ValueError(f"expected a mapping of d, k, exact_k ..., got {reprlib.repr(content)}")
        unknown = sorted(map(str, content.keys() - cls.__dataclass_fields__.keys()))
        lacking = sorted({"d", "k", "exact_k"} - content.keys())
        if unknown or lacking:
            raise ValueError(f"{', '.join(unknown or lacking)}: {'unknown here' if unknown else 'missing'}")
        lists = {name: content.get(name) or () for name in ("polynomial_terms", "residual_bins")}
        for name, value in lists.items():
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: expected a list, got {reprlib.repr(value)}")
        return cls(**{**content, **{name: tuple(value) for name, value in lists.items()}})

    @property
    def id_bits(self) -> int:
        """Bits of a token id: ceil(log2 d)."""
        return max(1, int(np.ceil(np.log2(np.float32(self.d)))))  # in float32, as DistillKit

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a position in ``bytepacked_indices`` and in ``compressed_logprobs``."""
        return _packed(self.k, self.id_bits), sum(self._parts())

    def ids(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[R, bytes] to token ids [R, k]."""
        return _integers(packed, self.k, self.id_bits)

    def logprobs(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """[R, bytes] to log-probabilities [R, k]."""
        places = iter(np.split(packed, np.cumsum(self._parts())[:-1], axis=1))
        exact = _floats(next(places), self.exact_dtype)
        coefficients = _floats(next(places), self.term_dtype)
        rest = self.k - self.exact_k
        t = np.linspace(0.0, 1.0, rest) if self.normalize_t else np.arange(rest, dtype=np.float64)
        curves = [_CURVES[one](t) if isinstance(one, str) else t**one for one in self.polynomial_terms]
        approximate = coefficients @ np.array(curves).reshape(len(curves), rest)
        first = 0
        for one in self.residual_bins:
            bits, count = one["element_bits"], one["num_elements"]
            scale = _floats(next(places), one["scale_dtype"])
            steps = _integers(next(places), count, bits)
            approximate[:, first : first + count] += scale * (2 * steps - 1 if bits == 1 else steps - (1 << (bits - 1)))
            first += count
        both = np.concatenate([exact, approximate], axis=1)
        return both.cumsum(1) if self.delta_encoding else both

    def _parts(self) -> list[int]:
        """Bytes of the parts of ``compressed_logprobs``."""
        parts = [self.exact_k * _BYTES[self.exact_dtype], len(self.polynomial_terms) * _BYTES[self.term_dtype]]
        for one in self.residual_bins:
            parts += [_BYTES[one["scale_dtype"]], _packed(one["num_elements"], one["element_bits"])]
        return parts


def _packed(count: int, bits: int) -> int:
    """Bytes of `count` integers."""
    return -(-count * bits // 8)


def _integers(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """[R, bytes] to [R, count] unsigned integers, the highest bit first."""
    single = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
    return single @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _floats(packed: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """[R, bytes] to numbers, little-endian."""
    held = np.ascontiguousarray(packed)
    if dtype == "bfloat16":
        return (held.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return held.view(f"<f{_BYTES[dtype]}").astype(np.float64)


def import_logits(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    teacher_tok: TokenizerLike,
    *,
    config: Mapping[str, Any] | None = None,
    pad_id: int | None = None,
) -> TeacherCache:
    """Writes what DistillKit has captured of a teacher as a teacher cache, for every loss and student.

    Log-probabilities are approximations where the capture has them so; the cache rounds them to float16, and where the
    listed probabilities of a row sum to more than 1 it scales them down. A warning tells how many rows sum to more than
    1.01. Documents are found by their token ids, so texts and chat templates in training must be those of the capture.

    Parameters
    ----------
    source : path
        A folder as ``distillkit.sample_logits_vllm`` writes it: one document a row. Rows that are several documents
        packed, and DistillKit's older compression (``packed_indices``), are not read.
    output : path
        The cache's folder, new or empty.
    teacher_tok
        The tokenizer of the capture, as for `Vocabulary.from_tokenizer`.
    config : mapping, optional
        DistillKit's ``logprob_compressor``, for a folder without ``compression_config.yaml``.
    pad_id : int, optional
        The token that DistillKit appended to documents; one at the end of a document is left out. Default: that of the
        tokenizer's pad role. Without one, DistillKit has taken the end token, with or without which a cache finds a
        document.

    Raises
    ------
    FileNotFoundError
        If there are no files.
    ValueError
        If a file holds something else, naming it and the row, or changes while it is read.
    """
    folder = Path(source)
    files = sorted(folder.glob("data_*.parquet"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise FileNotFoundError(f"source: no data_*.parquet in {folder}")
    compression = _compression(folder, config)
    overfull = rows = 0
    with TeacherCacheWriter(output, teacher_tok, compression.k) as writer:
        pad = writer.vocabulary.roles.get("pad") if pad_id is None else pad_id
        for where, tokens, packed in _documents(files):
            try:
                ids, logprobs = _unpacked(compression, tokens, packed)
                if len(tokens) and tokens[-1] == pad:
                    tokens = tokens[:-1]
                logits = TopKLogits(torch.from_numpy(ids), torch.from_numpy(logprobs))
                overfull += int((np.exp(logprobs).sum(1) > OVERFULL).sum())
                rows += len(logprobs)
                writer.add(tokens.tolist(), logits)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    if overfull:
        told = f"{source}: listed probabilities of {overfull} of {rows} rows sum to more than {OVERFULL}"
        warnings.warn(f"{told}; they were scaled down", stacklevel=2)
    return TeacherCache(output, teacher_tok)


def _compression(folder: Path, config: Mapping[str, Any] | None) -> Compression:
    name = "config"
    if config is None:
        name = str(folder / CONFIG)
        try:
            config = read_yaml(folder / CONFIG)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name}: no such file; give its content as config=") from None
    try:
        return Compression.read(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _documents(files: list[Path]) -> Iterator[tuple[str, NDArray[np.int64], tuple[Any, Any]]]:
    """Each document: where it is, its token ids, and its two columns of bytes as lists of Arrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for found in find_files(files):
        path = found.path
        try:
            with arrow_file(Path(path)) as source, pq.ParquetFile(source) as file:
                _check_columns(file.schema_arrow)
                number = 0
                for batch in file.iter_batches(ROWS, columns=list(COLUMNS)):
                    for row in range(len(batch)):
                        tokens, *packed = (batch.column(name)[row].values for name in COLUMNS)
                        if tokens is None or None in packed or any(one.flatten().null_count for one in packed):
                            raise ValueError(f"row {number}: expected values, got null")
                        ids = tokens.cast(pa.int64()).to_numpy(zero_copy_only=False)
                        yield f"{path}: row {number}", ids, (packed[0], packed[1])
                        number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a capture of DistillKit: {error}") from error
        found.check_unchanged()


def _check_columns(schema: Any) -> None:
    from pyarrow import types

    for name, depth in zip(COLUMNS, (1, 2, 2), strict=True):
        if name not in schema.names:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(schema.names)}")
        kind = schema.field(name).type
        for _ in range(depth):
            kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else None
        if kind is None or not types.is_integer(kind):
            raise ValueError(f"{name}: expected {'lists of ' * depth}integers, got {schema.field(name).type}")


def _unpacked(
    compression: Compression, tokens: NDArray[np.int64], packed: tuple[Any, Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probabilities [T - 1, k] of a document."""
    tables = []
    for name, column, size in zip(COLUMNS[1:], packed, compression.sizes, strict=True):
        widths = np.diff(column.offsets.to_numpy())
        if len(column) != max(0, len(tokens) - 1) or not (widths == size).all():
            got = f"{len(column)} of {', '.join(map(str, sorted(set(widths.tolist()))))} bytes"
            raise ValueError(f"{name}: expected {size} bytes for each of {len(tokens)} tokens but the first, got {got}")
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.uint8)
        tables.append(values.reshape(len(column), size))
    if len(tokens) < 2:
        return np.zeros((0, compression.k), np.int64), np.zeros((0, compression.k))
    ids, logprobs = compression.ids(tables[0]), compression.logprobs(tables[1])
    if len(ids) and (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise ValueError("bytepacked_indices: a token is listed twice; is the compression config that of the capture?")
    return ids, logprobs
