"""Datasets of Hugging Face: encoded once, in workers, as they are read, and found by name."""

from __future__ import annotations

import itertools
import os
import re
import signal
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from small import SMALL_TEXTS

from xtoken.losses.backends import IGNORED
from xtoken.train import EncodedDataset, EncodedStream, EncodedTable, ExampleEncoder
from xtoken.train.data import BATCH_ROWS, has_chats, lengths, read_rows, text_sample
from xtoken.train.table import open_data

datasets = pytest.importorskip("datasets", reason="xtoken[datasets] is not installed")

ASKED = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they read it"}]
CALL = {"function": {"name": "look", "arguments": {"place": "here"}}}
ROWS = [
    *({"text": text} for text in SMALL_TEXTS),
    {"messages": ASKED},
    {"messages": [*ASKED, {"role": "user", "content": "and?"}, {"role": "assistant", "tool_calls": [CALL]}]},
    {"prompt": "who?", "completion": " they read it"},
    {"text": ""},  # of which nothing is trained on
    {"messages": ASKED, "who": "a"},
]


def plain(example: dict[str, Any]) -> dict[str, Any]:
    """An example as plain lists, to compare it, with its types."""
    flat = {name: value for name, value in example.items() if name != "teachers"}
    for k, entry in enumerate(example["teachers"]):
        flat.update({f"{name} {k}": value for name, value in entry.items()})
    return {name: (str(one.dtype), one.tolist()) if isinstance(one, np.ndarray) else one for name, one in flat.items()}


def listed(examples: Any) -> list[dict[str, Any]]:
    return [plain(examples[k]) for k in range(len(examples))]


def table_of(rows: list[dict[str, Any]]) -> Any:
    """In memory; every column of a table is in all of its rows, as None if need be."""
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for row in rows for name in row})


@pytest.fixture
def saved(tmp_path):
    """Makes a dataset on disk, which has a cache."""

    def save(rows: list[dict[str, Any]], name: str = "set") -> Any:
        table_of(rows).save_to_disk(tmp_path / name)
        return datasets.load_from_disk(tmp_path / name)

    return save


@pytest.fixture
def toks(small_chat_tok):
    return small_chat_tok("llama3"), [small_chat_tok("qwen3"), small_chat_tok("llama3")]


@pytest.fixture
def once(monkeypatch):
    """After it is called nothing may be encoded any more."""

    def forbid() -> None:
        monkeypatch.setattr(ExampleEncoder, "encode", None)

    return forbid


@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": 30, "name_documents": True, "train_on": "assistant"}, {"with_prompts": True},
     {"teacher_column": "who", "teacher_names": ["a", "b"], "teacher_systems": ["Be brief.", None]}],
    ids=str,
)  # fmt: skip
def test_a_table_gives_the_examples_of_a_list(saved, toks, options, caplog):
    """With columns of None for absent fields; also in memory, chosen from a larger one, and told the same."""
    table = saved(ROWS)
    assert table[0]["messages"] is None
    assert table[len(SMALL_TEXTS)]["messages"][0].keys() == {"role", "content", "tool_calls"}
    want = EncodedDataset(ROWS, ExampleEncoder(*toks, **options))
    told = sorted(caplog.messages)
    picked = datasets.concatenate_datasets([table, table]).select(range(len(ROWS), 2 * len(ROWS)))
    for rows in (table, table_of(ROWS), picked, table.with_format("numpy")):
        caplog.clear()
        made = EncodedTable(rows, ExampleEncoder(*toks, **options))
        assert listed(made) == listed(want)
        assert (len(made), made.dropped) == (len(want), want.dropped)
        assert lengths(made) == lengths(want)
        assert sorted(one for one in caplog.messages if "TOKENIZERS" not in one) == told
    assert plain(made[-1]) == plain(want[len(want) - 1])
    with pytest.raises(IndexError):
        made[len(made)]


