"""LoRA on the student: training, gradients, checkpoints, merging, and what does not go with it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparer import assert_close
from small import SMALL_TEXTS, collate, command, encode, history, make_config, make_model, make_teacher, with_adapters

from xtoken.cli import main
from xtoken.train import XTokenTrainer, adapters, checkpoints, load_model, load_tokenizer
from xtoken.train.adapters import AdapterArguments, add_lora, check_checkpoint, prepare
from xtoken.train.limits import head_rows, most_positions
from xtoken.train.packing import packing_fault

peft = pytest.importorskip("peft")


def options(output: Path, *more: str) -> list[str]:
    """Of a run of four steps with adapters, whose gradients do not depend on how far it is."""
    return ["--lora_rank", "4", "--max_steps", "4", "--save_steps", "2", "--scaling", "fixed", *more]


@pytest.fixture(scope="module")
def whole(folders: dict[str, str], tmp_path_factory: Any) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(folders, output, *options(output, "--lora_merge", "--lora_dropout", "0.1"))) == 0
    return output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43)[None]).logits


@pytest.mark.slow
def test_the_command_trains_and_merges(whole, folders):
    """The output loads as any model does: it is the student with the adapter, which lies beside it."""
    from transformers import AutoModelForCausalLM

    first, *_, last = [one for one in history(whole) if "eval_ce" in one]
    assert last["eval_ce"] < first["eval_ce"]
    assert {one.name for one in (whole / "adapter").iterdir()} == set(adapters.FILES)
    assert not (whole / adapters.CONFIG).exists()
    for path in (whole / "checkpoint-2", whole / "checkpoint-4"):
        assert [one.name for one in path.glob("*.safetensors") if "model" in one.name] == ["adapter_model.safetensors"]
    student, _ = load_model(folders["student"])
    own = {name: one.clone() for name, one in student.state_dict().items()}
    with_adapter = peft.PeftModel.from_pretrained(student, whole / "adapter")
    assert with_adapter.peft_config["default"].lora_alpha == 8
    want = logits(with_adapter)
    merged = AutoModelForCausalLM.from_pretrained(whole)
    for made in (merged, load_model(whole / "adapter")[0], load_model(whole / "checkpoint-4")[0]):
        assert_close(logits(made), want, rtol=1e-4, atol=1e-5)
    changed = {name for name, one in merged.state_dict().items() if not torch.equal(one, own[name])}
    assert {name for name in own if "proj" in name} == changed
    tokenizer = load_tokenizer(whole)  # the student as it was stored knew of no such tokens
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own_id, generated = getattr(merged.config, name), getattr(merged.generation_config, name)
        assert own_id == getattr(tokenizer, name)
        assert generated in (own_id, [own_id])
    for folder in (whole / "adapter", whole / "checkpoint-4"):
        (ends,) = load_model(folder)[0].generation_config.eos_token_id
        assert ends == tokenizer.eos_token_id


@pytest.mark.slow
def test_resuming_from_an_adapter(whole, folders, tmp_path, threads, caplog):
    """From the newest checkpoint whose adapter is whole; the end is that of the run that was not disturbed."""
    from safetensors.torch import load_file

    output = tmp_path / "run"
    shutil.copytree(whole, output)
    damaged = output / "checkpoint-4" / "adapter_model.safetensors"
    want = load_file(whole / "checkpoint-4" / "adapter_model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert checkpoints.newest(output) == output / "checkpoint-2"
    assert "adapter_model.safetensors is damaged" in caplog.text
    assert main(command(folders, output, *options(output, "--resume", "--lora_dropout", "0.1"))) == 0
    got = load_file(output / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(got[name], value, rtol=1e-4, atol=1e-6, what=name)


def test_checkpoints_of_other_adapters(tmp_path):
    """A rank, a scale or a target that differs, and a model without adapters or checkpoint without one, are refused."""

    def made(**changed: Any) -> Any:
        return add_lora(make_model(50, 0), AdapterArguments(**{"lora_rank": 4, **changed}))

    made().save_pretrained(tmp_path)
    check_checkpoint(tmp_path, made())
    changes: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 3.0, "lora_target_modules": ["q_proj"]}
    for name, value in changes.items():
        setting = {"lora_rank": "r"}.get(name, name.removeprefix("lora_") if "target" in name else name)
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: expected an adapter with {setting}="):
            check_checkpoint(tmp_path, made(**{"lora_alpha": 8.0, name: value}))
    with pytest.raises(ValueError, match="has an adapter, but this run trains none"):
        check_checkpoint(tmp_path, make_model(50, 0))
    (tmp_path / "whole").mkdir()
    with pytest.raises(ValueError, match="has the weights of a whole model, but this run trains an adapter"):
        check_checkpoint(tmp_path / "whole", made())


def test_one_name_of_modules(tmp_path):
    for one, count in (("q_proj", 1), ("all-linear", 7)):
        model = add_lora(make_model(50, 0), make_config(tmp_path, lora_rank=4, lora_target_modules=one))
        layers = sum(name.endswith("lora_A") for name, _ in model.named_modules())
        assert layers == count * model.config.num_hidden_layers
    args = make_config(tmp_path, lora_rank=4, lora_modules_to_save="lm_head")
    assert args.lora_modules_to_save == ["lm_head"]


def gradients(folder: Path, student: Any, student_tok: Any, teacher_tok: Any, **given: Any) -> dict[str, torch.Tensor]:
    """Of one step of training."""
    examples = encode(SMALL_TEXTS[:2], student_tok, teacher_tok)
    config = make_config(folder, max_steps=1, per_device_train_batch_size=2, **given)
    trainer = XTokenTrainer(
        student, config, [make_teacher(student_tok, teacher_tok)], collate, examples, processing_class=student_tok
    )
    found: dict[str, torch.Tensor] = {}
    for name, weight in student.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda grad, name=name: found.__setitem__(name, grad.clone()))
    trainer.train()
    return found


def test_gradient_checkpointing(student_tok, teacher_tok, tmp_path):
    """Reentrant checkpoints lose the gradients of blocks whose inputs need none."""

    def student() -> Any:
        return with_adapters(make_model(len(student_tok), 0), 2, lora_target_modules=["q_proj"])

    want = gradients(tmp_path, student(), student_tok, teacher_tok)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    got = gradients(tmp_path, student(), student_tok, teacher_tok, **reentrant)
    assert got.keys() == want.keys()
    assert len(want) == 4
    for name, value in want.items():
        assert float(value.abs().max()) > 0
        assert_close(got[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()), what=name)


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_that_are_trained_whole(student_tok, teacher_tok, tmp_path, is_tied):
    """They are saved with the adapter; where the output layer is the same weight, it stays so."""

    def student() -> Any:
        model = make_model(len(student_tok), 0)
        model.config.tie_word_embeddings = is_tied
        model.tie_weights()
        return model

    trained = add_lora(student(), AdapterArguments(lora_rank=2, lora_modules_to_save=["embed_tokens"]))
    assert gradients(tmp_path, trained, student_tok, teacher_tok)["base_model.model.model.embed_tokens."
        "modules_to_save.default.weight"].abs().sum() > 0  # fmt: skip
    trained.save_pretrained(tmp_path)
    want = logits(trained)
    student().save_pretrained(tmp_path / "base")
    adapters.save_merged(student(), tmp_path, trained)
    merged = type(student()).from_pretrained(tmp_path)
    before = student()
    assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    is_same = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_same is is_tied
    if not is_tied:
        assert torch.equal(merged.lm_head.weight, before.lm_head.weight)


def test_limits_are_those_of_the_model_within():
    for changed in ({}, {"lora_target_modules": ["lm_head"]}, {"lora_modules_to_save": ["lm_head"]}):
        model = add_lora(make_model(50, 0), AdapterArguments(lora_rank=2, **changed))
        assert (head_rows(model), most_positions(model)) == (50, 256)
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    adapted = add_lora(bloom, AdapterArguments(lora_rank=2))
    assert packing_fault(adapted, torch.arange(50)) == packing_fault(bloom, torch.arange(50))
    assert packing_fault(add_lora(make_model(50, 0), AdapterArguments(lora_rank=2)), torch.arange(50)) is None


def of_prompt() -> Any:
    return peft.get_peft_model(make_model(50, 0), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def for_inference() -> Any:
    model = add_lora(make_model(50, 0), AdapterArguments(lora_rank=2))
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [(of_prompt, "model: expected adapters in its layers, as LoRA's, got PROMPT_TUNING"),
     (for_inference, "model: expected an adapter that can be trained, got one that was loaded for inference")],
)  # fmt: skip
def test_adapters_that_cannot_be_trained(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(make(), AdapterArguments(), False)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"lora_alpha": 2.0}, "lora_alpha: expected lora_rank with it"),
     ({"student_quantization": "int8"}, "student_quantization: expected lora_rank with it, since"),
     ({"lora_rank": 0}, "lora_rank: expected an integer of at least 1, got 0"),
     ({"lora_rank": 1, "lora_alpha": 0.0}, "lora_alpha: expected a finite number above 0, got 0.0"),
     ({"lora_rank": 1, "lora_dropout": 1.0}, "lora_dropout: expected a share of at least 0 and below 1, got 1.0")],
)  # fmt: skip
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**given).check_adapters()


def test_a_student_in_full_that_should_not_be(student_tok, teacher_tok, tmp_path):
    with pytest.raises(
        ValueError, match=r"student_quantization: .* loaded by its name, or in 8 or 4 bits already, got L"
    ):
        prepare(make_model(50, 0), AdapterArguments(lora_rank=1, student_quantization="int8"), False)
    config = make_config(tmp_path, lora_rank=2)
    trainer = XTokenTrainer(
        make_model(len(student_tok), 0), config, [make_teacher(student_tok, teacher_tok)], collate, [],
        processing_class=student_tok,
    )  # fmt: skip
    assert {name.split(".")[-3] for name, one in trainer.model.named_parameters() if one.requires_grad} == {
        "lora_A", "lora_B",
    }  # fmt: skip


def test_modules_that_the_student_does_not_have():
    for name in ("lora_target_modules", "lora_modules_to_save"):
        with pytest.raises(ValueError, match=rf"{name}: .* got 'c_attn', which .* layers are down_proj, .*, v_proj"):
            add_lora(make_model(50, 0), AdapterArguments(**{"lora_rank": 1, name: ["q_proj", "c_attn"]}))
    tied = make_model(50, 0)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    with pytest.raises(ValueError, match="lora_target_modules: expected no embeddings that share their weight"):
        add_lora(tied, AdapterArguments(lora_rank=1, lora_target_modules=["lm_head"]))


def test_without_peft(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(command(folders, tmp_path / "out", "--lora_rank", "4")) == 1
    assert capsys.readouterr().err == "xtoken train: peft is not installed; pip install 'xtoken[peft]' brings it\n"
    assert main(command(folders, tmp_path / "out", "--lora_merge")) == 1
    assert "--lora_merge: expected --lora_rank with it" in capsys.readouterr().err


def test_merging_does_not_go_with_pushing(folders, tmp_path, capsys):
    """Since the Trainer pushes what it has saved, the adapter."""
    assert main(command(folders, tmp_path / "out", "--lora_merge", "--lora_rank", "2", "--push_to_hub")) == 1
    assert "--lora_merge: expected it without --push_to_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_an_adapter(folders, tmp_path, capsys):
    (tmp_path / adapters.CONFIG).write_text("{}")
    assert main(command({**folders, "student": str(tmp_path)}, tmp_path / "out")) == 1
    assert f"student: expected a model, got the adapter in {tmp_path}" in capsys.readouterr().err
