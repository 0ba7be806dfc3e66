"""Mutated files and hostile calls, seeded: each gives the right value or an error of ours; `python fuzzing.py COUNT`.

COUNT inputs of each target; an input is known by its target and its number, so that a failure can be repeated:
`python fuzzing.py 1 TARGET NUMBER`. A crash, a hang or a giant allocation ends the process.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import faulthandler
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_damage
import test_distillkit
from small_tokenizers import byte_level

import xtoken
from xtoken import cli
from xtoken.corpus import tables
from xtoken.corpus.files import find_files
from xtoken.corpus.source import rows
from xtoken.integrations.distillkit import import_logits
from xtoken.report import run_report
from xtoken.train import command as training
from xtoken.vocabulary import sources

SECONDS, BYTES = 20, 4 << 30
"""What one input may take, of a processor's time and of memory: more is a hang, or a giant allocation."""

OURS = (ValueError, TypeError, FileNotFoundError)

NUMBERS = [
    b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8, struct.pack("<q", 2**62), b"2147483648", b"-1", b"1e999",
]  # fmt: skip
PIECES = [b"", b"\0", b"null", b"{}", b"[", b'"', b"\n", b"\x1b[31m", b"\xed\xa0\x80", b"NaN"]
INTS = [0, 1, 2, 3, 4, 5, 7, -1, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63 - 1]


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


# --- files


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """A small file of each kind that holds a tokenizer."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    texts = ["In 1995, some text to learn from, for as many words as there are."] * 9
    byte_level(300, texts).save(str(folder / "tokenizer.json"))
    yield folder / "tokenizer.json"
    sources.PATTERNS[256] = sources.PATTERNS[50256]  # else a file of so few ranks is refused before it is looked at
    ranks = [base64.b64encode(bytes([k])).decode() for k in range(256)]
    (folder / "few.tiktoken").write_text("".join(f"{token} {k}\n" for k, token in enumerate(ranks)))
    yield folder / "few.tiktoken"
    vocab = [{"rank": k, "token_bytes": token, "token_str": None} for k, token in enumerate(ranks)]
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 276, "default_num_special_tokens": 20}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    yield folder / "tekken.json"
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=310, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=9,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    yield folder / "tokenizer.model"
    text, entries = struct.Struct("<Q"), [b"<s>", b"</s>", *(bytes([97 + k]) for k in range(26)), b"ab", b"abc"]
    strings = b"".join(text.pack(len(one)) + one for one in entries)
    known = [
        (b"general.architecture", struct.pack("<I", 8) + text.pack(5) + b"llama"),
        (b"tokenizer.ggml.model", struct.pack("<I", 8) + text.pack(4) + b"gpt2"),
        (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, len(entries)) + strings),
        (b"tokenizer.ggml.bos_token_id", struct.pack("<II", 4, 0)),
        (b"tokenizer.ggml.eos_token_id", struct.pack("<II", 4, 1)),
        (b"tokenizer.ggml.merges", struct.pack("<IIQ", 9, 8, 2) + text.pack(3) + b"a b" + text.pack(4) + b"ab c"),
    ]
    fields = b"".join(text.pack(len(name)) + name + value for name, value in known)
    (folder / "small.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(known)) + fields)
    yield folder / "small.gguf"


def read_lines(path: Path) -> list[Any]:
    return [row for file in find_files([path]) for row in rows(file, "text")]


def read_table(path: Path) -> list[Any]:
    return [row for file in find_files([path]) for row in tables.rows(file)]


def read_capture(path: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        cache = import_logits(path.parent, Path(folder) / "cache", test_distillkit.TEACHER)
        return [cache[k].logits.logprobs for k in range(len(cache))]


def read_recipe(path: Path) -> Any:
    """As options of a run; argparse ends the process."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return training.parse(["--config", str(path)])
        except SystemExit as end:
            raise ValueError(f"status {end.code}") from None


def calibrated(path: Path) -> Any:
    index = xtoken.PieceIndex.load(path)
    return [index.data, index.text], index.metadata, index.merged().summary()


def fingerprint(path: Path) -> str:
    return xtoken.Vocabulary.from_tokenizer(path).fingerprint()


