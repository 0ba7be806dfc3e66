"""Training data: reading files, encoding them for all models, and aligned corpora as examples."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, get_worker_info

from xtoken.corpus import require, source
from xtoken.corpus.files import LINES, find_files
from xtoken.data import AlignedDataset
from xtoken.losses.backends import IGNORED
from xtoken.teacher_cache import document_digest
from xtoken.vocabulary import TokenizerLike, Vocabulary

from .encode import ExampleEncoder
from .example import normal_form, parse_example
from .report import Report

BATCH_ROWS = 256
"""Rows that are encoded at once."""

MOST_DROPPED = 10 * BATCH_ROWS
"""Rows at the beginning of a stream that may all be left out."""

SAMPLE_BYTES = 1 << 20
"""Bytes of text from the data that `text_sample` takes."""

SAMPLE_ROWS = 1 << 16
"""Rows of a file or dataset that it looks at, since those of a stream might go on without any text."""

logger = logging.getLogger(__name__)


class EncodedDataset(Dataset[dict[str, Any]]):
    """Encoded examples in memory.

    Parameters
    ----------
    rows : iterable of mappings
        Rows as `ExampleEncoder` takes them: a list, a generator, a dataset of Hugging Face.
    encoder : ExampleEncoder

    What cannot be trained on though it should be is counted in ``encoder.report`` and told once.

    Raises ValueError if a row has none of the forms, or if nothing is left, or if most rows are lost: their turns have
    no labels, no chunks of a teacher, or no end that is trained on.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], encoder: ExampleEncoder) -> None:
        self.dropped = 0
        """Rows of which nothing is trained on: empty, without a turn of the assistant, cut before it, ..."""
        self._examples: list[dict[str, Any]] = []
        self.encoder = encoder
        encoder.report = Report()
        for examples in encoded(rows, encoder):
            self._examples += examples
            self.dropped += not examples
        encoder.report.conclude(len(self), self.dropped)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of the examples of `ExampleEncoder.encode`."""
        return self._examples[index]


class EncodedStream(IterableDataset[dict[str, Any]]):
    """Examples of rows that come one after the other, perhaps without an end, encoded as they are asked for.

    Parameters
    ----------
    rows : iterable of mappings
        As for `EncodedDataset`; or examples, which are passed on. Workers of a DataLoader share them, unless they come
        from an `IterableDataset` of torch or from Hugging Face, which sees to that itself.
    encoder : callable
        Makes the ExampleEncoder, once it is needed.
    name : str
        For messages.

    Iterating raises ValueError if there is no row at all, the first is none, nothing of the first `MOST_DROPPED` rows
    is trained on, or most of these are lost to one of the kinds of `ExampleEncoder.report`.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], encoder: Callable[[Mapping[str, Any]], ExampleEncoder],
        name: str = "rows",
    ) -> None:  # fmt: skip
        self.rows = rows
        self.encoder = encoder
        self.name = name
        self._had_rows = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        remaining: Iterator[Any] = iter(self.rows)
        info = get_worker_info()
        if info is not None:  # threads of a tokenizer do not survive the fork of a worker
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if info is not None and not (isinstance(self.rows, IterableDataset) or hasattr(self.rows, "features")):
            remaining = itertools.islice(remaining, info.id, None, info.num_workers)
        first = next(remaining, None)
        if first is None:
            # A generator has none the second time, and a further worker perhaps no share.
            if not self._had_rows and (info is None or info.id == 0):
                raise ValueError(f"{self.name}: expected something to train on, got no row")
            return
        self._had_rows = True
        check_row(first, self.name)
        remaining = itertools.chain([first], remaining)
        if is_example(first):
            yield from remaining
            return
        if hasattr(self.rows, "features"):
            remaining = map(source.without_nulls, remaining)
        encoder, is_checked = self.encoder(first), False
        dropped = made = 0
        for examples in encoded(remaining, encoder):
            if not is_checked and encoder.report.rows >= MOST_DROPPED:
                encoder.report.check()
                is_checked = True
            yield from examples
            made, dropped = made + len(examples), dropped + (not examples)
            if dropped == 1 and not examples:
                logger.warning("a row is left out, since nothing of it is trained on; so are others like it")
            if dropped == MOST_DROPPED and not made:
                raise ValueError(f"rows: expected something to train on, got {dropped} rows of which nothing is")

    def set_epoch(self, epoch: int) -> None:
        """Tells the rows, which may shuffle themselves."""
        getattr(self.rows, "set_epoch", lambda epoch: None)(epoch)


class Rounds(IterableDataset[Any]):
    """A stream, from its beginning again where it ends, without an end unless it can be read once only.

    The Trainer, which begins anew by itself, would look for the place of a checkpoint in the first round alone.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            getattr(self.rows, "set_epoch", lambda epoch: None)(number)
            is_empty = True
            for row in self.rows:
                is_empty = False
                yield row
            if is_empty:
                return


def is_example(row: Any) -> bool:
    """Whether a row is encoded already."""
    return isinstance(row, Mapping) and "student_ids" in row


def check_row(row: Any, name: str) -> None:
    """Raises ValueError if the first row of a data set is none."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{name}: expected rows, mappings from columns to values, got {type(row).__name__}: {row!r:.80}"
        )


