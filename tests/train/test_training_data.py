"""Files and aligned corpora as examples."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small import SMALL_TEXTS

from xtoken import align_corpus
from xtoken.train import AlignedExamples, EncodedDataset, ExampleEncoder, load_examples
from xtoken.train.data import BATCH_ROWS, read_rows

ROWS = [{"text": text, "n": k} for k, text in enumerate(SMALL_TEXTS)]
CHAT = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]}


def listed(examples):
    """Examples as plain lists, to compare them."""
    return [
        (
            example["student_ids"].tolist(),
            example["labels"].tolist(),
            [(part["ids"].tolist(), part["spans"].tolist()) for part in example["teachers"]],
        )
        for example in examples
    ]


def write(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif path.name.endswith("stream.feather"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif ".txt" in path.name:
        path.write_bytes("\n\n".join(row["text"].strip() for row in rows).encode())
    else:
        pack: Any = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(b"\xef\xbb\xbf" + data))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow", "stream.feather", "a.txt"]
)
def test_every_format_gives_the_same_rows(name, tmp_path):
    rows = [{**row, "text": str(row["text"]).strip()} for row in ROWS]
    path = write(tmp_path / name, rows)
    assert list(read_rows([path], "text")) == ([{"text": row["text"]} for row in rows] if ".txt" in name else rows)


def test_files_are_encoded(tmp_path, student_tok, teacher_tok, small_chat_tok):
    files = [write(tmp_path / name, ROWS[k::2]) for k, name in enumerate(["a.jsonl", "b.parquet"])]
    loaded = load_examples(files, student_tok, [teacher_tok], max_length=30)
    encoder = ExampleEncoder(student_tok, [teacher_tok], max_length=30)
    expected = [example for one in encoder.encode([*ROWS[::2], *ROWS[1::2]]) for example in one]
    assert len(loaded) == len(expected) > len(ROWS)
    assert listed(loaded[k] for k in range(len(loaded))) == listed(expected)


def test_fields_that_only_some_rows_have(tmp_path, small_chat_tok):
    function = {"name": "look", "arguments": {"place": "here"}}
    call = {"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [{"function": function}]}]}
    chats = write(tmp_path / "c.parquet", [CHAT, call])
    assert pq.read_table(chats)["messages"][0][1]["tool_calls"].as_py() is None  # a table has all fields in all rows
    assert next(read_rows([chats]))["messages"][1].keys() == {"role", "content"}
    toks = small_chat_tok("llama3"), [small_chat_tok("qwen3")]
    loaded = load_examples([chats], *toks, train_on="assistant")
    expected = [example for one in ExampleEncoder(*toks, train_on="assistant").encode([CHAT, call]) for example in one]
    assert listed(loaded[k] for k in range(len(loaded))) == listed(expected)


def test_rows_without_anything_to_train_on_are_counted(student_tok, teacher_tok, caplog):
    encoder = ExampleEncoder(student_tok, [teacher_tok], add_end=False)
    rows = ({"text": "" if k % 3 == 0 else "they read it"} for k in range(BATCH_ROWS + 5))
    dataset = EncodedDataset(rows, encoder)
    assert (len(dataset), dataset.dropped) == (BATCH_ROWS + 5 - 87, 87)
    assert "87 rows are left out" in caplog.text
    with pytest.raises(ValueError, match="rows: expected something to train on, got 2 rows of which nothing is"):
        EncodedDataset([{"text": ""}, {"text": "a"}], encoder)


def test_broken_files_are_named(tmp_path, student_tok):
    for line, reason in (
        (b'{"text": ', "Expecting value"),
        (b"[1]", "expected a JSON object, got list"),
        (b'"\xff"', "utf-8"),
    ):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=rf"a.jsonl, line 3: .*{reason}"):
            list(read_rows([tmp_path / "a.jsonl"]))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a.parquet: cannot read it as parquet"):
        list(read_rows([tmp_path / "a.parquet"]))
    with pytest.raises(FileNotFoundError):
        load_examples([tmp_path / "b.jsonl"], student_tok, [])
    rows = [{"text": "they read it"}] * (BATCH_ROWS + 1)
    write(tmp_path / "a.jsonl", rows)
    for name, unit in (("b.jsonl", "line"), ("c.parquet", "row")):
        write(tmp_path / name, [*rows, {"text": None}])
        with pytest.raises(
            ValueError, match=rf"{name}, {unit} {BATCH_ROWS + 2}: row {2 * BATCH_ROWS + 2}: expected mess"
        ):
            load_examples([tmp_path / "a.jsonl", tmp_path / name], student_tok, [])


def test_files_of_no_rows_are_named(tmp_path, student_tok):
    """All of them; one among others may be empty."""
    for name, text in (("a.jsonl", ""), ("b.jsonl", '{"text": "a b c"}\n'), ("c.jsonl", "\n")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    assert len(load_examples([a, b, c], student_tok, [])) == len(load_examples(b, student_tok, [])) == 1
    with pytest.raises(ValueError, match=f"^files: expected rows, got none in {a}, {c}$"):
        load_examples([a, c], student_tok, [])


@pytest.fixture(scope="module")
def corpus(student_tok, teacher_tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "a.jsonl", ROWS)
    align_corpus(student_tok, teacher_tok, folder / "a.jsonl", folder / "out", progress=False)
    return folder / "out"


def test_an_aligned_corpus_gives_the_same_examples(corpus, student_tok, teacher_tok):
    loaded = load_examples([corpus], student_tok, [teacher_tok])
    assert isinstance(loaded, AlignedExamples)
    encoder = ExampleEncoder(student_tok, [teacher_tok], add_end=False)
    expected = listed(example for one in encoder.encode(ROWS) for example in one)
    assert listed(loaded[k] for k in range(len(loaded))) == expected


def test_an_aligned_corpus_begins_as_texts_do_and_is_cut(student_tok, teacher_tok, tmp_path):
    from tokenizers import processors

    toks = []
    for tok in (student_tok, teacher_tok):
        bos = tok.convert_ids_to_tokens(0)
        copy = type(tok)(tokenizer_object=type(tok.backend_tokenizer).from_str(tok.backend_tokenizer.to_str()))
        copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 0)]
        )
        copy.eos_token, copy.pad_token, copy.bos_token = tok.eos_token, tok.pad_token, tok.bos_token
        toks.append(copy)
    corpus = tmp_path / "out"
    align_corpus(*toks, write(tmp_path / "a.jsonl", ROWS), corpus, progress=False)
    for limits in ((None, None), (15, None), (None, 12)):
        loaded = AlignedExamples(corpus, *toks, max_length=limits[0], max_teacher_length=limits[1])
        encoder = ExampleEncoder(toks[0], toks[1:], add_end=False, max_length=limits[0], max_teacher_length=limits[1])
        expected = listed(one[0] for one in encoder.encode(ROWS))
        assert listed(loaded[k] for k in range(len(loaded))) == expected


def test_an_aligned_corpus_goes_alone(corpus, student_tok, teacher_tok, tmp_path):
    for files, toks in (([corpus, corpus], [teacher_tok]), ([corpus], [teacher_tok] * 2)):
        with pytest.raises(ValueError, match="files: an aligned corpus is for one teacher and goes alone"):
            load_examples(files, student_tok, toks)
    with pytest.raises(ValueError, match="made with another student tokenizer"):
        load_examples([corpus], teacher_tok, [teacher_tok])
