"""Losses from hidden states and output layer in training: as with logits, which are never there; and who cannot."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from comparer import assert_as_accurate, assert_close
from small import (
    SMALL_TEXTS,
    assert_same,
    cut,
    encode,
    make_config,
    make_model,
    make_teacher,
    make_trainer,
    run_one_step,
    two_teachers,
)

from xtoken import LinearLogits, PieceIndex, ProjectionMatrix, Teacher
from xtoken.losses import Needs, registered
from xtoken.losses import logits as logits_module
from xtoken.losses.backends import kernels_of
from xtoken.train import TeacherModel, XTokenCollator
from xtoken.train import fused as fused_module
from xtoken.train.fused import Fused, logit_bytes
from xtoken.train.head import head_fault
from xtoken.train.meter import FiniteCheck

BF16_FLOOR = 2e-3
"""Of the largest gradient: what the sum of a few terms in bfloat16 may be off beside what the plain path is."""


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS[:4], student_tok, teacher_tok)


@pytest.fixture(scope="module")
def twins(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)


@pytest.fixture(scope="module")
def made(student_tok, teacher_tok) -> dict[Needs, Any]:
    """What losses for two tokenizers need."""
    pieces = PieceIndex.build(student_tok, teacher_tok, texts=())
    W = ProjectionMatrix.build(student_tok, teacher_tok)
    return {Needs.PROJECTION: {"projection": W}, Needs.PIECES: {"pieces": pieces}}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows of the student, or thereabouts."""
    monkeypatch.setattr(logits_module, "BLOCK_ELEMENTS", 16 * 700)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was told of the choice."""
    return [one.getMessage() for one in caplog.records if one.name == fused_module.__name__]


def teacher_of(name: str, made: dict[Needs, Any], student_tok: Any, teacher_tok: Any) -> TeacherModel:
    """For a registered loss."""
    needs = registered()[name].needs
    tok = student_tok if needs is Needs.SAME_TOKENIZER else teacher_tok
    return TeacherModel(Teacher(loss=name, **made.get(needs, {})), make_model(len(tok), 1), tok)


def kinds_of_losses() -> list[str]:
    """One for every set of kernels and what they need of two tokenizers, and one that is its formula alone."""
    found: dict[Any, str] = {}
    for name, loss in registered().items():
        found.setdefault((loss.kernels, loss.needs) if kernels_of(name, "cpu") else None, name)
    return list(found.values())


@pytest.mark.usefixtures("small_blocks", "threads")
@pytest.mark.parametrize("name", kinds_of_losses())
def test_gradients_of_every_kind_of_loss(tmp_path, student_tok, teacher_tok, examples, twins, made, name):
    """In float32; and under bfloat16's autocast about as far from those as with logits."""
    same = registered()[name].needs is Needs.SAME_TOKENIZER
    data = [{**one, "teachers": one["teachers"][1:]} for one in twins[:4]] if same else examples
    scaling = "dynamic" if len(name) % 2 else "fixed"

    def step(**options: Any) -> dict[str, torch.Tensor]:
        teachers = [teacher_of(name, made, student_tok, teacher_tok)]
        return run_one_step(tmp_path, student_tok, teachers, data, scaling=scaling, **options)

    true = step(fused="off")
    assert_same(step(fused="on"), true)
    plain, got = (step(fused=fused, bf16=True) for fused in ("off", "on"))
    for key, value in true.items():
        floor = BF16_FLOOR * float(value.abs().max())
        assert_as_accurate(got[key], plain[key], value, floor, key)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("scaling", "tied"), [("fixed", False), ("dynamic", True)])
