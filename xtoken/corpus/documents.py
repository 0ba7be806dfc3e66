"""What readers return: batches of documents, and what happens to a broken one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .files import InputFile

DOCUMENTS = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])
"""A batch of documents; neither column holds nulls."""

BATCH_BYTES = 2 << 20
"""Text of a batch: enough documents to keep tens of threads busy, little enough to hold several in memory."""

ID = "id"
"""Column or field that names a document, if there is one."""


class Broken:
    """What becomes of broken lines and rows: an error ("raise"), or a count by name of the file, `skipped` ("skip")."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()

    def __call__(self, file: InputFile, number: int, reason: str) -> None:
        """Reports that line or row `number` of `file` is no document."""
        if self.on_error == "raise":
            raise ValueError(f"{file.path}, {file.unit} {number}: {reason}")
        self.skipped[file.name] += 1


def documents(ids: Any, texts: Any) -> pa.RecordBatch:
    """A batch of documents from columns or lists."""
    columns = [
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else pa.array(column, pa.string())
        for column in (ids, texts)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=DOCUMENTS)


def numbered(file: InputFile, numbers: Any) -> pa.Array:
    """Ids ``file:number`` for documents without one."""
    return pc.binary_join_element_wise(pa.scalar(file.name), pa.array(numbers, pa.int64()).cast(pa.string()), ":")
