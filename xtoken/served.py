"""ServedModel: a model behind a server, vLLM's or SGLang's, that gives log-probabilities of token ids."""

from __future__ import annotations

import logging
import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .client import Client, RefusedError
from .losses import TopKLogits
from .losses.served import ROUNDING, as_tables, served_entries
from .once import Once
from .vocabulary import TokenizerLike, Vocabulary

KEY = "XTOKEN_TEACHER_KEY"
"""Environment variable with the key of a server, for the commands: what is on a command line can be seen by others."""

PROBED = 64
"""Tokens whose texts are compared with the server's when a model is met."""

SAME_TEXT_SHARE = 0.9
"""Of these at least this share must be spelled alike: servers decode some tokens in a way of their own."""

logger = logging.getLogger(__name__)


class ServedModel:
    """A model that runs elsewhere: token ids go out, the largest log-probabilities of each next token come back.

    The server is asked once what it serves and for a probe: one token of each part of the vocabulary. So another
    tokenizer, and fewer log-probabilities than asked for, are seen before anything is trained.

    Parameters
    ----------
    url : str
        Of the API, ``http://host:port/v1`` (``/v1`` may be missing): vLLM's, which is asked for ``prompt_logprobs`` at
        ``/v1/completions``; or SGLang's, for ``top_logprobs_num`` at ``/generate``.
    tokenizer
        Of the model, as for `Vocabulary.from_tokenizer`. The server gets ids and never encodes a text.
    model : str, optional
        Its name there. Default: the only model that is served.
    logprobs : int
        Log-probabilities a token, besides the one of the token that comes next. vLLM allows 20 unless it is started
        with ``--max-logprobs``.
    requests : int
        Most requests in flight, one text each.
    timeout, patience : float
        Seconds in which a request must be answered; seconds in which it is sent again after errors. See `Client`.
    key : str, optional
        Sent as bearer token, and never shown.

    Attributes
    ----------
    positions : int or None
        Most tokens of a text: one fewer than the server's ``max_model_len``, since it always adds one.
    client : Client
        ``client.faults`` counts what was tried again.
    is_sglang : bool
        Whether it is SGLang, not vLLM.

    Raises ValueError for arguments out of range, and if the server serves another model, has another tokenizer, or
    gives fewer log-probabilities; ConnectionError if it does not answer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: TokenizerLike,
        model: str | None = None,
        *,
        logprobs: int = 20,
        requests: int = 16,
        timeout: float = 600.0,
        patience: float = 300.0,
        key: str | None = None,
    ) -> None:
        if logprobs < 1:
            raise ValueError(f"logprobs: expected at least 1, got {logprobs}")
        root = url.rstrip("/").removesuffix("/v1")
        self.client = Client(root, requests=requests, timeout=timeout, patience=patience, key=key)
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)
        self.logprobs = min(logprobs, len(self.vocabulary))
        self.requests = requests
        served = self._served()
        whole = [name for name, card in served.items() if card.get("parent") is None]  # no adapters
        if model is None and len(whole) != 1:
            raise ValueError(f"model: expected the name of one of those that {root} serves: {_listed(served)}")
        self.model = whole[0] if model is None else model
        if self.model not in served:
            raise ValueError(f"model: {root} does not serve {self.model!r}, but {_listed(served)}")
        card = served[self.model]
        self.is_sglang = card.get("owned_by") == "sglang"
        most = card.get("max_model_len")
        self.positions = most - 1 if isinstance(most, int) and most > 1 else None
        self._asked: weakref.WeakValueDictionary[bytes, Future[TopKLogits]] = weakref.WeakValueDictionary()
        self._warn_once = Once(logger.warning)
        self._check_tokenizer()

    def __repr__(self) -> str:
        kind = "SGLang" if self.is_sglang else "vLLM"
        size = f"logprobs={self.logprobs}, positions={self.positions}"
        return f"ServedModel({self.client.url!r}, model={self.model!r}, {kind}, {size})"

    def _served(self) -> dict[str, dict[str, Any]]:
        """What the server says of each of its models, by name."""
        try:
            said = self.client.call("/v1/models")
        except RefusedError as error:
            raise ValueError(f"url: expected the API of OpenAI as vLLM and SGLang have it, but {error}") from error
        cards = said.get("data") if isinstance(said, dict) else None
        if not isinstance(cards, list) or not all(isinstance(one, dict) and "id" in one for one in cards):
            raise ValueError(f"url: expected a list of models at {self.client.url}/v1/models, got {said!s:.100}")
        return {str(one["id"]): one for one in cards}

    def ask(self, rows: Iterable[Sequence[int]]) -> list[Future[TopKLogits]]:
        """Begins to ask for texts, each as token ids [T]; equal ones are sent once as long as one is waited for.

        The results are those of `TopKLogits.from_vllm`: [T, k], the largest log-probabilities of the token that comes
        next, and that of the one that does; the last row is empty. Each has ``logprobs + 1`` columns, -1 where there
        is none. A result raises ValueError for an answer that cannot be right, ConnectionError if there is none.

        Raises ValueError for ids out of range and texts of more than `positions`.
        """
        futures = []
        for row in rows:
            ids = np.asarray(row, np.int64).reshape(-1)
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.vocabulary):
                size, worst = len(self.vocabulary), ids.max() if ids.min() >= 0 else ids.min()
                raise ValueError(f"rows: expected token ids of 0 to {size - 1}, got {worst}")
            if self.positions is not None and len(ids) > self.positions:
                raise ValueError(
                    f"rows: expected at most {self.positions} tokens, one fewer than the max_model_len of "
                    f"{self.client.url}, got {len(ids)}"
                )
            key = ids.astype("<i4").tobytes()
            future = self._asked.get(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._asked[key] = self.client.submit(self._answer, ids)
            futures.append(future)
        return futures

    def each(self, rows: Iterable[Sequence[int]]) -> Iterator[TopKLogits]:
        """The result of each of many texts, in order; never more than two for each request in flight are waited for."""
        waiting: deque[Future[TopKLogits]] = deque()
        for row in rows:
            waiting.extend(self.ask([row]))
            if len(waiting) >= 2 * self.requests:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def tell_faults(self) -> None:
        """Logs how many requests were sent again, and why; nothing if none was."""
        if self.client.faults:
            counts = ", ".join(f"{count} x {kind}" for kind, count in self.client.faults.most_common())
            logger.warning("%s: requests were sent again: %s", self.client.url, counts)

    def _answer(self, ids: NDArray[np.int64]) -> TopKLogits:
        if not len(ids):
            return TopKLogits(*as_tables([], self.logprobs + 1))
        try:
            return self._scored(ids.tolist())[0]
        except BaseException:
            self._asked.clear()  # who goes on behind the failure is not to wait for what was asked before it
            raise

    def _scored(self, ids: list[int], with_text: bool = False) -> tuple[TopKLogits, dict[int, str]]:
        """Log-probabilities of a text, and texts of tokens as the server decodes them."""
        try:
            entries, texts = (self._from_sglang if self.is_sglang else self._from_vllm)(ids, with_text)
        except RefusedError as error:
            raise self._explained(error, len(ids)) from error
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._wrong(f"no log-probabilities in its form ({type(error).__name__}: {error})") from error
        return self._checked(entries, ids), texts

    def _from_vllm(self, ids: list[int], with_text: bool) -> tuple[list[dict[int, float] | None], dict[int, str]]:
        said = self.client.call(
            "/v1/completions",
            {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": self.logprobs},
        )
        listed = said["choices"][0].get("prompt_logprobs")
        if listed is None:
            raise self._wrong("no prompt_logprobs, which vLLM gives; other servers cannot score a text")
        texts = {}
        if with_text:
            texts = {int(i): one.get("decoded_token") for entry in listed if entry for i, one in entry.items()}
        return self._entries(listed), {i: text for i, text in texts.items() if text is not None}

    def _from_sglang(self, ids: list[int], with_text: bool) -> tuple[list[dict[int, float] | None], dict[int, str]]:
        said = self.client.call(
            "/generate",
            {
                "input_ids": ids, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": self.logprobs,
                "return_text_in_logprobs": with_text, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            },
        )["meta_info"]  # fmt: skip
        entries = self._entries(said["input_top_logprobs"])
        realised = said["input_token_logprobs"]
        if [one[1] for one in realised] != ids[: len(realised)]:
            raise self._wrong("log-probabilities of other tokens than were sent")
        for place, (entry, (value, i, _)) in enumerate(zip(entries, realised, strict=False)):
            if entry is None or value is None:
                continue
            listed = entry.get(i, min([value, *entry.values()]))  # what is none of the likeliest is no likelier
            if abs(listed - value) > ROUNDING * max(1.0, -value):
                raise self._wrong(
                    f"{value:.4g} for token {i} at position {place}, but {listed:.4g} among the likeliest"
                )
            entry.setdefault(i, float(value))
        texts = {i: text for _, i, text in realised if text is not None} if with_text else {}
        return entries, texts

    def _entries(self, listed: Any) -> list[dict[int, float] | None]:
        try:
            return served_entries(listed)
        except ValueError as error:
            raise self._wrong(f"no log-probabilities in its form: {error}") from error

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.client.url} answers with {what}")

    def _explained(self, error: RefusedError, length: int) -> ValueError:
        """An error in terms of what can be done about it."""
        said, where = error.said, f"{self.client.url} ({self.model})"
        if found := re.search(r"logprobs.*?(?:max allowed|at most|maximum)\D*(\d+)", said):
            return ValueError(
                f"logprobs: {where} gives at most {found[1]} log-probabilities a token, asked for {self.logprobs}: "
                f"start it with --max-logprobs {self.logprobs}, or ask for {found[1]}"
            )
        if re.search(r"out of (the )?vocab", said):
            return ValueError(
                f"tokenizer: expected the one of {where}, got one with tokens that it does not know: {said}"
            )
        if re.search(r"context length|max_tokens must be at least 1|longer than", said):
            return ValueError(f"rows: {where} does not take a text of {length} tokens: {said}")
        return error

    def _checked(self, entries: list[dict[int, float] | None], ids: list[int]) -> TopKLogits:
        """What is listed for the tokens of a text; raises ValueError for what cannot be right."""
        if len(entries) != len(ids):
            raise self._wrong(f"log-probabilities of {len(entries)} tokens for a text of {len(ids)}")
        size, width = len(self.vocabulary), self.logprobs + 1
        following = [{} if entry is None else entry for entry in entries[1:]]
        for place, (entry, realised) in enumerate(zip(following, ids[1:], strict=True), 1):
            if not self.logprobs <= len(entry) <= width:
                raise self._wrong(f"{len(entry)} log-probabilities at position {place}, expected {self.logprobs}")
            if realised not in entry:
                raise self._wrong(f"no log-probability of token {realised}, which was sent, at position {place}")
        found = TopKLogits(*as_tables([*following, {}], width))
        sums = found.logprobs.exp().sum(-1)
        for is_right, what in (
            ((found.logprobs <= ROUNDING).all(-1), "no logarithms of probabilities"),
            (sums <= 1.0 + ROUNDING, "probabilities that sum to more than 1"),
            ((found.ids >= -1).all(-1), "token ids below 0"),
        ):
            if not bool(is_right.all()):
                raise self._wrong(f"{what} at position {int((~is_right).nonzero()[0]) + 1}")
        unknown = found.ids >= size
        if bool(unknown.any()):
            message = "%s lists token %d, but the tokenizer has %d; such tokens count to the rest"
            self._warn_once("unknown", message, self.client.url, int(found.ids.max()), size)
        return TopKLogits(
            found.ids.masked_fill(unknown, -1), found.logprobs.clamp_max(0.0).masked_fill(unknown, -torch.inf)
        )

    def _check_tokenizer(self) -> None:
        """Raises ValueError if the server decodes tokens otherwise than the tokenizer."""
        texts = {}
        for i in np.flatnonzero(self.vocabulary.is_text).tolist():
            text = self.vocabulary[i].decode("utf-8", "replace").strip()
            if text and "\ufffd" not in text:
                texts[i] = text
        count = min(PROBED, len(texts), self.positions or PROBED)
        if count < 2:
            raise ValueError(f"tokenizer: expected one with tokens of text, got {len(texts)} of them")
        known = list(texts)
        probe = [known[k] for k in np.linspace(0, len(known) - 1, count).round().astype(int).tolist()]
        _, theirs = self._scored(probe, with_text=True)
        compared = [i for i in probe[1:] if i in theirs]  # of the first nothing is said
        if not compared:
            message = "%s does not say what its tokens spell, so that its tokenizer could not be compared"
            logger.warning(message, self.client.url)
            return
        others = [i for i in compared if theirs[i].strip() != texts[i]]
        if len(others) > (1.0 - SAME_TEXT_SHARE) * len(compared):
            i = others[0]
            raise ValueError(
                f"tokenizer: expected the one of {self.client.url} ({self.model}), but {len(others)} of "
                f"{len(compared)} tokens are others there: {i} is {theirs[i]!r}, here {texts[i]!r}"
            )


def _listed(served: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, served)) or "nothing"
