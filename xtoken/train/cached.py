"""Cached teachers in training: a dataset that adds log-probabilities, and the command ``xtoken cache-teacher``."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xtoken.losses import TopKLogits
from xtoken.served import KEY, ServedModel
from xtoken.teacher_cache import INDEX, TeacherCache, cache_teacher, cached_time
from xtoken.terminal import working
from xtoken.vocabulary import TokenizerLike
from xtoken.vocabulary.sources import check_source

from .chat import ChatTemplate, use_template
from .data import MOST_DROPPED, encoded, has_chats, some_rows
from .encode import ExampleEncoder
from .prepare import check_device, check_dtype
from .routing import is_routed
from .table import open_data
from .teachers import load_model, load_tokenizer


class CachedExamples(Dataset[dict[str, Any]]):
    """Examples with the log-probabilities of teachers that were run before.

    Parameters
    ----------
    examples : dataset
        Of what ``ExampleEncoder(..., name_documents=True)`` makes.
    caches : sequence of TeacherCache or None
        One for each teacher; None for one that runs along.

    Raises ValueError if there are more or fewer caches than an example has teachers.
    """

    def __init__(self, examples: Dataset[dict[str, Any]], caches: Sequence[TeacherCache | None]) -> None:
        self.examples: Any = examples
        self.caches = list(caches)
        if len(self) and len(examples[0]["teachers"]) != len(self.caches):
            raise ValueError(f"caches: expected {len(examples[0]['teachers'])}, one a teacher, got {len(self.caches)}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example, in which a cached teacher also has ``logits``, `TopKLogits` [T, k] of its tokens.

        Raises ValueError if the cache does not hold the example's document. One that is not routed to a cached teacher
        need not be there; its rows are empty.
        """
        example = self.examples[index]
        entries = [
            entry if cache is None else self._with_logits(example, m, cache, index)
            for m, (entry, cache) in enumerate(zip(example["teachers"], self.caches, strict=True))
        ]
        return {**example, "teachers": entries}

    @staticmethod
    def _with_logits(example: dict[str, Any], m: int, cache: TeacherCache, index: int) -> dict[str, Any]:
        entry = example["teachers"][m]
        ids = example["student_ids"] if entry["ids"] is None else entry["ids"]
        if not is_routed(example, m):
            size = len(ids), cache.top_k
            none = torch.full(size, -1, dtype=torch.int32, device="cpu")
            return {**entry, "logits": TopKLogits(none, torch.full_like(none, -torch.inf, dtype=torch.float32))}
        document = cache.find(entry["document"])
        if document is None:
            nearest = f"; {cache.nearest(ids)}" if not entry["first"] else ""
            raise ValueError(
                f"example {index}: not in the teacher cache {cache.path}, which was made from other text, or with "
                f"another chat template{nearest}"
            )
        rows = slice(entry["first"], entry["first"] + len(ids))
        kept = (document.logits.ids[rows], document.logits.logprobs[rows])
        if len(kept[0]) == len(ids) - 1:  # without the end token, after which nothing is predicted
            kept = (torch.cat([kept[0], kept[0][-1:]]), torch.cat([kept[1], kept[1][-1:]]))
        logits = TopKLogits(*kept, document.logits.tail)
        entry = {**entry, "logits": logits}
        if len(logits.ids) < len(ids):  # the cache holds only the beginning of the document
            if entry["ids"] is None:
                raise ValueError(
                    f"example {index}: the teacher cache {cache.path} was cut at {cache.max_length} tokens; expected "
                    f"max_length of at most that, got {len(ids)} tokens"
                )
            spans = np.asarray(entry["spans"])
            entry.update(ids=ids[: len(logits.ids)], spans=spans[spans[:, 3] <= len(logits.ids)])
        return entry


