"""NeMo-RL's files of W: what its tools write (``tools/x_token``) and its loss reads (``parse_projection_file``).

`torch.save` of a dict, in one of two forms:

* ``indices`` int [V_student, k], teacher ids, -1 where a row has fewer, and ``likelihoods`` [V_student, k]; the tools
  add ``student_model_id``, ``teacher_model_id`` and ``enable_scale_trick``, which the loss does not read;
* (student id, teacher id) to weight, without sizes.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_WIDTH = 2
"""Columns of a table: NeMo-RL takes a token for an exact match if its weight is 1 and its second index is -1."""


def read(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Indices and weights [V_student, k] of a file of the first form; rows, columns and weights [nnz] of the second.

    No code in it is run. Raises FileNotFoundError, and ValueError if the file holds something else, is damaged, or was
    not written by `torch.save` (zip).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, damaged = sum(one.file_size for one in archive.infolist()), archive.testzip()
        if unpacked > os.path.getsize(path) or damaged:
            raise ValueError(f"{damaged} is damaged" if damaged else f"it unpacks to {unpacked} bytes")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise any exception
        raise ValueError(f"{path}: not a complete file of torch.save: {error}") from error
    if isinstance(content, dict) and {"indices", "likelihoods"} <= content.keys():
        return _table(path, content, unpacked)
    if isinstance(content, dict) and content and all(map(_is_entry, content.items())):
        entries = torch.tensor(list(content), dtype=torch.int64, device="cpu")
        return entries[:, 0], entries[:, 1], torch.tensor(list(content.values()), dtype=torch.float32, device="cpu")
    expected = "'indices' and 'likelihoods', or of (student id, teacher id) to weight"
    raise ValueError(f"{path}: expected a dict with {expected}")


def _table(path: str | os.PathLike[str], content: dict[str, Any], unpacked: int) -> tuple[Tensor, Tensor]:
    for name in ("indices", "likelihoods"):
        one, integral = content[name], name == "indices"
        is_right = isinstance(one, Tensor) and one.layout is torch.strided and one.device.type == "cpu"
        if not is_right or one.is_quantized or (one.is_floating_point(), one.is_complex()) != (not integral, False):
            raise ValueError(f"{path}: {name}: expected a table of {'integers' if integral else 'weights'}")
        if one.numel() * one.element_size() > unpacked:  # strides of 0 make any size of a few bytes
            raise ValueError(f"{path}: {name}: expected what the file holds, got {list(one.shape)}")
    return content["indices"], content["likelihoods"]


def _is_entry(item: tuple[Any, Any]) -> bool:
    key, weight = item
    ids = isinstance(key, tuple) and len(key) == 2 and all(type(one) is int and 0 <= one < 2**31 for one in key)
    return ids and type(weight) in (int, float)


def table(row_ptr: Tensor, row: Tensor, col: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The first form of a matrix in compressed rows: entries of each row by falling weight."""
    place = torch.arange(len(col), device="cpu") - row_ptr[row]
    width = max(int(place.max()) + 1 if len(col) else 0, LEAST_WIDTH)
    indices = torch.full((len(row_ptr) - 1, width), -1, dtype=torch.int64, device="cpu")
    likelihoods = torch.zeros(indices.shape, dtype=torch.float32, device="cpu")
    indices[row, place] = col.long()
    likelihoods[row, place] = weight
    likelihoods, order = likelihoods.sort(dim=1, descending=True, stable=True)
    return {"indices": indices.gather(1, order), "likelihoods": likelihoods}
