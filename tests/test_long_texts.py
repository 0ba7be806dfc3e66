"""Long texts, encoded in windows: the ids of the whole text, whatever the tokenizer, in memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import pytest
from real_tokenizers import LOADERS, TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from xtoken.vocabulary import long_texts
from xtoken.vocabulary.long_texts import encode_texts

MANUAL = "\n".join(sorted(topics.values()))
HARD = {
    "manual": MANUAL[:60000],
    "scripts": "  ".join(TEXTS.values()) * 40,
    "digits": "0123456789" * 3000,
    "spaces": "a" + " " * 20000 + "b" + "\n" * 9000,
    "one_letter": "a" * 20000,
    "accents": "e\u0301 \u0041\u030a" * 5000,
    "specials": "one<|endoftext|>two</s> <s>three<|im_end|>\n" * 600,
}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "WINDOW", 2000)
    monkeypatch.setattr(long_texts, "OVERLAP", 600)
    monkeypatch.setattr(long_texts, "LEAST", 16)


def backend_of(tokenizer: Any) -> Any:
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def windows_that_fit(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records, for each length of window that is tried, whether its windows agreed."""
    tried: list[bool] = []
    plain = long_texts._in_windows

    def recorded(*arguments: Any) -> Any:
        found = plain(*arguments)
        tried.append(found is not None)
        return found

    monkeypatch.setattr(long_texts, "_in_windows", recorded)
    return tried


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", LOADERS)
def test_the_ids_are_those_of_the_whole_text(tokenizer: Callable[[str], Any], name: str) -> None:
    backend, texts = backend_of(tokenizer(name)), ["short", *HARD.values(), ""]
    found = dict(zip(["short", *HARD, ""], map(list, encode_texts(backend, texts)), strict=True))
    assert found == dict(zip(found, (whole(backend, text) for text in texts), strict=True))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", LOADERS)
def test_ordinary_text_needs_no_longer_windows(
    tokenizer: Callable[[str], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = windows_that_fit(monkeypatch)
    encode_texts(backend_of(tokenizer(name)), [HARD["manual"]])
    assert tried == [True]


def neox(trim: bool) -> Any:
    """NFC, after which some versions of `tokenizers` count characters that are not there."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [MANUAL[:50000]], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


def stripping() -> Any:
    bpe = neox(False)
    bpe.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    return bpe


def in_pieces_of_three() -> Any:
    bpe = neox(True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(".{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("make", [lambda: neox(True), lambda: neox(False), stripping, in_pieces_of_three])
def test_tokenizers_with_a_will_of_their_own(make: Callable[[], Any]) -> None:
    backend = make()
    for name, text in HARD.items():
        assert list(encode_texts(backend, [text])[0]) == whole(backend, text), name


@pytest.mark.usefixtures("small_windows")
def test_windows_grow_until_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = windows_that_fit(monkeypatch)
    backend, text = in_pieces_of_three(), "ation" * 18000
    assert list(encode_texts(backend, [text])[0]) == whole(backend, text)
    assert tried == [False, False]  # of 2,000 and of 32,000 characters; then all of it


def test_memory_does_not_grow_with_the_text() -> None:
    script = """
import resource, sys
from pydoc_data.topics import topics
from xtoken.demo import llama3_tokenizer
from xtoken.vocabulary.long_texts import encode_texts
tokenizer = llama3_tokenizer()
tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
text = "\\n".join(topics.values())
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode_texts(tokenizer, [text[:2000000]])
before = peak()
ids = encode_texts(tokenizer, [(text * 30)[: 8 << 20]])[0]
print(len(ids), (peak() - before) * 1024 / (8 << 20))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, grown = map(float, run.stdout.split())
    assert count > 1.5e6
    assert grown < 40, "bytes for each byte of the text; the whole text at once takes over a hundred"