def test_several_teachers_and_micro_batches(tmp_path, student_tok, teacher_tok, twins, scaling, tied, monkeypatch):
    """Two teachers read the student; W is trained; layers are computed again in backward."""
    if tied:
        make = make_model

        def make_tied(*args: Any, **options: Any) -> Any:
            model = make(*args, **options)
            model.config.tie_word_embeddings = True
            model.tie_weights()
            assert model.lm_head.weight is model.model.embed_tokens.weight
            return model

        monkeypatch.setattr("small.make_model", make_tied)

    def step(fused: str) -> dict[str, torch.Tensor]:
        teachers = two_teachers(student_tok, teacher_tok, learnable=True)
        options = {"scaling": scaling, "gradient_checkpointing": tied, "steps": 2, **cut(2, 2)}
        return run_one_step(tmp_path, student_tok, teachers, twins, fused=fused, **options)

    want, got = step("off"), step("on")
    assert ("lm_head.weight" in want) is not tied
    assert_same(got, want)


@pytest.mark.usefixtures("small_blocks")
def test_logits_are_never_there(tmp_path, student_tok):
    """No tensor in a step, of the models or of the losses, has half as many elements as the logits of the batch."""
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, None)], None)
    batch = trainer.data_collator(encode(SMALL_TEXTS, student_tok, None))
    size = batch["input_ids"].numel() * len(student_tok)
    largest = {}
    for choice in ("on", "off"):
        trainer._fused = Fused(choice, torch.device("cpu"))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
        trainer.training_step(trainer.model, trainer._prepare_inputs(batch))  # compares logits of a few tokens
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            trainer.training_step(trainer.model, trainer._prepare_inputs(batch))
        largest[choice] = max(event.cpu_memory_usage // 4 for event in profile.function_events)
    assert largest["off"] >= size
    assert largest["on"] < size / 2


def test_without_teachers(tmp_path, student_tok, twins, small_blocks):
    """Cross-entropy alone, in blocks that backward computes again."""
    data = [{**one, "teachers": []} for one in twins]
    want, got = (run_one_step(tmp_path, student_tok, [], data, fused=fused) for fused in ("off", "on"))
    assert_same(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation(tmp_path, student_tok, teacher_tok, twins, packed):
    """The same metrics, with several examples in a row too, and logits for whoever wants predictions."""
    found = []
    for fused in ("off", "on"):
        teachers = two_teachers(student_tok, teacher_tok)
        trainer = make_trainer(tmp_path, student_tok, teachers, None, twins[:4], fused=fused)
        if packed:
            trainer.data_collator = XTokenCollator(student_tok, [teacher_tok, student_tok], packed=True, max_length=256)
        predicted = trainer.predict(twins[:4])
        found.append((predicted.metrics, torch.as_tensor(predicted.predictions)))
    (want, want_logits), (got, got_logits) = found
    assert_close(got_logits, want_logits, rtol=1e-4, atol=1e-6)
    assert want_logits.shape[::2] == (1 if packed else 4, 700)
    names = [name for name in want if "ce" in name or "kd" in name or "agreement" in name]
    assert len(names) == 6
    for name in names:
        assert got[name] == pytest.approx(want[name], rel=1e-4), name


@pytest.mark.parametrize("mode", ["select", "average", "entropy"])
def test_teacher_modes(tmp_path, student_tok, twins, mode, caplog):
    """The best teacher is found from hidden states too; a mean of logits needs them, which is told."""
    data = [{**one, "teachers": [{"ids": None, "spans": None}] * 2} for one in twins[:4]]

    def step(fused: str) -> dict[str, torch.Tensor]:
        teachers = [make_teacher(student_tok, None, seed, name=f"twin{seed}") for seed in (1, 2)]
        return run_one_step(tmp_path, student_tok, teachers, data, fused=fused, teacher_mode=mode)

    want = step("off")
    assert not messages(caplog)
    assert_same(step("on"), want)
    told = messages(caplog)
    if mode == "average":
        assert told[0].startswith("fused=on: the losses get logits of twin1: expected another teacher_mode than")
    assert told[-1] == "fused=on: the losses get hidden states and output layer of the student instead of logits"
    assert len(told) == 3


def test_auto_goes_by_the_size(tmp_path, student_tok, teacher_tok, examples, monkeypatch, caplog):
    """In each micro-batch; both are told once."""
    teacher = make_teacher(student_tok, teacher_tok)
    trainer = make_trainer(tmp_path, student_tok, [teacher], examples, per_device_train_batch_size=1)
    small, large = (trainer.data_collator(examples[:n]) for n in (1, 4))
    sizes = [logit_bytes(one, trainer.model, [teacher.model]) for one in (small, large)]
    ids = [large["input_ids"], large["teachers"][0]["input_ids"]]
    assert sizes[1] == 4 * (2 * ids[0].numel() * 700 + ids[1].numel() * len(teacher_tok))
    cached = {**large, "teachers": [{**large["teachers"][0], "logits": torch.zeros(1)}]}
    assert logit_bytes(cached, trainer.model, [teacher.model]) == 8 * ids[0].numel() * 700
    assert trainer._fused.least == fused_module.memory_of(torch.device("cpu")) // 8 > 2**26
    monkeypatch.setattr(trainer._fused, "least", sizes[1])
    kinds = []
    for batch in (small, large, small, large):
        _, outputs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), return_outputs=True)
        kinds.append(isinstance(outputs.logits, LinearLogits))
    assert kinds == [False, True, False, True]
    told = messages(caplog)
    assert len(told) == 3
    assert "the losses get logits, since those of a micro-batch take 0." in told[0]
    assert "output layer of teacher instead of logits, since those of a micro-batch would take 0.88 MiB" in told[1]
    assert "output layer of the student instead" in told[2]


