"""W, piece index and an alignment of Llama 3 and Qwen3 for machines without their tokenizers: bench/data.

python bench/real_pair.py    # writes the file anew, from the tokenizers
"""

from __future__ import annotations

import io
import itertools
import lzma
from typing import Any

import numpy as np
import torch
from cases import Pair
from measure import ROOT, load_tokenizers
from numpy.typing import NDArray

import xtoken
from xtoken.pieces import Side

FILE = ROOT / "bench" / "data" / "llama3-qwen3.npz.xz"
ALIGNED_TOKENS = 600
"""Of the student's, in a text full of numbers."""


def load() -> tuple[Pair, xtoken.Alignment]:
    """The pair as the library builds it, with events in another order, and the alignment of a text full of numbers."""
    with np.load(io.BytesIO(lzma.decompress(FILE.read_bytes()))) as stored:
        arrays = {name: stored[name] for name in stored.files}
    row_ptr = _ends(arrays["row_counts"]).astype(np.int64)
    col = arrays["col_steps"].cumsum().astype(np.int32)
    size = len(arrays["teacher_counts"])
    W = xtoken.ProjectionMatrix(
        *map(torch.from_numpy, (row_ptr, col, arrays["weights"][arrays["weight"]])), teacher_vocab_size=size
    )
    ids = (torch.from_numpy(arrays[f"{name}_ids"]).long() for name in ("student", "teacher"))
    return Pair(W, _piece_index(arrays)), xtoken.Alignment(torch.from_numpy(arrays["spans"]), None, *ids)


def store() -> None:
    from bench_losses import numbers_alignment

    student, teacher = map(xtoken.Vocabulary.from_tokenizer, load_tokenizers("llama3", "qwen3"))
    W, index = xtoken.ProjectionMatrix.build(student, teacher), xtoken.PieceIndex.build(student, teacher, texts=())
    aligned = numbers_alignment(student, teacher, ALIGNED_TOKENS)
    weights, weight = np.unique(W.weight.numpy(), return_inverse=True)
    col = W.col.numpy()
    assert len(weights) <= 256
    assert aligned.student_ids is not None
    assert aligned.teacher_ids is not None
    arrays: dict[str, NDArray[Any]] = {
        "row_counts": W.row_ptr.diff().numpy().astype(np.uint8),
        "col_steps": np.diff(col, prepend=0).astype(np.int32),
        "weights": weights,
        "weight": weight.astype(np.uint8),
        "spans": aligned.spans.numpy().astype(np.int32),
        "student_ids": aligned.student_ids.numpy().astype(np.int32),
        "teacher_ids": aligned.teacher_ids.numpy().astype(np.int32),
    }
    for name, side in (("student", index.student), ("teacher", index.teacher)):
        arrays[f"{name}_counts"] = side.ptr.diff().numpy().astype(np.uint8)
        arrays[f"{name}_pieces"] = np.diff(side.pieces.numpy(), prepend=0).astype(np.int32)
        arrays[f"{name}_lengths"] = side.length.numpy().astype(np.uint16)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(lzma.compress(buffer.getvalue(), preset=9))


def _ends(counts: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([[0], counts.cumsum(dtype=np.int32)]).astype(np.int32)


def _piece_index(arrays: dict[str, NDArray[Any]]) -> xtoken.PieceIndex:
    """From the pieces and lengths; order and events follow from these, see `xtoken.pieces.Side`."""
    names = ("student", "teacher")
    ptr = [_ends(arrays[f"{name}_counts"]) for name in names]
    pieces = [arrays[f"{name}_pieces"].cumsum().astype(np.int32) for name in names]
    lists = [[tuple(p[a:b].tolist()) for a, b in itertools.pairwise(at)] for p, at in zip(pieces, ptr, strict=True)]
    event = _events(lists)
    sides = []
    for side, name in enumerate(names):
        keys = np.append(event[1 - side], np.iinfo(np.int32).max)  # pieces by events first
        sequences = [[(int(keys[piece]), piece) for piece in one] for one in lists[side]]
        order = np.array(sorted(range(len(sequences)), key=sequences.__getitem__), np.int32)
        lengths = arrays[f"{name}_lengths"].astype(np.int32)
        joined = np.zeros(len(order) + 1, np.int32), np.zeros(0, np.int32)  # they take the bytes
        sides.append(Side(event[side], lengths, order, ptr[side], pieces[side], *joined))
    counts = [len(pieces[0]), len(pieces[1]), 0, 0]
    head = [len(lists[0]), len(lists[1]), 1 + max(int(one.max()) for one in event), *counts]
    return xtoken.PieceIndex(np.concatenate([np.array(head, np.int32), *sides[0], *sides[1]]))


def _events(lists: list[list[tuple[int, ...]]]) -> list[NDArray[Any]]:
    """The event of each token: that of the pair it belongs to, else of its first piece; tokens without share one."""

    def root(side: int, token: int) -> tuple[int, ...]:
        while True:
            mine = lists[side][token]
            if not mine or mine[0] >= len(lists[1 - side]):
                return (-1,)
            if len(mine) == 1:  # the token of the other side with the same text
                return mine if side == 0 else lists[0][mine[0]]
            side, token = 1 - side, mine[0]

    roots = [[root(side, token) for token in range(len(lists[side]))] for side in (0, 1)]
    found = sorted({one for side in roots for one in side} - {(-1,)})
    number = {one: k for k, one in enumerate(found)} | {(-1,): len(found)}
    return [np.array([number[one] for one in side], np.int32) for side in roots]


if __name__ == "__main__":
    store()