def files(folder: Path) -> Iterator[tuple[str, Path, Callable[[Path], Any], bool]]:
    """Of each format a name, a whole file, what reads it, and whether damage must be seen."""
    for name in test_damage.NAMES:
        path, load = test_damage.make(name, folder / name / "out")
        yield name, path, load, name != "nemo.pt"
    for path in tokenizer_files(folder / "tokenizers"):
        yield path.name, path, fingerprint, False
    of_rows = [{"text": f"text {k}", "id": str(k)} for k in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in of_rows).encode()
    packed = {"gz": gzip.compress(lines), "bz2": bz2.compress(lines), "xz": lzma.compress(lines)}
    of_lines = {f"lines.jsonl.{ending}": content for ending, content in packed.items()}
    of_lines |= {"lines.jsonl": lines, "lines.txt": lines, "array.json": json.dumps(of_rows).encode()}
    for name, content in of_lines.items():
        (folder / name).write_bytes(content)
        yield name, folder / name, read_lines, False
    table = pa.Table.from_pylist(of_rows)
    pq.write_table(table, folder / "rows.parquet")
    with pa.ipc.new_file(folder / "rows.arrow", table.schema) as file:
        file.write(table)
    for name in ("rows.parquet", "rows.arrow"):
        yield name, folder / name, read_table, False
    half = test_distillkit.HALF
    capture = test_distillkit.write(folder / "capture", [([0, 1, 2], test_distillkit.IDS[:2], [half, half])])
    for name in ("data_0.parquet", "compression_config.yaml"):
        yield name, capture / name, read_capture, False
    (folder / "recipe.yaml").write_text("student: S\nteacher: [T]\ndata: [D]\noutput: out\nlearning_rate: 1.0e-3\n")
    yield "recipe.yaml", folder / "recipe.yaml", read_recipe, False
    texts = ["In 1995, some text to learn from,  for as many words as there are."] * 9
    index = xtoken.PieceIndex.build(byte_level(300, texts), byte_level(280, texts), texts=texts)
    index.save(folder / "calibrated.safetensors")
    yield "calibrated.safetensors", folder / "calibrated.safetensors", calibrated, True
    run = folder / "run"
    run.mkdir()
    history = [{"step": k, "loss": 1.0 / k, "eval_ce": 2.0} for k in (1, 2, 3)]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    (run / "settings.json").write_text(json.dumps({"learning_rate": 1e-3, "data": ["a"]}))
    sample = {"step": 1, "prompt": "a", "completion": "b", "tokens": 1, "ended": True}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    for path in sorted(run.iterdir()):
        yield path.name, path, lambda path: run_report(path.parent).html, False


def of_file(path: Path, load: Callable[[Path], Any], is_checked: bool, draw: random.Random) -> None:
    """Reads a mutated file, in its place among the others of its folder, and puts the whole one back."""
    whole = path.read_bytes()
    expected = load(path) if is_checked else None
    changed = mutated(whole, draw)
    path.write_bytes(changed)
    try:
        value = load(path)
        if is_checked and changed != whole:
            assert test_damage.is_equal(value, expected), "damage was not seen"
    finally:
        path.write_bytes(whole)


# --- calls

STUDENT, TEACHER = test_damage.STUDENT, test_damage.TEACHER


def some_ints(draw: random.Random, largest: int, count: int) -> Any:
    """A row of ids, most often good ones, as a list, an array or a tensor of some type."""
    good = draw.random() > 0.1
    values = [draw.randrange(largest) if good else draw.choice(INTS) for _ in range(count if good else count + 1)]
    kinds = ["list", "numpy", "torch"] if good else ["list", "float", "uint64", "bool", "sparse", "meta"]
    kind = draw.choice(kinds)
    if kind == "list":
        return values
    if kind == "uint64":
        return np.array([abs(value) for value in values], np.uint64)
    made = torch.tensor(values, dtype=torch.int64)
    if kind == "numpy":
        return made.numpy()
    if kind in ("sparse", "meta"):
        return made.to_sparse() if kind == "sparse" else made.to("meta")
    return made if kind == "torch" else made.to(torch.float32 if kind == "float" else torch.bool)


def align(draw: random.Random) -> None:
    """Aligned tokens must spell the same bytes."""
    counts = draw.randrange(9), draw.randrange(9)
    ids = [some_ints(draw, len(side), count) for side, count in zip((STUDENT, TEACHER), counts, strict=True)]
    masks = [None if draw.random() < 0.5 else some_ints(draw, 2, count) for count in counts]
    found = xtoken.Aligner(STUDENT, TEACHER, method=draw.choice(["auto", "bytes", "dp"])).align(*ids, *masks)
    rows = [[int(token) for token in one] for one in ids]
    for a, b, c, d in found.spans.tolist():
        ours, theirs = STUDENT.decode(rows[0][a:b]), TEACHER.decode(rows[1][c:d])
        assert ours == theirs or b - a == d - c == 1, f"{ids} {masks}: {ours!r} for {theirs!r}"


