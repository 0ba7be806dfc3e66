"""Teachers in 8 and 4 bits, and a student so under adapters; on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
import transformers
from comparer import assert_close
from small import command, history, make_model, with_adapters
from transformers import TorchAoConfig

from xtoken import Teacher
from xtoken.cli import main
from xtoken.train import TeacherModel, load_model
from xtoken.train.adapters import AdapterArguments, prepare
from xtoken.train.limits import head_rows
from xtoken.train.quantized import check_layers, quantization_config, stays


@pytest.fixture(scope="module")
def wide(folders: dict[str, str], tmp_path_factory: Any, teacher_tok: Any) -> str:
    """A teacher whose layers are wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(len(teacher_tok), 1, hidden=64).save_pretrained(folder)
    teacher_tok.save_pretrained(folder)
    return str(folder)


def check_teacher(source: str, given: Any, most: float) -> Any:
    """A teacher with such weights has nearly the logits of the one with its own; returns the model."""
    model, tokenizer = load_model(source, device="cpu", quantization_config=given)
    teacher = TeacherModel(Teacher(), model, tokenizer)
    teacher.place(torch.device("cpu"))
    ids = torch.arange(3, 43)[None]
    got = teacher.logits({"input_ids": ids}, {"input_ids": ids})
    with torch.no_grad():
        want = load_model(source)[0].eval()(ids).logits
    off = float((got.float() - want).abs().max() / want.abs().max())
    assert 0.0 < off < most
    assert head_rows(model) == want.shape[-1]
    assert not any(weight.requires_grad for weight in model.parameters())
    return model


def test_torchao(wide, tmp_path):
    """By name, by a mapping, and from a file: the same weights."""
    pytest.importorskip("torchao")
    model = check_teacher(wide, "int8", 0.05)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert type(weight).__name__ in ("Int8Tensor", "AffineQuantizedTensor")  # the latter until torchao 0.15
    assert not stays(model)
    fields = quantization_config("int8").to_dict()
    (tmp_path / "int8.yaml").write_text(json.dumps(fields))
    for given in (fields, json.dumps(fields), tmp_path / "int8.yaml", quantization_config("int8")):
        again = load_model(wide, quantization_config=given)[0].model.layers[0].mlp.down_proj.weight
        assert torch.equal(again.dequantize(), weight.dequantize())
    in_groups_of_128 = TorchAoConfig(importlib.import_module("torchao.quantization").Int4WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"quantization: expected linear layers that it can take in .* inputs of 64"):
        load_model(wide, quantization_config=in_groups_of_128)
    if importlib.util.find_spec("mslk") is None:
        with pytest.raises(ImportError, match="int4 of torchao needs mslk, for GPUs; nf4, by bitsandbytes"):
            quantization_config("int4")


@pytest.mark.filterwarnings("ignore")  # those of bitsandbytes and torch
@pytest.mark.parametrize(("name", "most"), [("llm.int8", 0.05), ("nf4", 0.4), ("fp4", 0.4)])
def test_bitsandbytes(wide, name, most):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = check_teacher(wide, name, most)
    assert stays(model)


def in_full(weight: Any) -> torch.Tensor:
    if not hasattr(weight, "quant_state"):
        return weight.dequantize()
    return importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_gradients_of_adapters(wide, name, package):
    """Those of the model with the quantised weights in full; also after an evaluation, for which weights are packed."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    found = []
    for is_plain in (False, True):
        model, _ = load_model(wide, dtype="float32", quantization_config=name)
        for path, layer in list(model.named_modules()):
            if is_plain and "proj" in path:
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight.data = in_full(layer.weight)
                model.set_submodule(path, plain)
        model = with_adapters(model, 2)
        prepare(model, AdapterArguments(), False)
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            model.eval()(ids)
        model.train()(ids).logits.square().sum().backward()
        found.append({path: one.grad for path, one in model.named_parameters() if one.requires_grad})
    assert len(found[0]) == 28
    for path, want in found[1].items():
        assert_close(found[0][path], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()), what=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_command(folders, wide, tmp_path, name):
    """A teacher so, and a student too, whose adapters learn and are merged into the weights that it is stored with."""
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[name])
    if name == "int8" and transformers.__version__ < "5":
        pytest.skip("transformers 4 trains no adapters beside torchao's weights, and says so")
    output = tmp_path / "out"
    named = {**folders, "teacher": wide}
    own = ["--max_steps", "6", "--learning_rate", "1e-2", "--teacher_quantization", name]
    if name == "nf4":  # in blocks of 64
        named["student"] = str(tmp_path / "student")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folders["student"])
        make_model(len(tokenizer), 0, hidden=64).save_pretrained(named["student"])
        tokenizer.save_pretrained(named["student"])
    adapter = ["--lora_rank", "4", "--student_quantization", name, "--lora_merge", "--gradient_checkpointing"]
    assert main(command(named, output, *own, *adapter)) == 0
    first, *_, last = [one for one in history(output) if "eval_ce" in one]
    assert last["eval_ce"] < first["eval_ce"]
    merged, student = load_model(output)[0].state_dict(), load_model(named["student"])[0].state_dict()
    assert {one.dtype for one in merged.values()} == {torch.float32}
    assert {name for name in merged if not torch.equal(merged[name], student[name])} == {
        name for name in student if "proj" in name
    }


def test_bad_input(wide, folders, tmp_path, monkeypatch, capsys):
    """Each is one line that names the option or the argument."""
    for given, message in (
        ("int3", "quantization: expected int8, int4, llm.int8, nf4, fp4, none, JSON or a file"),
        ("[1].json", "No such file or directory"),
        ({"bits": 4}, "quantization: expected quant_method among its fields, got bits"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message.replace(".", r"\.")):
            quantization_config(given)
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="quantization: expected fields and their values, got list"):
        quantization_config(str(tmp_path / "list.yaml"))
    assert quantization_config("none") is quantization_config(None) is None
    for package, name in (("torchao", "int8"), ("bitsandbytes", "nf4")):
        monkeypatch.setitem(sys.modules, package, None)
        message = f"{package} is not installed; pip install 'xtoken[{package}]' brings it"
        for one in (name, {"quant_method": package}):
            with pytest.raises(ImportError, match=message.replace("[", r"\[")):
                quantization_config(one)
        assert main(command(folders, tmp_path / "out", "--teacher_quantization", name)) == 1
        assert capsys.readouterr().err == f"xtoken train: {message}\n"
    monkeypatch.undo()
    fields = json.dumps({"quant_method": "gptq", "bits": 4})
    assert main(command(folders, tmp_path / "out", "--student_quantization", fields)) == 1
    assert "student_quantization: expected lora_rank with it" in capsys.readouterr().err
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    from xtoken.train import teachers

    monkeypatch.setattr(teachers, "load_tokenizer", lambda *args, **kwargs: None)
    config = quantization_config({"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantization_config: expected None for a GGUF file, .* save that first"):
        load_model(gguf, quantization_config=config)


def test_a_teacher_that_is_there_already(student_tok, teacher_tok):
    message = "quantization_config: expected none for a model, which is not loaded here, got 'int8'"
    with pytest.raises(ValueError, match=message):
        TeacherModel.build(make_model(50, 0), student_tok, tokenizer=teacher_tok, quantization_config="int8")


def test_layers_that_are_left(caplog):
    model: Any = make_model(50, 0)
    model.model.layers[0].mlp.up_proj.__class__ = type("Packed", (torch.nn.Linear,), {})
    check_layers(model, "it")
    assert "it: 13 of 14 linear layers are not quantised, as model.layers.0.self_attn.q_proj" in caplog.text
