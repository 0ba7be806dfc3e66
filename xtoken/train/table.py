"""Datasets of Hugging Face: by name, and encoded by their `map`, whose cache keeps the examples for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xtoken.corpus import require
from xtoken.corpus.files import FORMATS, PACKED_ENDINGS, find_files
from xtoken.corpus.source import without_nulls
from xtoken.storage import Numbering

from .data import BATCH_ROWS
from .encode import ExampleEncoder
from .report import Report

FORMAT = 2
"""Of the columns that `_encode` makes; a change makes caches of before out of date."""


_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)(?::([\w.-]+))??(?::([\w.+-]+(?:\[[^\]]*\])?))?")


def open_data(given: str, option: str, split: str | None = None, streaming: bool = False) -> Any:
    """What an option names: a path or pattern, as it is; or a `datasets.Dataset`, of a folder that it was saved to, or
    by its name on the Hub, ``org/set:split`` or ``org/set:config:split``.

    Parameters
    ----------
    given : str
        A path that exists comes before a name.
    option : str
        For messages.
    split : str, optional
        If the name has none; None: it must have one.
    streaming : bool
        Whether a dataset of the Hub is read as it is needed, as a `datasets.IterableDataset`.

    Raises FileNotFoundError if no file matches what cannot be a name; ValueError if there is neither a file nor a
    dataset, saying what was tried.
    """
    if os.path.isdir(given):
        is_saved = (Path(given) / "dataset_info.json").is_file()
        return require("datasets", "datasets").load_from_disk(given) if is_saved else given
    try:
        find_files([given], f"--{option}")
    except FileNotFoundError as error:
        found = _NAME.fullmatch(given)
        if found is None or Path(given).suffix.lower() in {*FORMATS, *PACKED_ENDINGS}:
            raise
        return _from_hub(found, f"--{option}: no file matches {given}", split, streaming, error)
    return given


def _from_hub(given: re.Match[str], missing: str, split: str | None, streaming: bool, cause: Exception) -> Any:
    name, config, part = given.groups()
    part = part or split
    if part is None:
        raise ValueError(f"{missing}; of a dataset of the Hub a split is expected, as in {name}:test") from cause
    tried = f"{missing}, and the dataset {name!r} of the Hub" + (f" (configuration {config!r})" if config else "")
    try:
        return require("datasets", "datasets").load_dataset(name, config, split=part, streaming=streaming)
    except Exception as error:  # of many libraries
        raise ValueError(f"{tried} with the split {part!r} cannot be loaded: {error}") from error


def is_table(data: Any) -> bool:
    """Whether it is a `datasets.Dataset`, for which `datasets` need not be imported."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, module.Dataset)


