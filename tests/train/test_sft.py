"""A teacher with another tokenizer in TRL's SFTTrainer; its trainer is skipped where that cannot be imported."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import SMALL_TEXTS, make_model

from xtoken import Vocabulary
from xtoken.integrations.trl import DistilCollator, distil
from xtoken.train import TeacherModel

CHAT = [{"role": "user", "content": "In 1995?"}, {"role": "assistant", "content": "In 1995, 230 readers paid."}]


def padded(examples: Any) -> dict[str, Any]:
    """As TRL's collator without packing."""
    rows = {name: [torch.tensor(one[name]) for one in examples] for name in ("input_ids", "labels")}
    fills = {"input_ids": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows[name], batch_first=True, padding_value=fills[name]) for name in rows
    }


class Flat:
    padding_free = True

    def __call__(self, examples: Any) -> dict[str, Any]:
        labels = [one for example in examples for one in [-100, *example["labels"][1:]]]
        return {
            "input_ids": torch.tensor([[token for one in examples for token in one["input_ids"]]]),
            "labels": torch.tensor([labels]),
        }


def chunks_of(batch: dict[str, Any], student: Any, teacher: Any) -> list[tuple[bytes, bytes]]:
    """The bytes of both sides of the chunks whose tokens are labelled."""
    host = batch["host"].batch
    alignment = host["alignment"].supervised(host["labels"])
    sides = [Vocabulary.from_tokenizer(one) for one in (student, teacher)]
    return [
        (sides[0].decode(alignment.student_ids[k, a:b]), sides[1].decode(alignment.teacher_ids[k, c:d]))
        for (a, b, c, d), k, counts in zip(
            alignment.spans.tolist(), alignment.sample_index.tolist(), alignment.predicted.tolist(), strict=True
        )
        if counts
    ]


@pytest.fixture(scope="module")
def pair(small_chat_tok) -> tuple[Any, Any, TeacherModel]:
    student, teacher = small_chat_tok("llama3"), small_chat_tok("qwen3")
    return student, teacher, TeacherModel.build(make_model(len(teacher), 1), student, tokenizer=teacher)


def chat_example(student: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A chat as the student's template writes it, of which the answer and its end are labelled."""
    ids = student.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    head = student.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    first = len(head["input_ids"])
    return {"input_ids": ids, "labels": [-100] * first + ids[first:], **given}


@pytest.mark.parametrize("given", [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}])
@pytest.mark.parametrize("inner", [padded, Flat()], ids=["padded", "flat"])
def test_chats_are_read_by_the_teachers_own_template(pair, given, inner):
    student, teacher, model = pair
    example = chat_example(student, given)
    batch = DistilCollator(inner, student, model)([example, example])
    want = teacher.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    entry = batch["teacher"]
    assert entry["input_ids"].shape[0] == 2
    for ids, mask in zip(entry["input_ids"], entry["attention_mask"], strict=True):
        assert ids[mask != 0].tolist() == want[: int(mask.sum())]
    chunks = chunks_of(batch, student, teacher)
    text = b"".join(ours for ours, _ in chunks)
    assert text == CHAT[1]["content"].encode() * 2
    assert all(ours == theirs for ours, theirs in chunks)
    assert chunks.count((b"", b"")) == 2  # the ends of turns


def test_text_is_what_the_ids_spell(pair):
    """Cut, in a character too; ends are the teacher's own, and nothing compares a document with the one before it."""
    student, teacher, model = pair
    ids = student.encode(SMALL_TEXTS[0] + "\u20ac", add_special_tokens=False)[:-1]
    one = [student.bos_token_id, *ids]
    two = [*student.encode("They read it in 1995.", add_special_tokens=False), student.eos_token_id]
    example = {"input_ids": one + two, "labels": one + two, "seq_lengths": [len(one), len(two)]}
    batch = DistilCollator(Flat(), student, model)([example])
    assert batch["host"].batch["rows"] == [[0, 1]]
    read = [
        teacher.decode(row[mask != 0])
        for row, mask in zip(batch["teacher"]["input_ids"], batch["teacher"]["attention_mask"], strict=True)
    ]
    assert read == [SMALL_TEXTS[0], "They read it in 1995." + teacher.eos_token]
    alignment = batch["host"].batch["alignment"]
    assert not set(alignment.spans[alignment.predicted, 0].tolist()) & {0, len(one)}
    assert b"".join(ours for ours, _ in chunks_of(batch, student, teacher)).endswith(b" read it in 1995.")