def test_a_second_run_reads_the_cache(saved, toks, once, caplog):
    """And tells what is lost as the first did; another number of workers does not matter."""
    rows = [*ROWS, {"messages": [ASKED[0], {"role": "assistant", "content": " "}]}] * 12
    encoder = ExampleEncoder(*toks, max_length=30, train_on="assistant")
    first = EncodedTable(saved(rows), encoder)
    told, counts, want = list(caplog.messages), encoder.report.counts, listed(first)
    assert counts["turns without a label"] == 12
    assert len(rows) > BATCH_ROWS
    assert any("more of these are counted: turns without a label" in one for one in told)
    assert "24 rows are left out, since nothing of them is trained on" in told[-2]
    once()
    caplog.clear()
    again = ExampleEncoder(*toks, max_length=30, train_on="assistant")
    assert listed(EncodedTable(saved(rows), again, workers=2)) == want
    assert [one for one in caplog.messages if "TOKENIZERS" not in one] == told
    assert (again.report.counts, again.report.rows) == (counts, len(rows))


def test_a_worker_that_dies(saved, toks, monkeypatch):
    """Is told; datasets itself may have an error without a word."""
    this = os.getpid()

    def die(*_: Any) -> None:
        if os.getpid() != this:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ExampleEncoder, "encode", die)
    with pytest.raises(RuntimeError, match=r"workers: one of the 2 processes .* has died|subprocesses has abruptly"):
        EncodedTable(saved(ROWS * 12, "killed"), ExampleEncoder(*toks), workers=2)


def test_workers(saved, toks, once):
    """They count rows through the whole table; what each has made is one table."""
    want = listed(EncodedDataset(ROWS * 12, ExampleEncoder(*toks)))
    encoder = ExampleEncoder(*toks)
    made = EncodedTable(saved(ROWS * 12), encoder, workers=2)
    assert listed(made) == want
    assert encoder.report.rows == 12 * len(ROWS)
    with pytest.raises(ValueError, match=f"row {len(ROWS) * 12}: expected messages"):
        EncodedTable(saved([*ROWS * 12, {"text": None}], "broken"), ExampleEncoder(*toks), workers=2)
    once()
    assert listed(EncodedTable(saved(ROWS * 12), ExampleEncoder(*toks))) == want


def test_what_a_cache_is_named_by(small_chat_tok, student_tok):
    """Everything that makes other examples; not the time, unless a template writes it, and then what it writes."""
    toks = small_chat_tok("llama3"), [small_chat_tok("qwen3")]
    name = lambda *sides, **options: ExampleEncoder(*(sides or toks), **options).fingerprint()  # noqa: E731
    assert name() == name(now=datetime(2001, 2, 3))
    others = [
        name(toks[0], []), name(toks[0], [toks[0]]), name(toks[1][0], [toks[0]]), name(toks[0], toks[1] * 2),
        name(train_on="assistant"), name(max_length=9), name(max_teacher_length=9), name(text_column="body"),
        name(add_end=False), name(name_documents=True), name(with_prompts=True), name(teacher_systems=["Be brief."]),
        name(teacher_names=["a"]), name(teacher_column="who", teacher_names=["a"]),
    ]  # fmt: skip
    dated = small_chat_tok("qwen3x")
    dated.chat_template, before = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template, dated.chat_template
    days = [name(toks[0], [dated], now=datetime(2001, 2, day, hour)) for day, hour in ((3, 4), (3, 5), (4, 4))]
    dated.chat_template = "{{ strftime_now(how) }}" + before  # a row says how
    hours = [name(toks[0], [dated], now=datetime(2001, 2, 3, hour)) for hour in (4, 5)]
    dated.chat_template = before
    others += [days[0], days[2], *hours, name(toks[0], [dated])]
    assert days[0] == days[1]
    assert len({name(), *others}) == 1 + len(others)


def test_what_others_add_to_an_example_stays(saved, toks, monkeypatch):
    encode = ExampleEncoder.encode

    def more(self, rows, first_row=0):
        found = encode(self, rows, first_row)
        for row, some in zip(rows, found, strict=True):
            for one in some:
                one.update(row=row, prompt=one["student_ids"][:2])
                one["teachers"][0]["route"] = [0, None]
        return found

    monkeypatch.setattr(ExampleEncoder, "encode", more)
    made = EncodedTable(saved(ROWS[:2]), ExampleEncoder(*toks))
    assert made[1]["row"] == ROWS[1]
    assert made[1]["prompt"] == made[1]["student_ids"][:2].tolist()
    assert made[1]["teachers"][0]["route"] == [0, None]