def test_models_that_cannot(tmp_path, student_tok, teacher_tok, examples, caplog, monkeypatch):
    """Under "on" a teacher has logits and says why, a student is refused."""
    teacher = make_teacher(student_tok, teacher_tok)

    class Doubled(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    teacher.model.lm_head.__class__ = Doubled
    want, got = (run_one_step(tmp_path, student_tok, [teacher], examples, fused=one) for one in ("off", "on"))
    assert_same(got, want)
    assert "fused=on: the losses get logits of teacher: expected a linear output layer, got Doubled" in caplog.text
    trainer = make_trainer(tmp_path, student_tok, [], None, fused="on")
    trainer.model.lm_head.__class__ = Doubled
    batch = trainer._prepare_inputs(trainer.data_collator([{**one, "teachers": []} for one in examples]))
    with pytest.raises(ValueError, match="fused: expected 'auto' or 'off' for this student, got 'on': expected a line"):
        trainer.compute_loss(trainer.model, batch)
    with pytest.raises(ValueError, match="fused: expected one of 'auto', 'on', 'off', got 'yes'"):
        make_config(tmp_path, fused="yes")
    with pytest.raises(
        ValueError, match="fused: expected 'auto' or 'off' for this student, got 'on': expected a model"
    ):
        make_trainer(tmp_path, student_tok, [], None, fused="on", torch_compile=True, torch_compile_backend="eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as `accelerate launch` does
    with pytest.raises(ValueError, match="got 'on': expected a model that is not compiled as a whole"):
        make_trainer(tmp_path, student_tok, [], None, fused="on")


def few() -> torch.Tensor:
    return torch.arange(8)[None]


def changed(what: str) -> Any:
    """A model whose output layer is not what it seems."""
    model = make_model(60, 0)
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if what == "cut":
                return forward(self, *args, **kwargs, logits_to_keep=2)
            outputs = forward(self, *args, **kwargs)
            if what == "twice":
                self.lm_head(torch.zeros(1, 1, 32))
            elif what == "kept":
                outputs.logits = outputs.logits.view(1, 8, 60)
            return outputs

    model.__class__ = Changed
    if what == "missing":
        model.get_output_embeddings = lambda: None
    if what == "packed":

        class Packed(torch.nn.Parameter):
            pass

        model.lm_head.weight = Packed(model.lm_head.weight.detach())
    if what == "absent":
        model.lm_head.to("meta")
    return model


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("missing", "expected an output layer, as models of transformers have one, got Changed"),
        ("packed", "expected a plain weight of the output layer, got Packed"),
        ("absent", "expected the output layer's weight on a device, got one that is loaded when it is needed"),
        ("twice", "expected a forward that does without rows of logits, but it says: model: expected one call of its "),
        ("kept", "expected a forward that does without rows of logits, but it says: shape '[1, 8, 60]' is invalid for"),
    ],
)
def test_output_layers_that_are_something_else(what, fault):
    model = changed(what)
    assert str(head_fault(model, few())).startswith(fault)
    assert model.training  # as it was
    assert not model._forward_hooks
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("with_head", [False, True])
def test_quantised_weights(with_head):
    """Those of the body are none of our business."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and (with_head or name != "lm_head")

    model = make_model(60, 0).eval()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_chosen)
    fault = head_fault(model, few())
    assert fault == (
        f"expected a plain weight of the output layer, got {type(model.lm_head.weight).__name__}" if with_head else None
    )


def test_a_teacher_on_another_device(caplog):
    """Its output layer is not copied to the student's."""
    fused, model = Fused("on", torch.device("meta")), make_model(60, 0).eval()
    made = fused.outputs(model, model, "T", input_ids=few())
    assert made.logits.shape == (1, 8, 60)
    assert "logits of T: expected an output layer on meta, where the student is, got one on cpu" in caplog.text