def lengths(dataset: Any) -> list[int]:
    """Student tokens of each example."""
    while hasattr(dataset, "examples"):  # with a cache's logits, which are not read for this
        dataset = dataset.examples
    if isinstance(dataset, ConcatDataset):
        return [length for one in dataset.datasets for length in lengths(one)]
    if hasattr(dataset, "lengths"):
        return list(dataset.lengths())
    return [len(dataset[k]["student_ids"]) for k in range(len(dataset))]


def encoded(rows: Iterable[Mapping[str, Any]], encoder: ExampleEncoder) -> Iterator[list[dict[str, Any]]]:
    """The examples of each row; a dataset of Hugging Face is a table, see `xtoken.corpus.source.without_nulls`."""
    if getattr(rows, "features", None) is not None:
        rows = map(source.without_nulls, rows)
    remaining, count = iter(rows), 0
    while batch := list(itertools.islice(remaining, BATCH_ROWS)):
        try:
            examples = encoder.encode(batch, count)
        except ValueError as error:
            found = re.match(r"row (\d+)", str(error))
            place = getattr(batch[int(found[1]) - count], "place", "") if found else ""
            raise ValueError(f"{place}: {error}" if place else str(error)) from error
        yield from examples
        count += len(batch)


class AlignedExamples(Dataset[dict[str, Any]]):
    """The documents of an aligned corpus as examples; all of their text is trained on.

    Parameters
    ----------
    path : path
        Output folder of `xtoken.align_corpus`.
    student_tok, teacher_tok : tokenizer
        Those it was made with. The special tokens that they put before a text are put there.
    max_length, max_teacher_length, name_documents : optional
        As for `ExampleEncoder`. A document that the corpus has cut short is not the one that a teacher cache holds.

    Raises what `AlignedDataset` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        student_tok: TokenizerLike,
        teacher_tok: TokenizerLike,
        *,
        max_length: int | None = None,
        max_teacher_length: int | None = None,
        name_documents: bool = False,
    ) -> None:
        encoder = ExampleEncoder(student_tok, [teacher_tok])
        teacher = encoder.sides[-1]
        self.documents = AlignedDataset(path, student_tok, teacher_tok)
        self.prefixes = [np.asarray(side.prefix, np.int64) for side in (encoder.student, teacher)]
        self.limits = (max_length, max_teacher_length)
        self.name_documents = name_documents
        self.end_id = teacher.end_id

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One document as an example of `ExampleEncoder.encode`; longer ones lose their end."""
        document = self.documents[index]
        spans = document["spans"].numpy() + np.repeat([len(prefix) for prefix in self.prefixes], 2).astype(np.int32)
        ids = [
            np.concatenate([prefix, document[f"{side}_ids"].numpy()])
            for prefix, side in zip(self.prefixes, ("student", "teacher"), strict=True)
        ]
        named: dict[str, Any] = {}
        if self.name_documents:
            named = {"document": document_digest(ids[1], self.end_id), "first": 0}
        limits = [len(row) if limit is None else limit for row, limit in zip(ids, self.limits, strict=True)]
        if any(len(row) > limit for row, limit in zip(ids, limits, strict=True)):
            spans = spans[(spans[:, 1] <= limits[0]) & (spans[:, 3] <= limits[1])]
            ends = spans[-1, 1::2] if len(spans) else (0, 0)
            ids = [row[:end] for row, end in zip(ids, ends, strict=True)]
        labels = ids[0].copy()
        labels[: max(1, len(self.prefixes[0]))] = IGNORED
        return {"student_ids": ids[0], "labels": labels, "teachers": [{"ids": ids[1], "spans": spans, **named}]}