def loss(draw: random.Random) -> None:
    """Losses of tensors that may have been spoiled: a value, or refused."""
    W, pieces = xtoken.ProjectionMatrix.build(STUDENT, TEACHER), xtoken.PieceIndex.build(STUDENT, TEACHER)
    ids = torch.tensor([[0, 1, 2, 5]]), torch.tensor([[2, 0, 2, 0]])
    spans = torch.tensor([[1, 2, 1, 2], [2, 3, 2, 4]], dtype=torch.int32)
    alignment = xtoken.Alignment(spans, [0, 2], *ids)
    tensors = [alignment.spans, alignment.offsets, alignment.predicted, alignment.student_ids, alignment.teacher_ids,
               W.row_ptr, W.col, W.weight, pieces.data, pieces.text]  # fmt: skip
    for _ in range(draw.randrange(3)):
        one = draw.choice(tensors)
        if one is not None and one.numel():
            value = draw.choice(INTS)
            limit = torch.iinfo(one.dtype).max if not one.dtype.is_floating_point and one.dtype != torch.bool else value
            one.data.view(-1)[draw.randrange(one.numel())] = max(-abs(limit), min(value, limit))
    is_odd = draw.random() < 0.2
    shapes = [(1, draw.choice([4, 3, 0]) if is_odd else 4, len(side) + (draw.choice([-1, 2]) if is_odd else 0))
              for side in (STUDENT, TEACHER)]  # fmt: skip
    z, y = (torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(99))) for shape in shapes)
    z = z.to(draw.choice([torch.float32, torch.bfloat16, torch.float64])).requires_grad_()
    kind = draw.choice([one for one in xtoken.losses.registered().values() if one.needs.name != "SAME_TOKENIZER"])
    needed = {"PROJECTION": [W], "PIECES": [pieces]}.get(kind.needs.name, [])
    given: Any = xtoken.LinearLogits(z, torch.eye(len(STUDENT), dtype=z.dtype)) if draw.random() < 0.2 else z
    kind.function()(given, y, alignment, *needed).backward()


def spoiled(value: Any, draw: random.Random) -> Any:
    """JSON with something else in one of its places."""
    if not isinstance(value, (list, dict)) or not value or draw.random() < 0.1:
        return draw.choice(
            [None, -1, 2**70, "", "x", "token_id:-1", [], {}, float("nan"), 5.5, True, [[]], {"1": None}]
        )
    at = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    value[at] = spoiled(value[at], draw)
    return value


def served(draw: random.Random) -> None:
    """What a server lists, in one of three forms, of which something has been spoiled: rows as many as tokens."""
    forms: list[Any] = [
        [None, {"1": {"logprob": -0.5}, "2": {"logprob": -1.5}}, {"0": {"logprob": -0.1}}],
        {"meta_info": {"input_top_logprobs": [None, [[-0.5, 1, "b"], [-1.5, 2, "c"]], [[-0.1, 0, "a"]]]}},
        {"top_logprobs": [None, {"9": -0.5, "token_id:1": -1.5}, {"99": -0.1}]},
        {"content": [{"token": "9", "logprob": -0.5, "bytes": [57], "top_logprobs": [
            {"token": "9", "logprob": -0.5, "bytes": [57]}, {"token": "5", "logprob": -1.5, "bytes": None}]}]},
    ]  # fmt: skip
    found = xtoken.TopKLogits.from_vllm(spoiled(draw.choice(forms), draw), tokenizer=TEACHER)
    assert found.ids.shape == found.logprobs.shape


