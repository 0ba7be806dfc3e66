"""Mutated files, seeded: each must load as what it was, or be refused by an error of ours; `python fuzzing.py COUNT`.

An input is known by its format and its number, so that a failure can be repeated: `python fuzzing.py 1 FORMAT NUMBER`.
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import xtoken
from xtoken.corpus.files import find_files
from xtoken.corpus.source import rows

SECONDS, BYTES = 20, 4 << 30
"""What one input may take: longer is a hang, more memory a giant allocation."""

NUMBERS = [
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    struct.pack("<q", 2**62),
    b"2147483648",
    b"-1",
    b"1e999",
]
PIECES = [b"", b"\0", b"null", b"{}", b"[", b'"', b"\n", b"\x1b[31m", b"\xed\xa0\x80", b"NaN"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four changes."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([0, 1, 1, 4, 8, 64]))
        kind = draw.randrange(6)
        if kind == 0 and data:
            at = draw.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + draw.choice(NUMBERS) + data[end:]
        elif kind == 2:
            data = data[:at] + draw.choice(PIECES) + data[end:]
        elif kind == 3:
            data = data[:at] + data[end:]
        elif kind == 4:
            data = data[:end] + data[at:]
        else:
            data = data[:at]
    return data


def vocabularies() -> tuple[xtoken.Vocabulary, xtoken.Vocabulary]:
    return xtoken.Vocabulary([b"a", b"b", b"ab", b"ba"]), xtoken.Vocabulary([b"a", b"b", b"bb", b"aab"])


def formats(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """A whole file of each format, and what reads it."""
    from small_tokenizers import byte_level

    W, pieces = xtoken.ProjectionMatrix.build(*vocabularies()), xtoken.PieceIndex.build(*vocabularies())
    W.save(folder / "W")
    pieces.save(folder / "P")
    W.to_nemo(folder / "nemo.pt")
    byte_level(300, ["some text to learn from"]).save(str(folder / "tokenizer.json"))
    lines = "".join(json.dumps({"text": f"text {k}", "id": str(k)}) + "\n" for k in range(9))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    def read(path: Path) -> list[Any]:
        return [row for file in find_files([path]) for row in rows(file, "text")]

    return {
        "W": (folder / "W", xtoken.ProjectionMatrix.load),
        "pieces": (folder / "P", xtoken.PieceIndex.load),
        "nemo": (folder / "nemo.pt", lambda path: xtoken.ProjectionMatrix.from_nemo(path, 4)),
        "tokenizer": (folder / "tokenizer.json", lambda path: xtoken.Vocabulary.from_tokenizer(path).fingerprint()),
        "jsonl": (folder / "lines.jsonl", read),
        "jsonl.gz": (folder / "packed.jsonl.gz", read),
    }


def run(count: int, only: str | None = None, number: int | None = None) -> Counter[str]:
    """Reads so many inputs; what became of them."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    result: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = {key: value for key, value in formats(folder).items() if only in (None, key)}
        for k in range(count) if number is None else [number]:
            for key, (path, load) in known.items():
                target = folder / f"mutated{''.join(path.suffixes)}"
                target.write_bytes(mutated(path.read_bytes(), random.Random(f"{key} {k}")))
                signal.alarm(SECONDS)
                try:
                    value = load(target)
                    if key in ("W", "pieces"):  # they have a checksum
                        assert target.read_bytes() == path.read_bytes(), f"{key} {k}: {value}"
                    result[f"{key}: read"] += 1
                except BaseException as error:
                    is_ours = type(error) in (ValueError, FileNotFoundError)
                    result[f"{key}: refused" if is_ours else f"{key}: FAULT {type(error).__name__}"] += 1
                    if not is_ours:
                        print(f"{key} {k}: {error!r}"[:300], file=sys.stderr)
                signal.alarm(0)
    return result


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    found = run(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
    print("\n".join(f"{count:8} {what}" for what, count in sorted(found.items())))
    sys.exit(any("FAULT" in what for what in found))
