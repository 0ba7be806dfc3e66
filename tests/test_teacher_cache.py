"""A teacher's log-probabilities on disk: what comes back, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from default_losses import default_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

import xtoken
from xtoken import OrderedLogits, TeacherCache, TeacherCacheWriter, TeacherOrder, TopKLogits, cache_teacher
from xtoken.losses import Needs
from xtoken.teacher_cache import INDEX, document_digest

TEXTS = ["one fish", "", "a", "Grüße, 漢字!", "a much longer document of many bytes, twice over " * 2, "a"]


def make_tokenizer(bos: bool = True) -> Any:
    """Bytes as tokens, in front of each document a bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


TOKENIZER = make_tokenizer()
SIZE = TOKENIZER.get_vocab_size()


class Model:
    """A causal model: a row depends on the token and its position."""

    def __init__(self, width: int = SIZE + 7, fails_at: int | None = None, scale: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = scale * torch.randn(SIZE, width, generator=generator)
        self.table[:, SIZE:] = 100.0  # columns beyond the vocabulary
        self.position = torch.randn(512, 1, generator=generator)
        self.fails_at = fails_at
        self.calls = 0
        self.config = SimpleNamespace(max_position_embeddings=512)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert input_ids.shape == attention_mask.shape
        assert bool((attention_mask.diff(dim=1) <= 0).all())
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return SimpleNamespace(logits=self.table[input_ids] * (1 + self.position[: input_ids.shape[1]].abs()))

    def log_softmax(self, text: str) -> Tensor:
        ids = torch.tensor([TOKENIZER.encode(text).ids])
        logits: Tensor = self(ids, torch.ones_like(ids)).logits
        return logits[0, :, :SIZE].log_softmax(-1)


def dense(logits: TopKLogits) -> Tensor:
    """The log-probabilities [T, V] that the losses see."""
    from xtoken.losses.logits import TopKSource

    return TopKSource(logits.ids[None], logits.logprobs[None], logits.tail, SIZE).rows(0, len(logits.ids))


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_every_document_comes_back(tmp_path: Path, batch_tokens: int) -> None:
    model = Model()
    cache = cache_teacher(model, TOKENIZER, TEXTS, tmp_path, top_k=5, batch_tokens=batch_tokens, shard_tokens=30)
    assert len(list(tmp_path.glob("shard-*"))) == 2
    assert len(cache) == len(TEXTS)
    for text, document in zip(TEXTS, (cache[k] for k in range(len(cache))), strict=True):
        ids = TOKENIZER.encode(text).ids
        assert document.token_ids.tolist() == ids
        assert document.byte_ends.tolist() == list(range(len(text.encode()) + 1))
        expected = model.log_softmax(text).topk(5)
        assert torch.equal(document.logits.ids.long(), expected.indices)
        torch.testing.assert_close(document.logits.logprobs, expected.values, rtol=1e-3, atol=1e-3)
        mass = dense(document.logits).double().exp().sum(1)
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-6, atol=0)
        assert cache.lookup(ids).token_ids.tolist() == ids


def test_tail_keeps_the_mass_that_rounding_moves(tmp_path: Path) -> None:
    model = Model(scale=0.1)  # flat: most mass in the tail
    document = cache_teacher(model, TOKENIZER, TEXTS[4:5], tmp_path, top_k=3)[0]
    listed = document.logits.logprobs.double().exp().sum(1)
    expected = model.log_softmax(TEXTS[4]).double().topk(3).values.exp().sum(1)
    torch.testing.assert_close(listed, expected, rtol=3e-6, atol=0)


def test_tiny_tails_stay_finite(tmp_path: Path) -> None:
    document = cache_teacher(Model(scale=40.0), TOKENIZER, TEXTS[4:5], tmp_path, top_k=64)[0]
    assert float(document.logits.logprobs[:, 0].max()) > -1e-5
    assert bool(torch.isfinite(dense(document.logits)).all())


@pytest.mark.parametrize("token", [0, 1])
def test_what_float16_cannot_hold_stays_listed(tmp_path: Path, token: int) -> None:
    logits = TopKLogits(torch.tensor([[7, token], [-1, -1]]), torch.tensor([[0.0, -1e6], [-torch.inf, -torch.inf]]))
    with TeacherCacheWriter(tmp_path, TOKENIZER, top_k=2) as writer:
        writer.add([1, 2], logits)
    found = TeacherCache(tmp_path)[0].logits
    assert found.ids.tolist() == logits.ids.tolist()
    assert -1e5 < float(found.logprobs[0, 1]) < -6e4
    assert found.logprobs[1].tolist() == [-torch.inf, -torch.inf]


