"""Calibrated events on text that the sample does not have: how many chunks begin differently, and what merging costs.

Texts are what every machine with the test environment has: Python's standard library, its manual, and the READMEs and
headers of installed packages. For each pair and kind: the share of chunks whose first tokens belong to different events
without and with calibration, and the share of the information of the events that is left, the entropy of the merged
events over that before, by frequency. And the seconds that building takes, of the clock and of processors, from fresh
vocabularies on, with how busy the machine was. Results go to bench/results/events.json.

With ``--catalogues FOLDER`` also on the translated messages below a folder, such as those of Django:

    pip install --no-deps --target FOLDER Django
"""

from __future__ import annotations

import json
import os
import re
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
LANGUAGES = {
    "Western Europe": "ca da de es fr it nb nl pt sv",
    "Eastern Europe": "cs et fi hr hu lt lv pl ro sk sl tr",
    "Cyrillic": "be bg kk ru sr uk",
    "Greek": "el",
    "Arabic, Hebrew, Persian": "ar fa he",
    "India, Armenia": "bn hi hy ka ml ta te",
    "China, Japan, Korea": "ja ko zh_Hans zh_Hant",
    "Indonesia, Thailand, Vietnam": "id th vi",
}
"""Of the catalogues."""


def texts(kind: str, size: int, catalogues: Path | None = None) -> list[str]:
    """About so many characters of text, at most 20,000 of a file."""
    if kind in LANGUAGES:
        assert catalogues is not None
        found = [
            messages(path) for name in LANGUAGES[kind].split() for path in sorted(catalogues.rglob(f"{name}/*/*.po"))
        ]
    elif kind == "manual":
        from pydoc_data.topics import topics

        found = sorted(topics.values())
    else:
        folder, pattern = KINDS[kind]
        paths = sorted(Path(sysconfig.get_paths()[folder]).glob(pattern))
        found = [path.read_text(errors="replace")[:20_000] for path in paths if path.is_file()]
    step = max(1, sum(map(len, found)) // size)
    return found[::step]


def messages(path: Path) -> str:
    """The translations of a catalogue, one a line."""
    entries = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', path.read_text().split("\n\n", 1)[1], re.MULTILINE)
    return "\n".join(filter(None, ("".join(map(json.loads, entry.splitlines())) for entry in entries)))


def information(side: Side, ids: torch.Tensor) -> float:
    """Entropy of the events of these tokens."""
    share = torch.bincount(side.event[ids].long()).double() / len(ids)
    return float(torch.special.entr(share).sum())


def main() -> None:
    options = parser(__doc__, "events.json")
    options.add_argument("--pairs", nargs="+", default=PAIRS)
    options.add_argument("--size", type=int, default=400_000, help="characters of a kind (default %(default)s)")
    options.add_argument("--catalogues", type=Path, help="a folder with translated messages, LANGUAGE/*/*.po")
    given = options.parse_args()
    rows, building = [], []
    for pair in given.pairs:
        tokenizers = load_tokenizers(*pair.split("/"))
        made, seconds = [], []
        for sample in ((), None):
            started, computed = time.perf_counter(), time.process_time()
            sides = [Vocabulary.from_tokenizer(one) for one in tokenizers]
            made.append(PieceIndex.build(*sides, texts=sample))
            seconds.append((time.perf_counter() - started, time.process_time() - computed))
        plain, built = made
        building.append({"pair": pair, "seconds": seconds[1][0], "processor_seconds": seconds[1][1],
                         "processor_seconds_not_calibrated": seconds[0][1], "load": os.getloadavg()[0],
                         "events": built.events, "events_not_calibrated": plain.events,
                         "groups": len(built.merged().groups)})  # fmt: skip
        aligner = Aligner(*sides, "bytes")
        for kind in (*KINDS, "manual", *(LANGUAGES if given.catalogues else ())):
            given_texts = texts(kind, given.size, given.catalogues)
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
