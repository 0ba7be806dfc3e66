"""What the tests of training share: small tokenizers, models, batches and trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_close
from default_losses import DEFAULT
from transformers import TrainerCallback

from xtoken import Aligner, ProjectionMatrix, Teacher
from xtoken.alignment import Alignment, pad_rows
from xtoken.losses import Needs, registered
from xtoken.train import TeacherModel, XTokenCollator, XTokenConfig, XTokenTrainer
from xtoken.train.adapters import AdapterArguments, add_lora

NO_ORDER = (
    ""
    if "train_sampling_strategy" in XTokenConfig.__dataclass_fields__
    else "this transformers has no train_sampling_strategy: rows come in a random order"
)

SMALL_TEXTS = [
    f"In {1900 + 7 * k}, {13 * k + 100} readers paid ${k}.{k % 10}0 for {'one book' if k % 3 else 'two books'}, "
    + "and then they read it. " * (1 + k % 3)
    for k in range(24)
]


def make_tokenizer(size: int, digits: str, bos: str) -> Any:
    """A byte-level BPE with end and pad tokens, as transformers wraps it; `digits` is how many make one piece."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(rf"\d{digits}| ?[^\s\d]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [bos, "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numbers = [str(n) for n in range(1000)] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SMALL_TEXTS, *numbers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


def make_model(vocab_size: int, seed: int, hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(texts: Sequence[str], student_tok: Any, *teacher_toks: Any) -> list[dict[str, Any]]:
    """Examples as the collator takes them; a teacher tokenizer None reads the student's ids."""
    examples = []
    for text in texts:
        ids = [student_tok.bos_token_id, *student_tok.encode(text, add_special_tokens=False)]
        teachers: list[dict[str, Any]] = []
        for tok in teacher_toks:
            if tok is None:
                teachers.append({"ids": None, "spans": None})
                continue
            theirs = [tok.bos_token_id, *tok.encode(text, add_special_tokens=False)]
            spans = Aligner(student_tok, tok).align(ids, theirs).spans
            teachers.append({"ids": theirs, "spans": spans})
        examples.append({"student_ids": ids, "labels": [-100, *ids[1:]], "teachers": teachers})
    return examples


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of such examples."""

    def rows(key: str, items: Sequence[Any], fill: int) -> torch.Tensor:
        return pad_rows([torch.tensor(item[key]) for item in items], fill)

    batch = {"input_ids": rows("student_ids", examples, 0), "labels": rows("labels", examples, -100)}
    batch["attention_mask"] = pad_rows([torch.ones(len(one["student_ids"]), dtype=torch.int64) for one in examples], 0)
    entries = []
    for parts in zip(*(one["teachers"] for one in examples), strict=True):
        if parts[0]["ids"] is None:
            entries.append({"alignment": None})
            continue
        spans = [torch.as_tensor(part["spans"], dtype=torch.int32).reshape(-1, 4) for part in parts]
        offsets = torch.tensor([0, *map(len, spans)]).cumsum(0)
        entries.append({
            "input_ids": rows("ids", parts, 0),
            "attention_mask": pad_rows([torch.ones(len(part["ids"]), dtype=torch.int64) for part in parts], 0),
            "alignment": Alignment(torch.cat(spans), offsets, batch["input_ids"], rows("ids", parts, 0)),
        })  # fmt: skip
    return {**batch, "teachers": entries}


def make_teacher(student_tok: Any, teacher_tok: Any, seed: int = 1, **objective: Any) -> TeacherModel:
    """A small random teacher, over all columns unless told otherwise."""
    name = objective.pop("name", "teacher")
    default = DEFAULT[Needs.SAME_TOKENIZER if teacher_tok is None else Needs.PROJECTION]
    if "top_k" in registered()[objective.get("loss", default)].options():
        objective.setdefault("top_k", None)
    if teacher_tok is None:
        return TeacherModel(Teacher(**objective), make_model(len(student_tok), seed), student_tok, name)
    projection: Any = ProjectionMatrix.build(student_tok, teacher_tok)
    if objective.pop("learnable", False):
        projection = projection.learnable()
    return TeacherModel(
        Teacher(projection=projection, **objective), make_model(len(teacher_tok), seed), teacher_tok, name
    )


def with_adapters(model: Any, rank: int, **given: Any) -> Any:
    """A PeftModel whose adapters are not zero."""
    torch.manual_seed(0)
    model = add_lora(model, AdapterArguments(lora_rank=rank, **given))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def make_config(folder: Path, **options: Any) -> XTokenConfig:
    if "train_sampling_strategy" in options and NO_ORDER:
        pytest.skip(NO_ORDER)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "max_grad_norm": 0.0,
        "dataloader_num_workers": 0,
    }
    return XTokenConfig(**{**defaults, **options})


def make_trainer(
    folder: Path,
    student_tok: Any,
    teachers: Sequence[TeacherModel],
    examples: Any,
    held_out: Any = None,
    **options: Any,
) -> XTokenTrainer:
    student = make_model(len(student_tok), seed=0)
    return XTokenTrainer(
        model=student if options.get("lora_rank") is None else with_adapters(student, options["lora_rank"]),
        args=make_config(folder, **options),
        teachers=teachers,
        data_collator=collate,
        train_dataset=examples,
        eval_dataset=held_out,
        processing_class=student_tok,
    )


class _Gradients(TrainerCallback):
    """Keeps the student's gradients of the last step, whole where FSDP has shared them out."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients = {
            name.removeprefix("module."): getattr(weight.grad, "full_tensor", weight.grad.clone)()
            for name, weight in named
            if weight.grad is not None
        }


def run_one_step(
    folder: Path, student_tok: Any, teachers: Sequence[TeacherModel], examples: Any, steps: int = 1, **options: Any
) -> dict[str, torch.Tensor]:
    """The gradients of the last of some SGD steps, those of W too, and the ``ce`` and ``kd`` that it logged."""
    options = {"max_steps": steps, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", **options}
    trainer = make_trainer(folder, student_tok, teachers, examples, **options)
    kept = _Gradients()
    trainer.add_callback(kept)
    trainer.train()
    gradients = dict(kept.gradients)
    for k, weight in enumerate(trainer.criterion.parameters()):
        assert weight.grad is not None
        gradients[f"W{k}"] = weight.grad
    logged = [one for one in trainer.state.log_history if "ce" in one][-1]
    return {**gradients, "logged": torch.tensor([logged["ce"], logged["kd"]])}


def cut(size: int, accumulated: int) -> dict[str, int]:
    """The options of a step of some micro-batches of a size."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Of what `run_one_step` gives, but for rounding."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(got[name], value, rtol=1e-4, atol=2e-6 * float(value.abs().max()) + 1e-9, what=name)


FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def two_teachers(
    student_tok: Any, teacher_tok: Any, learnable: bool = False, average: float | None = None
) -> list[TeacherModel]:
    """One of another tokenizer, and one with the student's, or a moving average of the student itself."""
    twin = make_teacher(student_tok, None, 2, name="twin")
    return [
        make_teacher(student_tok, teacher_tok, learnable=learnable),
        twin if average is None else TeacherModel.of_student(Teacher(top_k=None), average=average),
    ]


def routed(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples with chunks of the first teacher in one of them only, so that most micro-batches have none."""
    first = [{**one["teachers"][0], "spans": one["teachers"][0]["spans"][: 0 if k else None]}
             for k, one in enumerate(examples)]  # fmt: skip
    return [{**one, "teachers": [own, *one["teachers"][1:]]} for one, own in zip(examples, first, strict=True)]


def silent(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples, of which the second half has neither labels nor chunks: the whole share of the second process."""
    nothing = []
    for one in examples[len(examples) // 2 :]:
        first, *others = one["teachers"]
        nothing.append({**one, "labels": [-100] * len(one["labels"]), "teachers": [{**first, "spans": []}, *others]})
    return [*examples[: len(examples) // 2], *nothing]


CHANGED = {"routed": routed, "silent": silent}
"""What may be done to examples, by option."""


def held_out(folder: Path, student_tok: Any, teacher_tok: Any, count: int, packed: bool) -> dict[str, float]:
    """What evaluation says of some examples, two a batch and process."""
    examples = encode(SMALL_TEXTS[:count], student_tok, teacher_tok, None)
    trainer = make_trainer(
        folder, student_tok, two_teachers(student_tok, teacher_tok), None, examples, per_device_eval_batch_size=2
    )
    if packed:
        trainer.data_collator = XTokenCollator(student_tok, [teacher_tok, student_tok], packed=True, max_length=256)
    return trainer.evaluate()


def by_names(folder: Path, is_stream: bool, size: int) -> list[list[float]]:
    """What a run logs that is given names and a dataset, which are in the folder; `size` is that of a batch."""
    import datasets

    args = make_config(
        folder, loss=DEFAULT[Needs.NOTHING], cache=str(folder / "cache"), train_sampling_strategy="sequential",
        max_length=40, per_device_train_batch_size=size, scaling="fixed",
    )  # fmt: skip
    data = datasets.load_from_disk(str(folder / "data"))
    data = data.to_iterable_dataset(num_shards=3) if is_stream else data
    trainer = XTokenTrainer(str(folder / "student"), args, str(folder / "teacher"), train_dataset=data)
    trainer.train()
    return [[one["ce"], one["kd"]] for one in trainer.state.log_history if "ce" in one]


def train_and_resume(folder: Path, student_tok: Any, teacher_tok: Any, **options: Any) -> list[list[dict[str, Any]]]:
    """The logs of a run with trained W, and of one that goes on from its middle; both save at their end."""
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)
    logs = []
    for name, start in (("whole", None), ("resumed", folder / "whole" / "checkpoint-2")):
        trainer = make_trainer(
            folder / name, student_tok, two_teachers(student_tok, teacher_tok, learnable=True), examples,
            max_steps=4, save_strategy="steps", save_steps=2, scaling="fixed", lr_scheduler_type="linear", **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        logs.append([one for one in trainer.state.log_history if "ce" in one])
    return logs


def train_on_policy(folder: Path, student_tok: Any, teacher_tok: Any, **options: Any) -> list[dict[str, Any]]:
    """The logs of a run in which some of the prompts are completed."""
    rows = [{"prompt": text[:20], "completion": text[20:60]} for text in SMALL_TEXTS[:8]]
    rows += [{"text": text} for text in SMALL_TEXTS[8:12]]
    trainer = XTokenTrainer(
        make_model(len(student_tok), 0), make_config(folder, on_policy=0.5, max_new_tokens=6, max_steps=4, **options),
        [make_teacher(student_tok, teacher_tok)], None, rows, None, student_tok,
    )  # fmt: skip
    trainer.train()
    return [one for one in trainer.state.log_history if "ce" in one]


def command(folders: dict[str, str], output: Path, *more: str) -> list[str]:
    return [
        "train", "--student", folders["student"], "--teacher", folders["teacher"], "--data", folders["train"],
        "--eval_data", folders["test"], "--output", str(output), "--cache", str(output.parent / "cache"),
        "--per-device-train-batch-size", "4", "--learning_rate", "3e-3", "--use_cpu", "--disable_tqdm", "true",
        "--logging_steps", "2", "--report_to", "none", *more,
    ]  # fmt: skip


def history(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]