def test_tables_without_anything_to_train_on(saved, toks, once):
    empty = datasets.Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="rows: expected something to train on, got none"):
        EncodedTable(empty, ExampleEncoder(*toks))
    with pytest.raises(ValueError, match="rows: expected something to train on, got 3 rows of which nothing is"):
        EncodedTable(saved([{"text": ""}] * 3), ExampleEncoder(*toks))
    long = [{"prompt": "word " * 40, "completion": "answer"}] * 3
    for _ in range(2):  # also from the cache
        with pytest.raises(ValueError, match="rows: 3 of 3 are lost to rows that lose what is beyond a length limit"):
            EncodedTable(saved(long), ExampleEncoder(*toks, max_length=8, train_on="completion"))
        once()


def test_columns_that_are_something_else(saved, toks):
    message = (
        r"row 0: expected messages, conversations, prompt and completion, or text in 'text' \(text_column\), got "
        "instruction: str, output: str"
    )
    table = saved([{"instruction": "who?", "output": "they read it", "input": None}])
    with pytest.raises(ValueError, match=message):
        EncodedTable(table, ExampleEncoder(*toks))
    with pytest.raises(ValueError, match=message):
        next(iter(EncodedStream(table.to_iterable_dataset(), lambda _: ExampleEncoder(*toks))))


def test_conversations_of_sharegpt(toks):
    """Are the messages that they stand for; so are tools that are written as JSON."""
    encoder = ExampleEncoder(*toks, train_on="assistant")
    shared = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "they read it"}]
    messages = [{"role": "system", "content": "Be brief."}, *ASKED]
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    rows = [
        {"messages": messages},
        {"conversations": [{"from": "system", "value": "Be brief."}, *shared]},
        {"conversations": shared, "system": "Be brief."},
        {"conversations": [{**one, "from": other} for one, other in zip(shared, ("Human", "ChatGPT"), strict=True)],
         "system": "Be brief."},
        {"conversations": messages, "system": ""},
        {"messages": ASKED, "tools": tools},
        {"messages": ASKED, "tools": '[{"type": "function", "function": {"name": "look", "description": "Looks.", '
                                     '"parameters": {}}}]'},
    ]  # fmt: skip
    encoder.with_prompts = True
    found = [plain(one) for (one,) in encoder.encode(rows)]
    assert found[1]["prompt"]["messages"] == messages[:2]
    assert found[6]["prompt"].pop("tools") == found[5]["prompt"].pop("tools") == tools
    assert found[0] == found[1] == found[2] == found[3] == found[4]
    assert found[5] == found[6] != found[0]
    left, all_of_it = (
        encoder.encode([{"conversations": [*shared, {**shared[1], **flags}]}])[0][0]["labels"]
        for flags in ({"weight": 0}, {})
    )
    assert sum(left != IGNORED) < sum(all_of_it != IGNORED)
    for turn in ({"from": "human"}, "who?", {"value": "a"}):
        with pytest.raises(ValueError, match="row 0: conversations: expected turns with from and value, got "):
            encoder.encode([{"conversations": [turn]}])
    for speaker in ("bing", "Mod", None, 5):
        turn = {"from": speaker, "value": "Why"}
        with pytest.raises(
            ValueError, match=f"row 0: .* turns from one of human, gpt, .*, tool, got one from {speaker!r}"
        ):
            encoder.encode([{"conversations": [*shared, turn]}])
    with pytest.raises(ValueError, match="row 0: conversations: expected tool calls as messages have them"):
        encoder.encode([{"conversations": [{"from": "function_call", "value": "{}"}]}])
    with pytest.raises(ValueError, match="row 0: tools: expected a list, or one as JSON, got 'look'"):
        encoder.encode([{"messages": ASKED, "tools": "look"}])