class EncodedTable(Dataset[dict[str, Any]]):
    """Encoded examples of a `datasets.Dataset`, in an Arrow file from which they are read as they are asked for.

    The table's ``map`` encodes them, in `workers` processes if that is given. It keeps the file in the table's cache,
    under a name made of the table's fingerprint and `ExampleEncoder.fingerprint`: another run with the same tokenizers,
    chat templates and options reads it. (A table in memory has no cache, and stays there.)

    Parameters
    ----------
    rows : datasets.Dataset
        Of rows as `ExampleEncoder` takes them; fields that are None are left out.
    encoder : ExampleEncoder
        Its ``report`` is that of all rows, also where they come from the cache.
    workers : int, optional
        Default: none but this process, in which tokenizers use threads. With large vocabularies it takes seconds to
        start workers, since each is sent the encoder: they are for long tables on many cores.

    Raises what `EncodedDataset` does; RuntimeError if a worker dies.
    """

    def __init__(self, rows: Any, encoder: ExampleEncoder, workers: int | None = None) -> None:
        import pyarrow as pa
        from datasets import Features

        if not len(rows):
            raise ValueError("rows: expected something to train on, got none")
        facts = json.dumps([FORMAT, rows._fingerprint, encoder.fingerprint()])
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        try:
            made = rows.with_format(None).map(
                _encode, batched=True, batch_size=BATCH_ROWS, with_indices=True, remove_columns=rows.column_names,
                features=Features.from_arrow_schema(pa.schema(_columns())), num_proc=workers, desc="encoding",
                fn_kwargs={"encoder": encoder, "process": os.getpid()}, new_fingerprint=name,
            )  # fmt: skip
        except Exception as error:
            if type(error).__name__ == "TimeoutError" and workers is not None:  # all that datasets says of it
                raise RuntimeError(f"workers: one of the {workers} processes that encode rows has died") from error
            raise
        self._table = made.with_format("arrow")
        found = made.data.column("examples").chunks
        counts = np.concatenate([one.value_lengths().to_numpy() for one in found])
        self._numbering = Numbering(counts)
        self.dropped = int((counts == 0).sum())
        """Rows of which nothing is trained on."""
        self.encoder = encoder
        encoder.report = Report()
        for report in made.data.column("report").drop_null().to_pylist():
            encoder.report.merge(report)
        encoder.report.conclude(len(self), self.dropped)

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of the examples of `ExampleEncoder.encode`."""
        row, k = self._numbering.find(index)
        examples = self._table[row]["examples"].chunk(0).flatten()
        teachers = examples.field("teachers")[k].values
        return {
            "student_ids": _numbers(examples.field("student_ids")[k]),
            "labels": _numbers(examples.field("labels")[k]),
            "teachers": [_teacher(teachers, m) for m in range(len(teachers))],
            **json.loads(examples.field("more")[k].as_py()),
        }

    def lengths(self) -> list[int]:
        """Student tokens of each example."""
        parts = [one.flatten().field("student_ids") for one in self._table.data.column("examples").chunks]
        return [length for part in parts for length in part.value_lengths().to_pylist()]


def _columns() -> list[tuple[str, Any]]:
    """Names and types of the columns of `_encode`: a row for each row of data."""
    import pyarrow as pa

    ids, more = pa.list_(pa.int32()), ("more", pa.string())
    teacher = pa.struct([("ids", ids), ("spans", ids), ("document", pa.binary()), more])
    example = pa.struct([("student_ids", ids), ("labels", ids), ("teachers", pa.list_(teacher)), more])
    return [("examples", pa.list_(example)), ("report", pa.string())]


def _encode(batch: Mapping[str, Any], numbers: list[int], encoder: ExampleEncoder, process: int) -> Any:
    """Rows of data as an Arrow table of their examples; the first row has the report of the batch.

    `process` is the one that workers are forks of.
    """
    import pyarrow as pa

    if os.getpid() != process:  # torch's threads do not survive the fork
        torch.set_num_threads(1)
    columns = {name: batch[name] for name in batch}
    rows = [without_nulls(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    encoder.report = Report(is_told=False)
    examples = [[_flat(one) for one in some] for some in encoder.encode(rows, numbers[0])]
    made = {"examples": examples, "report": [encoder.report.to_json(), *[None] * (len(rows) - 1)]}
    return pa.table({name: pa.array(made[name], kind) for name, kind in _columns()})


def _flat(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example, or a teacher's entry in it, as Arrow takes it; what has no column of its own is JSON in ``more``."""
    found: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for name, value in example.items():
        if name == "teachers":
            found[name] = [_flat(one) for one in value]
        elif name in ("student_ids", "labels", "ids", "spans"):
            found[name] = None if value is None else np.asarray(value, np.int32).reshape(-1)
        elif name == "document":
            found[name] = value
        else:
            more[name] = value
    return {**found, "more": json.dumps(more, default=np.ndarray.tolist)}


def _numbers(scalar: Any) -> Any:
    """int64 of a list in Arrow."""
    return scalar.values.to_numpy(zero_copy_only=False).astype(np.int64)


def _teacher(entries: Any, m: int) -> dict[str, Any]:
    ids, spans, document, more = (entries.field(name)[m] for name in ("ids", "spans", "document", "more"))
    entry = {"ids": None, "spans": None}
    if ids.is_valid:
        entry = {"ids": _numbers(ids), "spans": _numbers(spans).reshape(-1, 4).astype(np.int32)}
    return {**entry, **({"document": document.as_py()} if document.is_valid else {}), **json.loads(more.as_py())}
