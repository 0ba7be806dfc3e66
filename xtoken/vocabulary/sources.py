"""Tokenizers from everything that holds one: a Hub id, a folder, or a file, which is recognised by its content."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xtoken import _core
from xtoken.remote import check_regular, is_url

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    50256: _GPT2, 100256: _WORDS % r"\p{N}{1,3}", 128000: _WORDS % r"\p{N}{1,3}", 151643: _WORDS % r"\p{N}",
    199998: _CASED,
}  # fmt: skip
"""How words are cut, by the number of ranks, since a file of tiktoken ranks does not say: GPT-2, cl100k, Llama 3, Qwen,
o200k."""

_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                  "[PREFIX]", "[MIDDLE]", "[SUFFIX]")  # fmt: skip
"""Of a Tekken file that does not list them."""


def load_tokenizer(source: str | os.PathLike[str], *, to_train: bool = False, **options: Any) -> Any:
    """A tokenizer from a Hub id, a folder, or a file: a tokenizer.json, a tekken.json, tiktoken ranks, a SentencePiece
    model (BPE), or GGUF.

    It is one of transformers if it is `to_train`; else maybe one of `tokenizers`. `options` are of ``from_pretrained``.
    Raises FileNotFoundError if a path does not exist, ValueError if a file or folder holds none of these; OSError if
    there is no such id.
    """
    if not os.fspath(source):
        raise ValueError("tokenizer: expected a path or a Hub id, got an empty text")
    path = Path(source)
    if path.is_dir() and not to_train and not (path / "tokenizer_config.json").exists():
        known = ("tokenizer.json", "tekken.json", "tokenizer.model")
        path = next((path / name for name in known if (path / name).exists()), path)
    if path.exists() and not path.is_dir():
        return _from_file(path, to_train)
    check_source(source)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), **options)
    except ImportError:
        raise
    except Exception as error:  # as in `_from_file`
        if isinstance(error, OSError) and not path.exists():
            raise OSError(f"tokenizer: {source}: no such file or folder, and no such id on the Hub: {error}") from error
        said = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer: {source}: expected a tokenizer that transformers reads, but it says: {said}"
        ) from error


def _of_transformers(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer


def check_source(source: str | os.PathLike[str], name: str = "tokenizer") -> None:
    """Raises FileNotFoundError for what cannot be a Hub id, if no such file or folder is there; ValueError for URLs."""
    if is_url(source):
        raise ValueError(f"{name}: expected a local file or folder, or a Hub id, got the URL {source}")
    path = Path(source)
    if not path.exists() and (path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
                              or path.suffix in (".json", ".model", ".gguf", ".tiktoken")):  # fmt: skip
        raise FileNotFoundError(f"{name}: no such file or folder: {source}")


def _from_file(path: Path, to_train: bool) -> Any:
    check_regular(path)
    with open(path, "rb") as stream:
        head = stream.read(1 << 12)
    try:
        tokenizer = _from_gguf(path, to_train) if head[:4] == b"GGUF" else _parsed(path, head)
        return _of_transformers(tokenizer) if to_train else tokenizer
    except ImportError:
        raise
    except Exception as error:  # whatever the library of the format raises
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        hint = "a Git LFS pointer; git lfs pull" if head[:12] == b"version http" else f"{type(error).__name__}: {error}"
        kind = "GGUF" if head[:4] == b"GGUF" else "a SentencePiece model" if head[:1] == b"\n" else "a tokenizer.json"
        raise ValueError(f"tokenizer: {path}: expected {kind}, got {hint}") from error


def _from_gguf(path: Path, to_train: bool) -> Any:
    """As AutoTokenizer has it, which first makes a configuration of the model: 20 s for Gemma's vocabulary.

    Where transformers reads GGUF itself, and no tokenizer lies beside, nothing but the tokenizer's class, its side of
    padding and a token to mask with depends on that.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reads = find_spec("transformers.integrations.gguf") is not None
    is_alone = not any((path.parent / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if reads or not is_alone:
        kind = PreTrainedTokenizerFast if is_alone and not to_train else AutoTokenizer
        return kind.from_pretrained(str(path.parent), gguf_file=path.name)
    # transformers 4 takes Llama's start token for its end, and begins each text with it, whatever the file says.
    from transformers.integrations.ggml import GGUF_TOKENIZER_MAPPING

    GGUF_TOKENIZER_MAPPING["tokenizer_config"]["ggml.add_bos_token"] = "begins"
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    said = tokenizer.init_kwargs
    if said.get("model_type") == "llama" and type(tokenizer.backend_tokenizer.model).__name__ == "Unigram":
        raise ValueError(f"tokenizer: {path}: expected transformers >= 5, since 4 cuts words in another way")
    for name in ("bos", "eos", "unk", "pad"):
        if (token := said.get(f"{name}_token_id")) is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    begins = said.pop("begins", said.get("model_type") == "llama")
    if hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = begins
    return tokenizer


def _parsed(path: Path, head: bytes) -> Any:
    """The tokenizer of a file that begins like this."""
    from tokenizers import Tokenizer

    if _RANK.match(head):
        return _from_tiktoken(path)
    if head[:1] == b"\n" and not head.lstrip().startswith(b"{"):
        return _from_sentencepiece(path)
    spec = json.loads(path.read_bytes()) if b'"token_bytes"' in head or b'"pattern"' in head else None
    if isinstance(spec, dict) and "vocab" in spec and "config" in spec:
        return _from_tekken(spec)
    return Tokenizer.from_file(str(path))


def from_ranks(ranks: Mapping[bytes, int], pattern: str, special: Sequence[str] = (), first: bool = False) -> Any:
    """A byte-level BPE of tokens by rank; special tokens have the ids behind them, or with `first` those before."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers import Regex as Pattern

    spelled = {token: _core.byte_level_piece(token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    before = special if first else ()
    vocab = {**{token: k for k, token in enumerate(before)}, **{spelled[t]: k + len(before) for t, k in ranks.items()}}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Pattern(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a file of tiktoken ranks."""
    lines = (line.partition(b" ") for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, _, rank in lines}


def _from_tiktoken(path: Path) -> Any:
    ranks = tiktoken_ranks(path)
    if len(ranks) not in PATTERNS:
        raise ValueError(
            f"tokenizer: {path}: holds {len(ranks)} tiktoken ranks, of which it is not known how they cut words; known "
            f"are {', '.join(map(str, PATTERNS))}; convert it to a tokenizer.json"
        )
    return from_ranks(ranks, PATTERNS[len(ranks)])


def _from_tekken(spec: Mapping[str, Any]) -> Any:
    config = spec["config"]
    count = int(config["default_num_special_tokens"])
    listed = spec.get("special_tokens") or [{"rank": k, "token_str": name} for k, name in enumerate(TEKKEN_SPECIAL)]
    names = {one["rank"]: one["token_str"] for one in listed}
    entries = spec["vocab"][: int(config["default_vocab_size"]) - count]
    ranks = {base64.b64decode(one["token_bytes"]): int(one["rank"]) for one in entries}
    special = [names.get(k, f"<SPECIAL_{k}>") for k in range(count)]
    return from_ranks(ranks, config["pattern"], special, first=True)


def _from_sentencepiece(path: Path) -> Any:
    """A BPE model as `tokenizers` has it; a merge comes the earlier, the higher its piece is scored."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"tokenizer: {path}: needs sentencepiece to be read; pip install sentencepiece") from error
    known = SentencePieceProcessor(model_file=str(path))
    pieces = [known.id_to_piece(k) for k in range(known.get_piece_size())]
    vocab = {piece: k for k, piece in enumerate(pieces)}
    special = [k for k in range(len(pieces)) if known.is_control(k) or known.is_unknown(k)]
    plain = [k for k in range(len(pieces)) if k not in special and not known.is_byte(k) and not known.is_unused(k)]
    merges = [
        (-known.get_score(k), k, len(pieces[k][:i]), pieces[k][:i], pieces[k][i:])
        for k in plain for i in range(1, len(pieces[k])) if pieces[k][:i] in vocab and pieces[k][i:] in vocab
    ]  # fmt: skip
    unknown = known.id_to_piece(known.unk_id())
    model = models.BPE(vocab, [one[3:] for one in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(pieces[k], normalized=False, special=True) for k in special])
    sample = "In 1995, 12 readers' caf\u00e9s  paid\tfor it; \u591a\u8b1d. x = 12345\n\n    return"
    if tokenizer.encode(sample, add_special_tokens=False).ids != known.encode(sample):
        raise ValueError(f"tokenizer: {path}: expected a SentencePiece BPE like Llama's; give its tokenizer.json")
    return tokenizer