def test_streams_and_dataloaders(saved, toks):
    """Two workers, of a table too, and two processes see each row once; long texts are cut; rows are shuffled."""
    rows = [{"text": text} for text in SMALL_TEXTS]
    make = lambda _: ExampleEncoder(*toks, max_length=30)  # noqa: E731
    ids = lambda examples: sorted(one["student_ids"].tolist() for one in examples)  # noqa: E731
    want = ids(EncodedDataset(rows, make(None)))
    assert len(want) > len(rows)
    stream = saved(rows).to_iterable_dataset(num_shards=3)
    for data in (EncodedStream(stream, make), EncodedTable(saved(rows), make(None))):
        loader = torch.utils.data.DataLoader(data, 1, num_workers=2, collate_fn=lambda some: some[0])
        assert ids(loader) == want
    shares = [list(IterableDatasetShard(EncodedStream(stream, make), 2, False, 2, rank)) for rank in range(2)]
    assert abs(len(shares[0]) - len(shares[1])) <= 2
    seen = ids(itertools.chain(*shares))
    assert [one for one, _ in itertools.groupby(seen)] == [one for one, _ in itertools.groupby(want)]
    assert len(seen) - len(want) < 4  # what fills the last batches
    shuffled = EncodedStream(stream.shuffle(seed=1, buffer_size=8), make)
    orders = []
    for epoch in range(2):
        shuffled.set_epoch(epoch)
        orders.append([one["student_ids"].tolist() for one in shuffled])
        assert sorted(orders[-1]) == want
    assert orders[0] != orders[1]


def test_rows_of_files_and_tables(saved, student_tok, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("they read it")
    table = saved([{"messages": ASKED, "n": None}])
    assert list(read_rows([table, file])) == [{"text": "they read it"}, {"messages": ASKED}]
    assert [has_chats([one]) for one in list[Any]([table, str(file), [{"conversations": [{}]}]])] == [True, False, True]
    stream = table.to_iterable_dataset()
    assert text_sample([stream, file, iter([{"text": "once"}])]) == ["they read it", "who?", "they read it"]

    class Endless:
        def __iter__(self):
            return itertools.repeat({"text": ""})

    assert text_sample([Endless()]) == []
    encoder = ExampleEncoder(student_tok, [], add_end=False)
    assert text_sample([EncodedDataset([{"text": "who?"}], encoder)], "text", student_tok) == ["who?"]


def test_names(saved, tmp_path, monkeypatch):
    """A path that exists comes first; else it is looked for on the Hub, and an error says what was tried."""
    monkeypatch.chdir(tmp_path)
    rows = saved([{"text": "they read it"}], "org")
    (tmp_path / "squad").mkdir()
    (tmp_path / "a.txt").write_text("a")
    assert open_data("org", "data")._fingerprint == rows._fingerprint
    assert [open_data(one, "data") for one in ("squad", "a.txt", "*.txt")] == ["squad", "a.txt", "*.txt"]
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((*given, options)) or rows)
    for name in ("o/s", "o/s:test", "o/s:main:test", "o/s:train[:10%]", "o/s:2024-01.x:train+test", "imdb"):
        assert open_data(name, "data", "train", streaming=True) is rows
    places = [(*given[:2], given[2]["split"]) for given in asked]
    assert places == [
        ("o/s", None, "train"),
        ("o/s", None, "test"),
        ("o/s", "main", "test"),
        ("o/s", None, "train[:10%]"),
        ("o/s", "2024-01.x", "train+test"),
        ("imdb", None, "train"),
    ]
    assert all(given[2]["streaming"] for given in asked)
    for name in ("none.jsonl", "none/*.txt", "/none", "o/s/t", "none.txt.gz"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"--data: no file matches {name}")):
            open_data(name, "data", "train")
    with pytest.raises(
        ValueError,
        match="--eval_data: no file matches o/s; of a dataset of the Hub a split is expected, as in o/s:test",
    ):
        open_data("o/s", "eval_data")
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(
        ValueError, match=r"--data: no file matches o/s:a:b, and the dataset 'o/s' of the Hub \(configuration 'a'\) "
        "with the split 'b' cannot be loaded: .*NoneType",
    ):  # fmt: skip
        open_data("o/s:a:b", "data")