def cached(folder: Path, draw: random.Random) -> None:
    """Documents for a teacher cache, of which something may be odd: they come back, or are refused."""
    count = draw.randrange(1, 5)
    tokens = some_ints(draw, len(TEACHER), count)
    ids = torch.tensor([draw.sample(range(len(TEACHER)), 3) for _ in range(count)])
    logprobs = torch.randn(count, len(TEACHER), generator=torch.Generator().manual_seed(draw.randrange(99)))
    logprobs = logprobs.log_softmax(1).gather(1, ids)
    for one in (ids, logprobs):
        if draw.random() < 0.3:
            one[draw.randrange(count), draw.randrange(3)] = draw.choice(INTS)
    if draw.random() < 0.1:
        logprobs[0, 0] = draw.choice([float("nan"), float("inf"), 1e-4, -1e9])
    tail = torch.full((count,), draw.choice([0.0, 0.5, -1.0, float("nan"), 7.0])) if draw.random() < 0.3 else None
    place = folder / "made-cache"
    shutil.rmtree(place, ignore_errors=True)
    with xtoken.TeacherCacheWriter(place, TEACHER, draw.choice([1, 2, 3])) as writer:
        writer.add(tokens, xtoken.TopKLogits(ids, logprobs), tail)
    found = xtoken.TeacherCache(place, TEACHER)[0]
    assert found.token_ids.tolist() == [int(token) for token in tokens][:count]
    assert bool((found.logits.logprobs <= 0).all()), f"{ids} {logprobs}: {found.logits.logprobs}"


def build(draw: random.Random) -> None:
    """Vocabularies of odd tokens: rows of W sum to 1."""
    tokens = [bytes(draw.choice(b"ab\xc3\xa9 1\0") for _ in range(draw.randrange(5))) for _ in range(draw.randrange(9))]
    roles = {draw.choice(["bos", "eos", "pad", "unk", "x"]): draw.choice(INTS[:8])} if draw.random() < 0.3 else {}
    student = xtoken.Vocabulary(tokens, roles=roles)
    for pair in ((student, TEACHER), (STUDENT, student)):
        W = xtoken.ProjectionMatrix.build(*pair, top_k=draw.choice([1, 2, 4]))
        sums = torch.zeros(len(pair[0])).index_add_(0, W.row_index.long(), W.weight)
        assert bool((((sums - 1).abs() < 1e-5) | (sums == 0)).all()), f"{tokens}: {sums}"
        xtoken.choose_loss(*pair, W, pieces=xtoken.PieceIndex.build(*pair))


def command(folder: Path, draw: random.Random) -> None:
    """Command lines of words that may not belong together: a status, never another exception."""
    words = [
        "audit", "show", "project", "align", "pieces", "--student", "--teacher", "--text", "--json", "--top-k", "-1",
        "1e9", "none.json", str(folder / "tokenizers" / "tokenizer.json"), str(folder), "--output",
        str(folder / "made"), "--input", str(folder / "lines.jsonl"), "\x1b[31m", "--help",
    ]  # fmt: skip
    given, told, printed = [draw.choice(words) for _ in range(draw.randrange(1, 8))], io.StringIO(), io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(told), contextlib.redirect_stdout(printed):
        cli.main(given)
    assert "\x1b[31m" not in told.getvalue() + printed.getvalue(), f"{given}: {told.getvalue()!r}"
    shutil.rmtree(folder / "made", ignore_errors=True)


# --- all


def targets(folder: Path) -> dict[str, Callable[[random.Random], None]]:
    """What is tried, by name."""
    made: dict[str, Callable[[random.Random], None]] = {}
    for name, path, load, is_checked in files(folder):
        load(path)  # a whole one is read, or none of its changes would be looked at
        made[name] = functools.partial(of_file, path, load, is_checked)
    made |= {"align": align, "loss": loss, "build": build, "served": served}
    in_folder = {"command": command, "cached": cached}
    return {**made, **{name: lambda draw, call=call: call(folder, draw) for name, call in in_folder.items()}}


def hang(*_: Any) -> None:
    faulthandler.dump_traceback()
    raise TimeoutError(f"took more than {SECONDS} s of a processor")


def run(count: int, only: str | None = None, number: int | None = None) -> Counter[tuple[str, str]]:
    """Tries so many inputs of each target; what became of them."""
    result: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        known = {key: one for key, one in targets(Path(name)).items() if only in (None, key)}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        signal.signal(signal.SIGPROF, hang)
        for k, (key, one) in itertools.product(range(count) if number is None else [number], known.items()):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                one(random.Random(f"{key} {k}"))
                result[key, "value"] += 1
            except BaseException as error:
                result[key, "refused" if isinstance(error, OURS) else "FAULT"] += 1
                if not isinstance(error, OURS):
                    print(f"{key} {k}: {error!r}"[:300], file=sys.stderr)
            signal.setitimer(signal.ITIMER_PROF, 0)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    found = run(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
    print("\n".join(f"{count:8} {' '.join(what)}" for what, count in sorted(found.items())))
    sys.exit(any(what == "FAULT" for _, what in found))