def load_examples(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    student_tok: TokenizerLike,
    teacher_toks: Sequence[TokenizerLike],
    *,
    text_column: str = "text",
    max_length: int | None = None,
    max_teacher_length: int | None = None,
    train_on: str = "all",
    name_documents: bool = False,
    with_prompts: bool = False,
    now: datetime | None = None,
    teacher_systems: Sequence[str | None] | None = None,
    teacher_column: str | None = None,
    teacher_names: Sequence[str] | None = None,
) -> Dataset[dict[str, Any]]:
    """Examples from files (EncodedDataset), or from the folder of an aligned corpus (AlignedExamples).

    Parameters
    ----------
    files : path or sequence of paths
        JSON lines or an array, parquet, Arrow, or text with a document a line, as for `xtoken.align_corpus`; or one
        folder that it has written, for one teacher.
    student_tok, teacher_toks, text_column, max_length, max_teacher_length, train_on, name_documents
        As for `ExampleEncoder`.
    with_prompts, now, teacher_systems, teacher_column, teacher_names
        Likewise.

    Raises
    ------
    ValueError
        For broken rows, with file and row; for an aligned corpus with more than one teacher or other files, or with
        systems, columns or prompts, which it has not.
    FileNotFoundError
        If a path matches no file.
    """
    files = [files] if isinstance(files, (str, os.PathLike)) else files
    folders = [path for path in files if os.path.isdir(path)]
    if not folders:
        encoder = ExampleEncoder(
            student_tok, teacher_toks, train_on=train_on, max_length=max_length, max_teacher_length=max_teacher_length,
            text_column=text_column, name_documents=name_documents, with_prompts=with_prompts, now=now,
            teacher_systems=teacher_systems, teacher_column=teacher_column, teacher_names=teacher_names,
        )  # fmt: skip
        return EncodedDataset(some_rows(files, text_column), encoder)
    if len(files) > 1 or len(teacher_toks) != 1:
        raise ValueError(
            f"files: an aligned corpus is for one teacher and goes alone, got {len(files)} paths and "
            f"{len(teacher_toks)} teachers"
        )
    if teacher_column is not None or any(one is not None for one in teacher_systems or ()):
        raise ValueError(
            f"files: expected rows for teacher_column and teacher_systems, got the aligned corpus {folders[0]}"
        )
    if with_prompts:
        raise ValueError(f"files: expected rows with prompts, got the aligned corpus {folders[0]}")
    return AlignedExamples(
        folders[0], student_tok, teacher_toks[0], max_length=max_length, max_teacher_length=max_teacher_length,
        name_documents=name_documents,
    )  # fmt: skip


def text_sample(data: Sequence[Any], text_column: str = "text", tokenizer: TokenizerLike = None) -> list[str]:
    """Texts from the beginning of each file or dataset, about `SAMPLE_BYTES` in all, for `PieceIndex.build`.

    `data` is as for `read_rows`; of other iterables, rows or examples, those that can be read again count. An aligned
    corpus and examples need the student's tokenizer, to read its tokens. Rows that are none of the forms are left out.
    """
    found: list[str] = []
    files = [one for one in data if is_path(one) and not _is_corpus(one)]
    others = [one for one in data if not is_path(one) or _is_corpus(one)]
    sources: list[Any] = [file.path for file in find_files(files, "files")] if files else []
    sources += [one for one in others if is_path(one) or iter(one) is not one]
    for one in sources:
        left = SAMPLE_BYTES // len(sources)
        for text in _texts(one, text_column, tokenizer):
            found.append(text[:left])
            left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                break
    return found


def _texts(one: Any, text_column: str, tokenizer: TokenizerLike) -> Iterator[str]:
    rows: Iterable[Any] = itertools.islice(read_rows([one], text_column), SAMPLE_ROWS)
    if _is_corpus(one):
        documents = AlignedDataset(one)
        rows = (documents[k] for k in range(len(documents)))
    vocabulary = None
    for row in rows:
        if is_example(row):
            vocabulary = vocabulary or Vocabulary.from_tokenizer(tokenizer)
            yield vocabulary.decode(np.asarray(row["student_ids"])).decode("utf-8", "replace")
            continue
        try:
            yield from parse_example(normal_form(row), "all", text_column).pieces
        except (ValueError, KeyError, TypeError):
            continue


def has_chats(data: Sequence[Any], text_column: str = "text") -> bool:
    """Whether the first row of one of the files or datasets is a chat; folders of aligned corpora are none."""
    firsts = [next(read_rows([one], text_column), {}) for one in data if not _is_corpus(one)]
    return any(row.get("messages") or row.get("conversations") or isinstance(row.get("prompt"), list) for row in firsts)


def _is_corpus(one: Any) -> bool:
    return is_path(one) and os.path.isdir(one)


def is_path(one: Any) -> bool:
    return isinstance(one, (str, os.PathLike))


def some_rows(data: Sequence[Any], text_column: str = "text") -> Iterator[dict[str, Any]]:
    """`read_rows`; ValueError also if there are none."""
    rows = read_rows(data, text_column)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"files: expected rows, got none in {', '.join(map(str, data))}")
    yield from itertools.chain([first], rows)


def read_rows(data: Sequence[Any], text_column: str = "text") -> Iterator[dict[str, Any]]:
    """The rows of files, with all their columns; a line of a text file is a row with `text_column`.

    Files are those of `xtoken.align_corpus`. What is null in JSON stays null; null fields within the columns of a table
    are left out, since a table has every field in every row. Behind the files come the rows of what is no path, such as
    a dataset of Hugging Face.

    Raises ValueError if a row is broken, with file and line or row, and if a file changes while it is read;
    FileNotFoundError if a path matches no file; ImportError if pyarrow, which reads parquet, Arrow and zstd, is not
    installed.
    """
    files = [one for one in data if is_path(one)]
    for file in find_files(files, "files") if files or not data else ():
        if file.format in LINES:
            yield from source.rows(file, text_column)
        else:
            require("pyarrow", "corpus")
            from xtoken.corpus import tables

            yield from tables.rows(file)
        file.check_unchanged()
    for one in data:
        if not is_path(one):
            yield from map(source.without_nulls, one) if hasattr(one, "features") else one