def test_whole_vocabulary_gives_the_loss_of_the_full_teacher(tmp_path: Path) -> None:
    model = Model()
    text = TEXTS[4]
    cached = cache_teacher(model, TOKENIZER, [text], tmp_path, top_k=10**6).lookup(TOKENIZER.encode(text).ids)
    assert cached.logits.ids.shape[1] == SIZE
    student = make_tokenizer(bos=False)
    student_ids = student.encode(text).ids
    projection = xtoken.ProjectionMatrix.build(student, TOKENIZER)
    alignment = xtoken.Aligner(student, TOKENIZER).align(student_ids, cached.token_ids)
    logits = torch.randn(len(student_ids), student.get_vocab_size(), generator=torch.Generator().manual_seed(1))
    losses = [
        default_loss(Needs.PROJECTION)(logits, teacher, alignment, projection)
        for teacher in (model.log_softmax(text), cached.logits)
    ]
    assert float(losses[0]) > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_long_documents_are_cut(tmp_path: Path) -> None:
    cache = cache_teacher(Model(), TOKENIZER, TEXTS, tmp_path, top_k=2, max_length=6)
    assert cache.max_length == 6
    assert [len(cache[k].token_ids) for k in range(len(cache))] == [6, 1, 2, 6, 6, 2]
    assert cache.lookup(TOKENIZER.encode(TEXTS[4]).ids).byte_ends[-1] == 5