def test_what_is_not_finite_is_found():
    """In the hidden states of a row, or in the output layer."""
    hidden, head = torch.zeros(2, 3, 4), torch.ones(5, 4)
    nan = torch.tensor(torch.nan)
    hidden[1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match="S: logits are not a number at step 3, first in sample 1 at position 2"):
        FiniteCheck(["S"]).look(nan, [LinearLogits(hidden, head)], 3)
    head[4, 3] = torch.nan
    with pytest.raises(ValueError, match="T: logits are not a number at step 3, first in sample 0 at position 0"):
        FiniteCheck(["S", "T"]).look(nan, [torch.zeros(2, 3, 5), LinearLogits(hidden * 0, head)], 3)


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def adapted(seed: int = 0, **options: Any) -> Any:
    """A model under peft whose adapters do something."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(make_model(700, seed), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


@needs_peft
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},  # of the output layer no gradient is wanted
        {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_alpha": 5},
        {"target_modules": ["lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_lora(tmp_path, student_tok, teacher_tok, twins, options, monkeypatch):
    monkeypatch.setattr(
        "small.make_model", lambda size, seed: adapted(seed, **options) if seed == 0 else make_model(size, seed)
    )

    def step(fused: str, **more: Any) -> dict[str, torch.Tensor]:
        return run_one_step(
            tmp_path, student_tok, two_teachers(student_tok, teacher_tok), twins[:4], fused=fused, **more
        )

    true = step("off")
    assert any("lora" in name for name in true)
    assert_same(step("on"), true)
    if "r" in options:
        plain, got = step("off", bf16=True), step("on", bf16=True)
        for key, value in true.items():
            assert_as_accurate(got[key], plain[key], value, BF16_FLOOR * float(value.abs().max()), key)


@needs_peft
def test_lora_that_is_more_than_a_product():
    assert "expected plain LoRA on the output layer, got lora.Linear" in str(
        head_fault(adapted(target_modules=["lm_head"], use_dora=True), few())
    )
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    assert head_fault(model, few()) is None  # in evaluation mode nothing is left out
    want = model.eval()(input_ids=few()).logits
    with model.disable_adapter():
        assert head_fault(model, few()) is None
        assert not torch.equal(model(input_ids=few()).logits, want)
    model.merge_adapter()
    assert head_fault(model, few()) is None