def teacher_documents(
    tokenizer: TokenizerLike,
    rows: Iterable[Mapping[str, Any]],
    text_column: str = "text",
    now: datetime | None = None,
    system: str | None = None,
) -> Iterator[list[int]]:
    """What a teacher reads of each row in training, as token ids: what to send to a server that fills a cache.

    Messages are written by the teacher's chat template, texts begin and end with its special tokens; nothing is cut.
    Rows of which nothing is trained on are left out.

    Parameters
    ----------
    tokenizer
        The teacher's, as for `ExampleEncoder`.
    rows : iterable of mappings
        As for `ExampleEncoder`; `xtoken.train.data.read_rows` reads them from files.
    text_column : str
        Field with plain text.
    now : datetime, optional
        As for `ExampleEncoder`; where the chat template writes the time, tell the `TeacherCacheWriter` too.
    system : str, optional
        What this teacher alone is told, as ``teacher_systems`` of `ExampleEncoder`.

    Iterating raises ValueError for broken rows, and with a `system` if no row is a chat, as training does: at the end,
    or after thousands of rows.

    Examples
    --------
    ::

        with xtoken.TeacherCacheWriter("cache", tokenizer, top_k=20) as writer:
            for ids in xtoken.train.teacher_documents(tokenizer, rows):
                answer = client.completions.create(prompt=ids, echo=True, logprobs=20, max_tokens=0, model=name)
                writer.add(ids, xtoken.TopKLogits.from_vllm(answer.choices[0].logprobs, tokenizer=tokenizer))
    """
    told = [] if system is None else [tokenizer]
    encoder = ExampleEncoder(tokenizer, told, text_column=text_column, now=now, teacher_systems=[system] * len(told))
    encoder.student.name = "teacher"
    is_checked = system is None
    for examples in encoded(rows, encoder):
        if not is_checked and encoder.report.rows >= MOST_DROPPED:
            encoder.report.check()
            is_checked = True
        for example in examples:
            ids = example["student_ids"] if system is None else example["teachers"][0]["ids"]
            yield ids.tolist()
    if system is not None:
        encoder.report.check()


def main(**options: Any) -> TeacherCache:
    """Runs ``xtoken cache-teacher``, which documents the options."""
    given = SimpleNamespace(**options)
    if given.tokenizer is not None and given.url is None:
        raise ValueError("--tokenizer: expected --url with it, since a model brings its own")
    of_server = {name: options[name] for name in ("requests", "timeout", "patience")}
    usual = inspect.signature(ServedModel).parameters
    for name, value in of_server.items():
        if given.url is None and value != usual[name].default:
            raise ValueError(f"--{name}: expected --url with it, got none")
    INDEX.check(Path(given.output), given.resume, "a teacher cache")
    if given.url is None:
        check_source(given.teacher, "--teacher")
        check_dtype(given.dtype, "dtype")
        place = check_device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"), "device")
    opened = [open_data(one, "data", "train") for one in given.data]
    with working("loading the teacher") as say:
        is_chat = has_chats(opened, given.text_column)
        if given.url is not None or is_chat:
            tok = load_tokenizer(given.tokenizer or given.teacher, trust_remote_code=given.trust_remote_code)
            use_template(tok, given.chat_template)
        if is_chat:
            ChatTemplate(tok, "teacher")
        if given.url is not None:
            key = os.environ.get(KEY)
            model: Any = ServedModel(given.url, tok, given.teacher, logprobs=given.logprobs, key=key, **of_server)
        else:
            model, tok = load_model(
                given.teacher, dtype=given.dtype, device=place, trust_remote_code=given.trust_remote_code,
                quantization_config=given.quantization,
            )  # fmt: skip
            model.eval()
            use_template(tok, given.chat_template)
        now = None
        if "strftime_now" in str(getattr(tok, "chat_template", None)):
            now = (cached_time(given.output) if given.resume else None) or datetime.now()
        rows = some_rows(opened, given.text_column)
        documents = teacher_documents(tok, rows, given.text_column, now, given.teacher_system)
        return cache_teacher(
            model, tok, documents, given.output, top_k=given.logprobs, max_length=given.max_length,
            batch_tokens=given.batch_tokens, resume=given.resume, now=now, advance=_counted(say),
        )  # fmt: skip


def _counted(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Tells how many documents and tokens are done, and how fast."""
    started, done = time.monotonic(), np.zeros(2, np.int64)

    def advance(*more: int) -> None:
        done[:] += more
        speed = done[1] / max(time.monotonic() - started, 1e-9)
        say(f"{done[0]:,} documents, {done[1]:,} tokens, {speed:,.0f} tokens/s")

    return advance