class Rounding(Model):
    """One whose logits depend a little on what else is in the batch, as those of every real model."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=super().__call__(input_ids, attention_mask).logits * (1 + input_ids.numel() / 99))


def test_resume_gives_the_same_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"top_k": 4, "batch_tokens": 400, "shard_tokens": 400}
    texts = [TEXTS[4][: 1 + 7 * k % 90] for k in range(480)]  # two windows
    cache_teacher(Rounding(), TOKENIZER, texts, tmp_path / "once", **options)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(Rounding(fails_at=40), TOKENIZER, texts, tmp_path / "twice", **options)
    with pytest.raises(ValueError, match="is not complete"):
        TeacherCache(tmp_path / "twice")
    assert list((tmp_path / "twice").glob("shard-*"))
    with pytest.raises(ValueError, match="is not empty"):
        cache_teacher(Rounding(), TOKENIZER, texts, tmp_path / "twice", **options)
    with pytest.raises(ValueError, match="documents: number 0 is not"):
        cache_teacher(Rounding(), TOKENIZER, ["other"], tmp_path / "twice", resume=True, **options)
    with pytest.raises(ValueError, match="documents: number 6 is not"):
        cache_teacher(Rounding(), TOKENIZER, texts[:6], tmp_path / "twice", resume=True, **options)
    with pytest.raises(ValueError, match="was made with top_k=4, now 3"):
        cache_teacher(Rounding(), TOKENIZER, texts, tmp_path / "twice", resume=True, **{**options, "top_k": 3})
    for wanted in ("once", "twice"):
        cache_teacher(Rounding(), TOKENIZER, texts, tmp_path / wanted, resume=True, **options)
        with pytest.raises(ValueError, match="documents: number 0 is not"):
            cache_teacher(Rounding(), TOKENIZER, ["other"], tmp_path / wanted, resume=True, **options)
        assert len(TeacherCache(tmp_path / wanted)) == len(texts)  # what is complete stays so
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("once", "twice")]
    assert files[0] == files[1]


def test_other_text_and_other_tokenizer_are_refused(tmp_path: Path) -> None:
    cache = cache_teacher(Model(), TOKENIZER, TEXTS, tmp_path, top_k=2)
    with pytest.raises(ValueError, match=r"token_ids: not among the 6 documents of the teacher cache .*: \[1, 2\]"):
        cache.lookup([1, 2])
    with pytest.raises(ValueError, match=r"teacher_tok: .* was made with another tokenizer"):
        TeacherCache(tmp_path, make_tokenizer(bos=False))
    with pytest.raises(IndexError, match="index: expected -6 to 5, got 6"):
        cache[6]
    assert cache[-1].token_ids.tolist() == cache[5].token_ids.tolist()


def test_opens_in_another_process(tmp_path: Path) -> None:
    cache = cache_teacher(Model(), TOKENIZER, TEXTS, tmp_path, top_k=2)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.lookup(TOKENIZER.encode(TEXTS[0]).ids).token_ids.tolist() == cache[0].token_ids.tolist()


def test_empty_cache(tmp_path: Path) -> None:
    cache = cache_teacher(Model(), TOKENIZER, [], tmp_path)
    assert len(cache) == 0
    with pytest.raises(ValueError, match="not among the 0 documents"):
        cache.lookup([1])


def test_bad_models(tmp_path: Path) -> None:
    class Broken(Model):
        def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            result = super().__call__(input_ids, attention_mask)
            result.logits[(input_ids == TOKENIZER.encode("漢").ids[1]).any(1)] = float("nan")
            return result

    with pytest.raises(ValueError, match="model: NaN or infinite logits in document 3"):
        cache_teacher(Broken(), TOKENIZER, TEXTS, tmp_path / "nan")
    with pytest.raises(
        ValueError, match=f"model: expected logits at least {SIZE} wide, as teacher_tok, got {SIZE - 2}"
    ):
        cache_teacher(Model(SIZE - 2), TOKENIZER, TEXTS, tmp_path / "narrow")
    with pytest.raises(ValueError, match=f"documents: number 0 has token {SIZE - 1}, the model has {SIZE - 1} of them"):
        cache_teacher(Model(SIZE - 1), TOKENIZER, TEXTS, tmp_path / "without")

    def ordered(**read: Tensor) -> Any:
        return SimpleNamespace(logits=OrderedLogits(Model()(**read).logits, TeacherOrder(range(SIZE))))

    with pytest.raises(TypeError, match="expected logits as a tensor, in the tokenizer's order, got OrderedLogits"):
        cache_teacher(ordered, TOKENIZER, TEXTS, tmp_path / "ordered")
    with pytest.raises(ValueError, match="teacher_tok: expected a tokenizer that encodes text"):
        cache_teacher(Model(), xtoken.Vocabulary([b"a"]), TEXTS, tmp_path / "tokens")


@pytest.mark.parametrize("name", ["top_k", "max_length", "batch_tokens", "shard_tokens"])
def test_bad_options(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        cache_teacher(Model(), TOKENIZER, TEXTS, tmp_path / "cache", **{name: 0})


@pytest.mark.parametrize(
    ("documents", "message"), [("one text", "several texts, got one str"), ([1, 2], "texts or token ids, got int")]
)
def test_what_is_no_documents(tmp_path: Path, documents: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"documents: expected {message}"):
        cache_teacher(Model(), TOKENIZER, documents, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_bad_documents(tmp_path: Path) -> None:
    writer = TeacherCacheWriter(tmp_path, TOKENIZER, 2, max_length=3)
    good = TopKLogits(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[-1.0, -2.0]] * 2))
    with pytest.raises(ValueError, match=r"logits: expected \[<= 1, >= 2\] as token_ids, .*, got \[2, 2\]"):
        writer.add([1], good)
    with pytest.raises(ValueError, match=r"logits: expected \[<= 3, >= 2\] as token_ids, .*, got \[4, 2\]"):
        writer.add([1] * 5, TopKLogits(good.ids.repeat(2, 1), good.logprobs.repeat(2, 1)))
    for form in (torch.ones(2, dtype=torch.int64).to_sparse(), torch.ones(2, dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match="token_ids: expected token ids in memory"):
            writer.add(form, good)
    with pytest.raises(ValueError, match=f"token_ids: expected 0 ... {SIZE - 1}, got 1 to {SIZE}"):
        writer.add([1, SIZE], good)
    with pytest.raises(ValueError, match=f"logits.ids: expected -1 ... {SIZE - 1}, got 0 to {SIZE}"):
        writer.add([1, 2], TopKLogits(torch.tensor([[0, 1], [2, SIZE]]), good.logprobs))
    with pytest.raises(ValueError, match=r"logits.logprobs: expected logarithms of probabilities, got 0.5"):
        writer.add([1, 2], TopKLogits(good.ids, torch.tensor([[-1.0, 0.5]] * 2)))
    with pytest.raises(ValueError, match=r"logits.logprobs: expected logarithms of probabilities, got nan"):
        writer.add([1, 2], TopKLogits(good.ids, torch.tensor([[-1.0, float("nan")]] * 2)))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TeacherCache(tmp_path)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* holds notes.txt but no cache.json"):
        TeacherCacheWriter(strange, TOKENIZER, resume=True)
    folder = tmp_path / "cache"
    cache_teacher(Model(), TOKENIZER, TEXTS, folder, top_k=2)
    shard = next(folder.glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a shard of a teacher cache"):
        TeacherCache(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000.safetensors is missing"):
        TeacherCache(folder)
    index = json.loads((folder / INDEX.name).read_text())
    (folder / INDEX.name).write_text(json.dumps({**index, "format": 1}))
    with pytest.raises(ValueError, match=r"expected format 2, got 1; xtoken cache-teacher .* makes it again"):
        TeacherCache(folder)
    del index["top_k"], index["checksum"]
    INDEX.write(folder, index)
    with pytest.raises(ValueError, match="not the index of a teacher cache: KeyError"):
        TeacherCache(folder)


def test_served_teacher_fills_a_cache(tmp_path: Path) -> None:
    """What a server returns for a prompt, written by `TeacherCacheWriter`."""
    ids = TOKENIZER.encode("ab").ids
    prompt_logprobs = [
        None,
        {ids[1]: SimpleNamespace(logprob=-0.5, rank=1), 7: SimpleNamespace(logprob=-1.5, rank=2)},
        {"9": {"logprob": -0.25}, str(ids[2]): {"logprob": -3.0}, "3": -4.0},
    ]
    logits = TopKLogits.from_vllm(prompt_logprobs)
    assert logits.ids.tolist() == [[ids[1], 7, -1], [9, ids[2], 3], [-1, -1, -1]]
    with TeacherCacheWriter(tmp_path, TOKENIZER, 2) as writer:
        writer.add(ids, logits)
    document = TeacherCache(tmp_path).lookup(ids)
    assert document.logits.ids.tolist() == [[ids[1], 7], [9, ids[2]], [-1, -1]]
    torch.testing.assert_close(document.logits.logprobs[:2], torch.tensor([[-0.5, -1.5], [-0.25, -3.0]]))
    torch.testing.assert_close(dense(document.logits)[2].exp(), torch.full([SIZE], 1 / SIZE))
    with pytest.raises(ValueError, match="prompt_logprobs: expected a mapping at position 1, got None"):
        TopKLogits.from_vllm([None, None])


def test_what_other_servers_return() -> None:
    """SGLang, and completions and chats of OpenAI's API: the same rows as vLLM's mappings."""
    a, b, umlaut = (TOKENIZER.encode(text).ids[1] for text in ("a", "b", "ö"))
    expected = TopKLogits.from_vllm([None, {a: -0.5, b: -1.5}, {b: -0.25, umlaut: -3.0}])
    sglang = [None, [[-0.5, a, "a"], [-1.5, b, None]], [[-0.25, b, "b"], [-3.0, umlaut, "?"]]]
    ids = [None, {f"token_id:{a}": -0.5, f"token_id:{b}": -1.5}, {f"token_id:{b}": -0.25, f"token_id:{umlaut}": -3.0}]

    def token(byte: int, logprob: float, *others: Any) -> Any:
        return SimpleNamespace(token="?", bytes=[byte], logprob=logprob, top_logprobs=list(others))

    chat = [
        token(97, -9.0),
        token(98, -9.0, token(97, -0.5), {"token": "b", "bytes": None, "logprob": -1.5}),
        token(98, -9.0, token(98, -0.25), token("ö".encode()[0], -3.0)),
    ]
    for answer in (
        sglang,
        {"input_top_logprobs": sglang, "input_token_logprobs": [[None, a, "a"]]},
        SimpleNamespace(tokens=["?"], top_logprobs=ids, token_logprobs=None),
        ids,
        SimpleNamespace(content=chat),
        {"content": chat},
    ):
        found = TopKLogits.from_vllm(answer, tokenizer=TOKENIZER)
        assert (found.ids.tolist(), found.logprobs.tolist()) == (expected.ids.tolist(), expected.logprobs.tolist())
    only = TopKLogits.from_vllm({"input_token_logprobs": [[None, a, "a"], [-0.5, b, "b"]]})
    assert (only.ids.tolist(), only.logprobs.tolist()) == ([[b], [-1]], [[-0.5], [-torch.inf]])


def test_the_token_that_stands_there_counts_too() -> None:
    """Though it is none of the likeliest, and in whole answers; bytes that are no text have a form of their own."""
    a, b = (TOKENIZER.encode(text).ids[1] for text in "ab")
    chat = [{"token": "b", "bytes": [98], "logprob": -3.0, "top_logprobs": [{"token": "a", "logprob": -1.0}]}] * 2
    sglang = {"input_top_logprobs": [None, [[-1.0, a, None]]], "input_token_logprobs": [[None, a, ""], [-3.0, b, ""]]}
    tokens = {"tokens": ["a", "b"], "token_logprobs": [None, -3.0]}
    for answer in (
        {"choices": [{"logprobs": {"content": chat, "refusal": None}}]},
        SimpleNamespace(choices=[SimpleNamespace(logprobs=SimpleNamespace(content=chat))]),
        {"text": "", "meta_info": sglang},
        {**tokens, "top_logprobs": [None, {"a": -1.0}]},
        {"choices": [{"prompt_logprobs": [None, {a: {"logprob": -1.0}, b: {"logprob": -3.0}}], "logprobs": None}]},
    ):
        found = TopKLogits.from_vllm(answer, tokenizer=TOKENIZER)
        assert (found.ids[0].tolist(), found.logprobs[0].tolist()) == ([a, b], [-1.0, -3.0])
    alone: list[Any] = [{**tokens, "top_logprobs": None}, {"top_logprobs": [None, {"bytes:\\x62": -3.0}]}]
    for one in alone:
        found = TopKLogits.from_vllm(one, tokenizer=TOKENIZER)
        assert (found.ids[0].tolist(), found.logprobs[0].tolist()) == ([b], [-3.0])


@pytest.mark.parametrize(
    "entry",
    [1, -0.5, [[-0.5]], [[-0.5, 1.5, ""]], {3: None}, {3: "x"}, {3: math.nan}, {3: 2.0}, {-3: -0.5}, {1 << 40: -0.5}],
    ids=str,
)
def test_answers_that_are_none(entry: Any) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs: expected token"):
        TopKLogits.from_vllm([None, entry])


@pytest.mark.parametrize(
    "answer",
    [
        [None, [[-0.5]]],
        [None, [""]],
        [None, {"1": {"rank": 1}}],
        [None, {str(2**70): {"logprob": -0.5}}],
        [None, 5],
        {"input_token_logprobs": [5]},
        {"top_logprobs": [None, {"token_id:-1": -0.5}]},
        {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{}]}]},
    ],
)
def test_what_no_server_returns(answer: Any) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs: "):
        TopKLogits.from_vllm(answer, tokenizer=TOKENIZER)


def test_tokens_that_come_as_text(caplog: pytest.LogCaptureFixture) -> None:
    """Digits are texts too, where the form says so; what the tokenizer does not have is said."""
    five, six = (TOKENIZER.encode(text).ids[1] for text in "56")
    found = TopKLogits.from_vllm({"top_logprobs": [None, {"5": -1.0, "6": -2.0, "漢": -3.0}]}, tokenizer=TOKENIZER)
    assert found.ids[0].tolist() == [five, six]
    assert "1 of 3 tokens are not in the tokenizer's vocabulary, such as '漢'; they count to the rest" in caplog.text
    assert TopKLogits.from_vllm([None, {"5": -1.0, "6": -2.0}]).ids[0].tolist() == [5, 6]  # vLLM's JSON
    with pytest.raises(
        ValueError, match="prompt_logprobs: expected token ids, got texts such as 'a'; give the teacher"
    ):
        TopKLogits.from_vllm([None, {"a": -1.0}])
    with pytest.raises(ValueError, match="only 1 of 3 tokens are in the tokenizer's vocabulary"):
        TopKLogits.from_vllm([None, {"a": -1.0, "漢": -2.0, "字": -2.0}], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="prompt_logprobs: expected a list with an entry for each token, got str"):
        TopKLogits.from_vllm("abc")


def test_a_document_is_known_by_all_of_its_tokens_but_the_end() -> None:
    digests = [document_digest(ids, end_id=9) for ids in ([], [1], [2], [1, 2], [1, 9, 2], [2, 1])]
    assert len(set(digests)) == len(digests)
    assert [document_digest(ids, end_id=9) for ids in ([9], [1, 9], [1, 2, 9, 9])] == [digests[k] for k in (0, 1, 3)]
    assert document_digest([1, 9]) != document_digest([1])


@pytest.mark.parametrize("in_cache", [True, False])
def test_an_end_token_more_or_less(tmp_path: Path, in_cache: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    end, text = tokenizer.token_to_id("</s>"), tokenizer.encode("one fish").ids
    model = Model()
    model.table = torch.cat([model.table, model.table[:1]])
    cache = cache_teacher(model, tokenizer, [text + [end] * in_cache], tmp_path, top_k=2)
    assert cache.end_id == end
    for asked in (text, [*text, end], torch.tensor(text)):
        assert cache.lookup(asked).token_ids.tolist() == text + [end] * in_cache
    with_words = TeacherCache(tmp_path, tokenizer)
    other = tokenizer.encode("one fowl").ids
    for one, said in (
        (with_words, r"b'ne f' b'ish.*', but asked is b'ne f' b'owl'"),
        (cache, r"but asked is \[\d+, .*\]"),
    ):
        with pytest.raises(ValueError, match="document 0 begins with the same 6 tokens and goes on as .*" + said):
            one.lookup(other)
    with pytest.raises(
        ValueError,
        match="none of the first 1 documents begins with that token: asked is b'one ', document 0 is b'<s>one'",
    ):
        with_words.lookup(other[1:])
    for bad in ([1 << 31], [0.5], [-1], [[1]]):
        with pytest.raises(ValueError, match="token_ids: expected a list of token ids"):
            cache.lookup(bad)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="output: another run writes to")
    with TeacherCacheWriter(tmp_path, TOKENIZER, 2), refused:
        TeacherCacheWriter(tmp_path, TOKENIZER, 2, resume=True)
    with pytest.raises(ValueError, match="was made with top_k=2, now 3"):
        TeacherCacheWriter(tmp_path, TOKENIZER, 3, resume=True)
    with TeacherCacheWriter(tmp_path, TOKENIZER, 2, resume=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [INDEX.name]


def test_a_writer_that_goes_on_after_an_error_writes_no_document_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    row = TopKLogits(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log())
    with TeacherCacheWriter(tmp_path, TOKENIZER, 2, shard_tokens=1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(type(INDEX), "write", fail)
            with pytest.raises(OSError, match="disk full"):
                writer.add([5], row)
        writer.add([6], row)
    cache = TeacherCache(tmp_path)
    assert [cache[k].token_ids.tolist() for k in range(len(cache))] == [[5], [6]]


def test_token_ids_and_texts_are_the_same_documents(tmp_path: Path) -> None:
    ids = [TOKENIZER.encode(text).ids for text in TEXTS]
    mixed = [one if k % 2 else text for k, (one, text) in enumerate(zip(ids, TEXTS, strict=True))]
    for name, documents in (("texts", TEXTS), ("ids", ids), ("mixed", mixed)):
        cache_teacher(Model(), TOKENIZER, documents, tmp_path / name, top_k=2)
    files = [(tmp_path / name / "shard-00000.safetensors").read_bytes() for name in ("texts", "ids", "mixed")]
    assert files[0] == files[1] == files[2]


def test_a_head_without_a_special_token(tmp_path: Path) -> None:
    """As of Gemma 3: the logits are those with a column of -inf. A document with that token is refused."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<image>"])
    narrow = Model(SIZE)
    narrow.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=SIZE)  # type: ignore[attr-defined]
    cache = cache_teacher(narrow, tokenizer, TEXTS, tmp_path / "cache", top_k=SIZE + 1)
    for text, document in zip(TEXTS, (cache[k] for k in range(len(cache))), strict=True):
        dense = torch.full((len(document.token_ids), SIZE + 1), torch.nan)
        dense.scatter_(1, document.logits.ids.long(), document.logits.logprobs.float())
        torch.testing.assert_close(dense[:, :SIZE], narrow.log_softmax(text), rtol=1e-3, atol=1e-3)
        assert float(dense[:, SIZE].max()) < -6e4
    with pytest.raises(ValueError, match=f"documents: number 1 has token {SIZE}, the model has {SIZE} of them"):
        cache_teacher(narrow, tokenizer, ["a", "a<image>b"], tmp_path / "other", top_k=2)