@pytest.mark.parametrize("changed", ["nothing", "the beginning is cut", "the end is cut", "a token is another"])
def test_equal_answers_of_several_turns(small_chat_tok, changed, caplog):
    """Each is compared with the teacher's of the same turn, though the same words stand in other turns."""
    student, teacher = small_chat_tok("llama3"), small_chat_tok("mistral")
    contents = ["Is 0 even?", "yes", "Is 1 even?", "no", "Is 2 even?", "yes", "Who asks?", "user"]
    chat = [{"role": ("user", "assistant")[k % 2], "content": one} for k, one in enumerate(contents)]
    whole = student.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    eot = student.convert_tokens_to_ids("<|eot_id|>")
    ends = [k for k, token in enumerate(whole) if token == eot]
    first, last = {"the beginning is cut": (ends[1], None), "the end is cut": (0, ends[4])}.get(changed, (0, None))
    ids = whole[first:last]
    if changed == "a token is another":
        ids[ends[2] - 1] = student.encode("!", add_special_tokens=False)[0]
    model = TeacherModel.build(make_model(len(teacher), 1), student, tokenizer=teacher)
    host = DistilCollator(padded, student, model)([{"input_ids": ids, "labels": ids, "messages": chat}])["host"].batch
    alignment, read = host["alignment"], Vocabulary.from_tokenizer(teacher)
    texts = [b""] * len(chat)
    for a, b, c, d in alignment.spans.tolist():
        before = read.decode(alignment.teacher_ids[0, :c])
        turn = whole[: first + a].count(eot)
        assert turn == before.count(b"[INST]") + before.count(b"[/INST]") - 1
        assert whole[first + a : first + b] == ids[a:b]
        texts[turn] += read.decode(alignment.teacher_ids[0, c:d])
    known = slice(2 if "beginning" in changed else 0, 4 if "end is" in changed else None)
    want = [one.encode() for one in contents[known]]
    if changed == "a token is another":
        want[2] = b"Is 1 even"
    assert texts[known] == want
    assert ("what differs is compared with nothing" in caplog.text) == (changed == "a token is another")


def test_rows_that_the_teacher_cannot_read(pair):
    student, _, model = pair
    chat = chat_example(student, {})
    with pytest.raises(
        ValueError, match=r"got one whose special token '<\|end_header_id\|>' has no like in the teacher"
    ):
        DistilCollator(padded, student, model)([chat])
    left = lambda examples: {name: value.flip(1) for name, value in padded(examples).items()}  # noqa: E731
    with pytest.raises(ValueError, match="data_collator: expected the examples' input_ids as rows"):
        DistilCollator(left, student, model)([chat_example(student, {"messages": CHAT})])


