"""Calibrated events on text that the sample does not have: how many chunks begin differently, and what merging costs.

Texts are what every machine with the test environment has: Python's standard library, its manual, and the READMEs and
headers of installed packages. For each pair and kind: the share of chunks whose first tokens belong to different events
without and with calibration, and the share of the information of the events that is left, the entropy of the merged
events over that before, by frequency. And the seconds that building takes. Results go to bench/results/events.json.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

import torch
from measure import load_tokenizers, machine, parser, table, write
from real_tokenizers import encode

from xtoken import Aligner, PieceIndex, Vocabulary
from xtoken.pieces import Side

PAIRS = ("llama3/qwen3", "llama3/gemma3", "llama3/mistral", "smollm2/gemma3", "qwen3/o200k")
KINDS = {
    "Python": ("stdlib", "*.py"),
    "READMEs": ("purelib", "*.dist-info/METADATA"),
    "C++": ("purelib", "torch/include/c10/**/*.h"),
    "JavaScript, CSS, JSON": ("purelib", "matplotlib/backends/web_backend/**/*.[jc]s*"),
}


def texts(kind: str, size: int) -> list[str]:
    """About so many characters of text, at most 20,000 of a file."""
    if kind == "manual":
        from pydoc_data.topics import topics

        found = sorted(topics.values())
    else:
        folder, pattern = KINDS[kind]
        paths = sorted(Path(sysconfig.get_paths()[folder]).glob(pattern))
        found = [path.read_text(errors="replace")[:20_000] for path in paths if path.is_file()]
    step = max(1, sum(map(len, found)) // size)
    return found[::step]


def information(side: Side, ids: torch.Tensor) -> float:
    """Entropy of the events of these tokens."""
    share = torch.bincount(side.event[ids].long()).double() / len(ids)
    return float(torch.special.entr(share).sum())


def main() -> None:
    options = parser(__doc__, "events.json")
    options.add_argument("--pairs", nargs="+", default=PAIRS)
    options.add_argument("--size", type=int, default=400_000, help="characters of a kind (default %(default)s)")
    given = options.parse_args()
    rows, building = [], []
    for pair in given.pairs:
        tokenizers = load_tokenizers(*pair.split("/"))
        sides = [Vocabulary.from_tokenizer(one) for one in tokenizers]
        made, seconds = [], []
        for sample in ((), None):
            started = time.perf_counter()
            made.append(PieceIndex.build(*sides, texts=sample))
            seconds.append(time.perf_counter() - started)
        plain, built = made
        building.append({"pair": pair, "seconds": seconds[1], "seconds_not_calibrated": seconds[0],
                         "events": built.events, "events_not_calibrated": plain.events,
                         "groups": len(built.merged().groups)})  # fmt: skip
        aligner = Aligner(*sides, "bytes")
        for kind in (*KINDS, "manual"):
            given_texts = texts(kind, given.size)
            ids = [[encode(one, text) for text in given_texts] for one in tokenizers]
            alignment = aligner.align(*ids)
            first = alignment.teacher_ids[alignment.sample_index, alignment.spans[:, 2].long()]
            before, after = (100 * float(one.differing(alignment).float().mean()) for one in (plain, built))
            kept = 100 * information(built.teacher, first) / information(plain.teacher, first)
            rows.append({"pair": pair, "text": kind, "chunks": alignment.num_chunks, "differing_percent_before": before,
                         "differing_percent": after, "information_kept_percent": kept})  # fmt: skip
    print(table(rows), table(building), sep="\n\n")
    found = machine("torch", "tokenizers", "transformers", python=sys.version.split()[0])
    write(given.output, {"machine": found, "rows": rows, "building": building})


if __name__ == "__main__":
    main()
