"""Teachers: loading, guards, running."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from default_losses import DEFAULT
from small import encode, make_model, make_teacher, make_tokenizer
from transformers.integrations import deepspeed

from xtoken import Alignment, PieceIndex, ProjectionMatrix, Teacher, TopKLogits, Vocabulary
from xtoken.audit import same_tokens
from xtoken.losses import Needs
from xtoken.train import TeacherModel, XTokenCollator, load_model, load_tokenizer
from xtoken.train.teachers import EFFICIENT_LOADING, check_head, check_same_bytes, ensure_pad_token


def test_loads_a_folder(tmp_path, teacher_tok):
    make_model(len(teacher_tok), 1).save_pretrained(tmp_path)
    teacher_tok.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == teacher_tok.get_vocab()
    assert load_model(str(tmp_path))[0].dtype == torch.float32


def test_a_tokenizer_from_a_file(tmp_path, teacher_tok):
    """As everywhere, but one of transformers, with a pad token."""
    teacher_tok.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "TOKENIZER")
    tokenizer = load_tokenizer(tmp_path / "TOKENIZER")
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    assert tokenizer.pad_token == teacher_tok.pad_token
    assert tokenizer("Hello  world").input_ids == teacher_tok("Hello  world").input_ids


@pytest.mark.parametrize(("dtype", "loaded_as"), [("auto", torch.float32), ("bfloat16", "bfloat16")])
def test_loads_a_gguf_file(tmp_path, teacher_tok, monkeypatch, dtype, loaded_as):
    """transformers is told the folder and the file, and a type to unpack to; reading such files is its job."""
    asked = []

    def load(what):
        return lambda name, **options: asked.append((name, options)) or what

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load(teacher_tok))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load(make_model(len(teacher_tok), 1)))
    load_model(tmp_path / "model.gguf", dtype=dtype)
    assert [name for name, _ in asked] == [str(tmp_path)] * 2
    assert asked[0][1] == {"gguf_file": "model.gguf"}
    quantization = asked[1][1].pop("quantization_config", None)
    assert quantization is None or quantization.dequantize
    assert asked[1][1] == {"gguf_file": "model.gguf", "dtype": loaded_as}


def test_a_teacher_is_spread_over_what_there_is(tmp_path, student_tok, teacher_tok):
    make_model(len(teacher_tok), 1).save_pretrained(tmp_path)
    teacher_tok.save_pretrained(tmp_path)
    teacher = TeacherModel.build(tmp_path, student_tok, device="auto", loss=DEFAULT[Needs.NOTHING])
    teacher.place(torch.device("cpu"))
    assert len({one.device for one in teacher.model.parameters()}) == 1


def test_a_teacher_is_loaded_whole(tmp_path, teacher_tok, monkeypatch):
    """What makes FSDP and DeepSpeed load shares of a model is switched off meanwhile, but for the student."""
    make_model(len(teacher_tok), 1).save_pretrained(tmp_path)
    teacher_tok.save_pretrained(tmp_path)
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setenv(EFFICIENT_LOADING, "true")
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    load = transformers.AutoModelForCausalLM.from_pretrained
    seen = []

    def watched(*args, **kwargs):
        seen.append((os.environ.get(EFFICIENT_LOADING), deepspeed.is_deepspeed_zero3_enabled()))
        deepspeed.unset_hf_deepspeed_config()
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    load_model(tmp_path)
    assert seen == [(None, False)]
    assert os.environ[EFFICIENT_LOADING] == "true"
    assert deepspeed.is_deepspeed_zero3_enabled()
    load_model(tmp_path, may_shard=True)
    assert seen[1:] == [("true", True)]


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"^device: expected one that torch finds, of which there are .*'cuda:999'$"):
        load_model("any/model", device="cuda:999")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source: no such file: none\.gguf"):
        load_model("none.gguf")
    with pytest.raises(OSError, match=r"^tokenizer: no/such-model: no such file or folder, and no such id"):
        load_model("no/such-model")
    make_model(30, 0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^tokenizer: {tmp_path}: expected a tokenizer that transformers reads"):
        load_model(tmp_path)


def test_pad_token(tmp_path):
    tokenizer = make_tokenizer(400, "", "<s>")
    assert tokenizer.pad_token == "<pad>"
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token, tokenizer.eos_token = None, "</s>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_a_pad_token_is_no_text():
    """An end token that is text stays text, token 0 too; where there is no special token there will be one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(**special: str) -> PreTrainedTokenizerFast:
        alphabet = {token: k for k, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        bpe = Tokenizer(models.BPE(alphabet, []))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made = PreTrainedTokenizerFast(tokenizer_object=bpe)
        made.add_special_tokens({"additional_special_tokens": list(special.values())})
        return made

    for special, want in (
        ({}, "<pad>"), ({"a": "<|im_start|>", "b": "<|reserved_special_token_3|>"}, "<|reserved_special_token_3|>"),
        ({"a": "<|im_start|>"}, "<|im_start|>"), ({"a": "<|im_start|>", "b": "[PAD]"}, "[PAD]"),
    ):  # fmt: skip
        tok = tokenizer(**special)
        ensure_pad_token(tok)
        assert tok.pad_token == want
        vocabulary = Vocabulary.from_tokenizer(tok)
        assert vocabulary.roles["pad"] == tok.pad_token_id
        assert vocabulary.is_text.sum() == 256
        XTokenCollator(tok, [tok])


def test_head_narrower_than_the_tokenizer(tmp_path, teacher_tok, student_tok):
    model = make_model(len(teacher_tok) - 1, 1)
    model.save_pretrained(tmp_path)
    teacher_tok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected an output layer of at least {len(teacher_tok)} rows"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=rf"T: expected an output layer of at least {len(teacher_tok)} rows.*got "):
        TeacherModel(Teacher(loss=DEFAULT[Needs.NOTHING]), model, teacher_tok, "T")
    check_head(make_model(len(teacher_tok) + 5, 1), Vocabulary.from_tokenizer(teacher_tok), "T")
    check_head(torch.nn.Linear(2, 2), Vocabulary.from_tokenizer(teacher_tok), "has no output layer to look at")
    quantised = SimpleNamespace(out_features=len(teacher_tok), weight=lambda: None)  # as torch's int8 layers are
    check_head(SimpleNamespace(get_output_embeddings=lambda: quantised), Vocabulary.from_tokenizer(teacher_tok), "T")


def test_objectives_that_do_not_go_with_the_student(student_tok, teacher_tok):
    student = Vocabulary.from_tokenizer(student_tok)
    assert same_tokens(student, Vocabulary.from_tokenizer(student_tok))
    assert not same_tokens(student, Vocabulary.from_tokenizer(teacher_tok))
    wrong = TeacherModel(Teacher(), make_model(len(teacher_tok), 1), teacher_tok, "T")
    message = f"T: loss='{DEFAULT[Needs.SAME_TOKENIZER]}' feeds it the student's ids, but its tokenizer numbers tokens"
    with pytest.raises(ValueError, match=message):
        wrong.check_student(student)
    turned = make_teacher(teacher_tok, student_tok, name="T")
    with pytest.raises(ValueError, match=r"T: expected a projection of shape \[700, 700\] for the student's"):
        turned.check_student(student)
    own = Vocabulary.from_tokenizer(teacher_tok)
    other = Vocabulary([own[i] for i in reversed(range(len(own)))])
    for made in ({"projection": ProjectionMatrix.build(student, other)}, {"pieces": PieceIndex.build(student, other)}):
        of_another = TeacherModel(Teacher(**made), None, teacher_tok, "T")
        with pytest.raises(ValueError, match=r"T: (projection|pieces): built for another teacher tokenizer"):
            of_another.check_student(student)
    TeacherModel(Teacher()).check_student(student)  # without a tokenizer there is nothing to check


def test_another_type_and_inference_mode(student_tok, teacher_tok):
    teacher = make_teacher(student_tok, None)
    teacher.model.bfloat16().train()
    again = TeacherModel(teacher.objective, teacher.model, student_tok, device="cpu")
    again.place(torch.device("cpu"))
    assert not teacher.model.training
    ids = torch.tensor([[1, 2, 3]])
    logits = again.logits({}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert logits.dtype == torch.bfloat16
    assert logits.is_inference()


def test_position_ids_of_packed_rows_are_passed_on(student_tok):
    seen = {}

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return SimpleNamespace(logits=torch.zeros(1, 3, 5))

    ids = torch.tensor([[1, 2, 3]])
    teacher = TeacherModel(Teacher(loss=DEFAULT[Needs.NOTHING]), Model())
    teacher.logits({"input_ids": ids, "position_ids": ids, "attention_mask": ids}, {"input_ids": ids})
    assert set(seen) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_cached_logits(student_tok):
    ids = torch.tensor([[1, 2, 3]])
    cached = TopKLogits(ids[..., None], torch.zeros(1, 3, 1))
    teacher = TeacherModel(Teacher(), name="T")
    teacher.place(torch.device("cpu"))
    teacher.check_entry({"logits": cached}, {"input_ids": ids})
    another = make_teacher(student_tok, student_tok, loss=DEFAULT[Needs.NOTHING])
    another.check_entry({"logits": cached}, {"input_ids": ids})
    assert teacher.logits({"logits": cached}, {"input_ids": ids}) is cached
    with pytest.raises(ValueError, match="T: expected cached logits in the batch, since it has no model"):
        teacher.logits({}, {"input_ids": ids})


def test_chunks_that_spell_different_text(student_tok, teacher_tok):
    student, teacher = Vocabulary.from_tokenizer(student_tok), Vocabulary.from_tokenizer(teacher_tok)
    (example,) = encode(["In 1995, 123 readers"], student_tok, teacher_tok)
    ids, entry = torch.tensor([example["student_ids"]]), example["teachers"][0]
    theirs = torch.tensor([entry["ids"]])
    alignment = Alignment(entry["spans"], [0, len(entry["spans"])])
    check_same_bytes(alignment, ids, theirs, student, teacher, "T")
    with pytest.raises(ValueError, match=r"T: expected chunks that spell the same text .* only \d of \d+ do"):
        check_same_bytes(alignment, ids, theirs.flip(1), student, teacher, "T")
    check_same_bytes(Alignment([], [0, 0]), ids, theirs, student, teacher, "T")
