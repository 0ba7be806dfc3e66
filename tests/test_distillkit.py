"""Captures of DistillKit, made here by hand from what its format says."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparer import assert_close

from xtoken import TeacherCache, TeacherCacheWriter, Vocabulary
from xtoken.integrations.distillkit import Compression, import_logits

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEACHER = Vocabulary([b"a", b"b", b"c", b"d", b"e", b"<e>", b"<p>"], roles={"eos": 5, "pad": 6})
PLAIN = {"d": 7, "k": 3, "exact_k": 3, "exact_dtype": "float32", "delta_encoding": False, "residual_bins": []}


def packed(values: list[int], bits: int) -> bytes:
    """The highest bit first, padded with zeros."""
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def rows(*one: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(one), np.uint8).reshape(len(one), -1)


def test_ids_of_any_width() -> None:
    compression = Compression(d=128257, k=5, exact_k=5)
    ids = [128256, 0, 77, 65536, 1]
    assert (compression.id_bits, compression.sizes[0]) == (17, 11)
    assert compression.ids(rows(packed(ids, 17), packed(ids[::-1], 17))).tolist() == [ids, ids[::-1]]
    assert Compression(d=131072, k=1, exact_k=1).id_bits == 17
    assert Compression(d=131073, k=1, exact_k=1).id_bits == 18


def test_numbers_curves_and_residuals() -> None:
    bins = ({"scale_dtype": "float16", "element_bits": 3, "num_elements": 2},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1})  # fmt: skip
    compression = Compression(
        d=100, k=6, exact_k=2, exact_dtype="bfloat16", polynomial_terms=(0, 2, "sqrt"), residual_bins=bins,
        delta_encoding=False,
    )  # fmt: skip
    head = struct.pack("<f", -0.5)[2:] + struct.pack("<f", -1.25)[2:] + struct.pack("<3f", -2.0, -0.25, -0.5)
    bytes_ = head + struct.pack("<e", 0.5) + packed([7, 0], 3) + struct.pack("<f", 0.125) + packed([1], 1)
    assert compression.sizes[1] == len(bytes_)
    curve = [-2.0 - 0.25 * t * t - 0.5 * math.sqrt(t) for t in range(4)]
    expected = [-0.5, -1.25, curve[0] + 0.5 * 3, curve[1] - 0.5 * 4, curve[2] + 0.125, curve[3]]
    assert compression.logprobs(rows(bytes_, bytes_)).tolist() == [pytest.approx(expected)] * 2


def test_differences_and_normalised_places() -> None:
    compression = Compression(d=100, k=5, exact_k=2, polynomial_terms=(1, "exp"), normalize_t=True)
    got = compression.logprobs(rows(struct.pack("<4f", -0.5, -0.25, -1.0, -0.125)))
    steps = [-0.5, -0.25, *(-t - 0.125 * math.exp(t) for t in (0.0, 0.5, 1.0))]
    assert got[0].tolist() == pytest.approx(np.cumsum(steps).tolist())


def write(folder: Path, documents: list[tuple[list[int], list[list[int]], list[list[float]]]], file: int = 0) -> Path:
    """A capture whose log-probabilities are float32."""
    columns = {
        "input_ids": pa.array([tokens for tokens, _, _ in documents], pa.list_(pa.uint64())),
        "compressed_logprobs": pa.array(
            [[list(struct.pack(f"<{len(row)}f", *row)) for row in values] for _, _, values in documents],
            pa.list_(pa.list_(pa.uint8())),
        ),
        "bytepacked_indices": pa.array(
            [[list(packed(row, 3)) for row in ids] for _, ids, _ in documents], pa.list_(pa.list_(pa.uint8()))
        ),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"data_{file}.parquet")
    (folder / "compression_config.yaml").write_text(json.dumps(PLAIN))
    return folder


HALF = [math.log(p) for p in (0.5, 0.25, 0.125)]
IDS = [[1, 2, 3], [0, 4, 5], [6, 5, 4]]


def test_a_capture_becomes_a_cache(tmp_path: Path) -> None:
    source = write(tmp_path / "capture", [([0, 1, 2, 6], IDS, [HALF] * 3), ([3, 4], IDS[:1], [HALF])])
    write(source, [([2, 2, 1], IDS[1:], [HALF] * 2), ([4], [], [])], 10)
    cache = import_logits(source, tmp_path / "cache", TEACHER)
    assert [len(TeacherCache(tmp_path / "cache", TEACHER)), len(cache)] == [4, 4]
    first = cache.lookup([0, 1, 2])  # the pad token was appended
    assert first.token_ids.tolist() == [0, 1, 2]
    assert first.logits.ids.tolist() == IDS
    assert_close(first.logits.logprobs, torch.tensor([HALF] * 3), 1e-3, 0.0)
    assert cache.lookup([3, 4]).token_ids.tolist() == [3]  # no row predicts what follows the last
    assert cache.lookup([2, 2, 1]).logits.ids.tolist() == IDS[1:]


def test_rows_that_list_too_much_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "capture", [([0, 1, 2], IDS[:2], [HALF, [math.log(0.5)] * 3])])
    with pytest.warns(UserWarning, match=r"listed probabilities of 1 of 2 rows sum to more than 1\.01"):
        cache = import_logits(source, tmp_path / "cache", TEACHER)
    assert_close(cache[0].logits.logprobs[1].exp(), torch.full((3,), 1 / 3), 1e-3, 0.0)


@pytest.mark.parametrize(
    ("document", "match"),
    [
        (([0, 1], [], []), r"data_0\.parquet: row 0: bytepacked_indices: expected 2 bytes for each of 2 tokens but"),
        (([0, 1], IDS[:1], [HALF[:2]]), "compressed_logprobs: expected 12 bytes .* got 1 of 8 bytes"),
        (([0, 1], [[1, 1, 2]], [HALF]), "a token is listed twice; is the compression config that of the capture"),
        (([0, 9], IDS[:1], [HALF]), r"token_ids: expected 0 \.\.\. 6, got 0 to 9"),
        (([0, 1], [[1, 2, 7]], [HALF]), r"logits\.ids: expected -1 \.\.\. 6, got 1 to 7"),
        (([0, 1], IDS[:1], [[0.5, 0.0, 0.0]]), "expected logarithms of probabilities, got 0.5"),
        (([0, 1], IDS[:1], [[math.nan, 0.0, 0.0]]), "expected logarithms of probabilities, got nan"),
    ],
)  # fmt: skip
def test_documents_that_do_not_fit(document: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        import_logits(write(tmp_path / "capture", [document]), tmp_path / "cache", TEACHER)


MANY = "- &0 [x]\n" + "".join(f"- &{k + 1} [{', '.join([f'*{k}'] * 9)}]\n" for k in range(12))
"""YAML of a few lines that nobody can write down."""


@pytest.mark.parametrize("name", ["data_0.parquet", "compression_config.yaml"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "capture", [([0, 1], IDS[:1], [HALF])])
    (source / name).unlink()
    (source / name).symlink_to("/dev/null")
    with pytest.raises(ValueError, match=rf"{name}: cannot read it: expected a regular file"):
        import_logits(source, tmp_path / "cache", TEACHER)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "capture", [([0, 1], IDS[:1], [HALF])])
    add, path = TeacherCacheWriter.add, source / "data_0.parquet"

    def change(*given: Any) -> None:
        add(*given)
        path.write_bytes(path.read_bytes() + b"more")

    monkeypatch.setattr(TeacherCacheWriter, "add", change)
    with pytest.raises(ValueError, match=r"data_0\.parquet: was changed while it is read"):
        import_logits(source, tmp_path / "cache", TEACHER)


def test_a_document_without_rows_takes_no_memory(tmp_path: Path) -> None:
    source = write(tmp_path / "capture", [([4], [], [])])
    config = {**PLAIN, "d": 1 << 24, "k": 1 << 24, "exact_k": 0, "polynomial_terms": list(range(100))}
    assert len(import_logits(source, tmp_path / "cache", TEACHER, config=config)) == 1
    with pytest.raises(ValueError, match="d: expected a number from 1 to 16777216"):
        import_logits(source, tmp_path / "other", TEACHER, config={**PLAIN, "d": (1 << 24) + 1})


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source: no data_\*\.parquet in "):
        import_logits(tmp_path, tmp_path / "cache", TEACHER)
    source = write(tmp_path / "capture", [([0, 1], IDS[:1], [HALF])])
    for content, match in (("[", "not YAML"), ("3", "expected a mapping"), ("{d: 7, k: 3}", "exact_k: missing"),
                           ("!!bool x", "not YAML"), ("!!timestamp x", "not YAML"), ("{1: 2}", "1: unknown here"),
                           (MANY, "expected a mapping of d, k, exact_k ..., got ")):  # fmt: skip
        (source / "compression_config.yaml").write_text(content)
        with pytest.raises(ValueError, match=rf"compression_config\.yaml: {match}"):
            import_logits(source, tmp_path / "cache", TEACHER)
    (source / "compression_config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"compression_config\.yaml: no such file; give its content as config="):
        import_logits(source, tmp_path / "cache", TEACHER)
    assert len(import_logits(source, tmp_path / "cache", TEACHER, config=PLAIN)) == 1
    pq.write_table(pa.table({"packed_indices": [1]}), source / "data_0.parquet")
    with pytest.raises(
        ValueError,
        match=r"data_0\.parquet: not a capture of DistillKit: expected the columns input_ids, .* got packed_indices",
    ):
        import_logits(source, tmp_path / "other", TEACHER, config=PLAIN)
    nulls = {"input_ids": [[0, 1]], "bytepacked_indices": [None], "compressed_logprobs": [[[0] * 12]]}
    for number, (change, match) in enumerate(
        (
            ({}, "row 0: expected values, got null"),
            ({"bytepacked_indices": [[[1, None]]]}, "row 0: expected values, got null"),
            ({"bytepacked_indices": [[1, 2]]}, "bytepacked_indices: expected lists of lists of integers, got list<"),
        )
    ):
        kinds = {"bytepacked_indices": pa.list_(pa.list_(pa.uint8()))} if "lists" not in match else {}
        columns = {name: pa.array(one, kinds.get(name)) for name, one in {**nulls, **change}.items()}
        pq.write_table(pa.table(columns), source / "data_0.parquet")
        with pytest.raises(ValueError, match=match):
            import_logits(source, tmp_path / str(number), TEACHER, config=PLAIN)
    (source / "data_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"data_0\.parquet: not a capture of DistillKit"):
        import_logits(source, tmp_path / "third", TEACHER, config=PLAIN)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 8}, "k: expected a number from 1 to 7, got 8"),
        ({"exact_k": 4}, "exact_k: expected a number from 0 to 3"),
        ({"exact_dtype": "int8"}, "expected one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"polynomial_terms": ["sin"]}, "expected powers, 'sqrt' or 'exp', got 'sin'"),
        ({"residual_bins": [{"element_bits": 1}]}, "expected scale_dtype, element_bits and num_elements"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 2, "num_elements": 1}]}, "at most k - exact_k"),
        ({"new": 1}, "new: unknown here"),
        ({"exact_dtype": ["float32"]}, "expected one of float16, bfloat16, float32, float64, got .'float32'."),
        ({"polynomial_terms": [[1]]}, "expected powers, 'sqrt' or 'exp', got .1."),
        ({"polynomial_terms": [10**400]}, "expected powers, 'sqrt' or 'exp', got 1000"),
        ({"polynomial_terms": [1, 1]}, "polynomial_terms: expected each once"),
        ({"residual_bins": 5}, "residual_bins: expected a list, got 5"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Compression.read({**PLAIN, **change})


def test_damaged_files_give_a_value_error_that_names_them(tmp_path: Path) -> None:
    """Parquet has no checksums here, so other values can come; nothing else may."""
    source = write(tmp_path / "capture", [([0, 1, 2, 6], IDS, [HALF] * 3), ([3, 4], IDS[:1], [HALF])])
    path, draw, refused = source / "data_0.parquet", random.Random(0), 0
    content = path.read_bytes()
    for k in range(100):
        damaged = bytearray(content[: draw.randrange(len(content))] if k % 5 == 0 else content)
        if k % 5:
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            import_logits(source, tmp_path / str(k), TEACHER)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017, an error may come or not
            refused += 1
    assert refused > 40