def test_trainers_that_it_does_not_fit():
    args = SimpleNamespace(loss_type="dft", label_smoothing_factor=0.0)
    with pytest.raises(
        ValueError, match="trainer: expected an SFTTrainer of text with TRL's own data_collator, got Si"
    ):
        distil(SimpleNamespace(args=args, data_collator=padded), "teacher")
    trainer = SimpleNamespace(
        args=args, data_collator=Flat(), aux_loss_enabled=False, compute_loss_func=None,
        accelerator=SimpleNamespace(num_processes=1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="trainer: expected none with a loss of its own, got one with loss_type"):
        distil(trainer, "teacher")
    args.loss_type = "nll"
    trainer.processing_class = None
    with pytest.raises(ValueError, match="tokenizer: expected one, since LlamaForCausalLM does not say where"):
        distil(trainer, make_model(50, 0))


def test_a_teacher_that_is_built_has_its_own(pair):
    trainer = SimpleNamespace(
        args=SimpleNamespace(loss_type="nll", label_smoothing_factor=0.0), data_collator=Flat(), aux_loss_enabled=False,
        compute_loss_func=None, accelerator=SimpleNamespace(num_processes=1), processing_class=pair[0],
    )  # fmt: skip
    given: dict[str, Any] = {"tokenizer": pair[1], "loss": "x", "temperature": 2.0}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name}: expected none for a TeacherModel, which is built with its own"):
            distil(trainer, pair[2], **{name: value})
    with pytest.raises(ValueError, match=r"trainer: expected an SFTTrainer of text with TRL's own .*, got int"):
        distil(5, pair[2])
    for teacher in (None, [pair[2]], 5):
        with pytest.raises(TypeError, match="teacher: expected one, as a name, model or TeacherModel, got"):
            distil(trainer, teacher)


def trained(folder: Path, student_tok: Any, teacher_tok: Any, rows: list[dict[str, Any]], **given: Any) -> Any:
    """The first step's log, and the student's output layer after one step of SGD."""
    try:
        datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
        config, trainer = trl.SFTConfig, trl.SFTTrainer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"TRL's SFTTrainer cannot be imported: {error}")
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1.0,
        "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": None, "gradient_checkpointing": False,
        "disable_tqdm": True, "shuffle_dataset": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    student = make_model(len(student_tok), 0)
    made = trainer(
        student, args=config(**{**defaults, **given}), processing_class=student_tok,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    before = student.lm_head.weight.detach().clone()
    teacher = distil(made, make_model(len(teacher_tok), 1), teacher_tok, kd_weight=0.5)
    assert teacher.summary().startswith("teacher teacher: ")
    made.train()
    logged = next(one for one in made.state.log_history if "kd" in one)
    return logged, student.lm_head.weight.detach() - before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of TRL
def test_sft_trainer(student_tok, teacher_tok, tmp_path):
    """However a step is cut, and whether documents share a row, it is one step; the loss is that of its parts."""
    rows = [{"text": text[:70]} for text in SMALL_TEXTS[:4]]
    logged, change = trained(tmp_path, student_tok, teacher_tok, rows)
    assert logged["kd"] > 0
    assert logged["loss"] == pytest.approx(logged["ce"] + 0.5 * logged["kd"], rel=1e-4)
    assert float(change.abs().max()) > 0
    given = {"packing": True, "max_length": 90, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    other, changed = trained(tmp_path, student_tok, teacher_tok, rows, **given)
    for name in ("ce", "kd", "loss"):
        assert other[name] == pytest.approx(logged[name], rel=1e-4), name
    torch.testing.assert_close(changed, change, rtol=1e-3, atol=1e-5 * float(change.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_with_chats(pair, tmp_path):
    student, teacher, _ = pair
    logged, change = trained(tmp_path, student, teacher, [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 4)
    assert logged["kd"] > 0
    assert float(change.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_with_a_template_of_its_own(small_chat_tok, tmp_path, caplog):
    """For ``assistant_only_loss`` TRL may write chats otherwise than the tokenizer's template does."""
    utils = pytest.importorskip("trl.chat_template_utils", exc_type=(ImportError, RuntimeError))
    student = copy.copy(small_chat_tok("qwen3x"))
    student.chat_template = utils.qwen3_chat_template
    assert utils.get_training_chat_template(student) != student.chat_template
    logged, _ = trained(
        tmp_path, student, small_chat_tok("llama3"), [{"messages": CHAT * 2}] * 4, assistant_only_loss=True
    )
    assert logged["kd"] > 0
    assert "compared with nothing" not in caplog.text
