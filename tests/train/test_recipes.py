"""The recipes, as their files are, for a step: small random models with parts of the tokenizers of those they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_tokenizers import shortened
from small import SMALL_TEXTS, history, make_model
from transformers import PreTrainedTokenizerFast

from xtoken.cli import main
from xtoken.projection import ProjectionMatrix
from xtoken.train import teachers
from xtoken.train.command import parse

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
TOKENIZERS = {
    "meta-llama/Llama-3.2-1B": "llama3",
    "meta-llama/Llama-3.2-3B": "llama3",
    "Qwen/Qwen3-4B": "qwen3",
    "microsoft/Phi-4-mini-instruct": "o200k",
}
SPECIAL = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "o200k": {"eos_token": "<|endoftext|>"},
}
LOSSES = {
    "llama-3.2-1b-from-qwen3-4b": ["teacher Qwen3-4B: pkl, weight 1"],
    "llama-3.2-1b-from-two": ["teacher Phi-4-mini-instruct: hkl, weight 0.8", "teacher Llama-3.2-3B: kd, weight 0.2"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """A folder in which every model is found by its name, and the tokenizers by these names."""
    root, kinds = tmp_path_factory.mktemp("models"), {}
    for kind, special in SPECIAL.items():
        backend = shortened(kind, root, 10000)  # more than `top_k`
        kinds[kind] = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizers = {name: kinds[kind] for name, kind in TOKENIZERS.items()}
    for seed, (name, one) in enumerate(tokenizers.items()):
        make_model(len(one), seed, hidden=16).to(torch.bfloat16).save_pretrained(root / name)
    return root, tokenizers


@pytest.mark.parametrize("name", LOSSES)
def test_recipes(name, models, tmp_path, monkeypatch, capsys):
    root, tokenizers = models
    monkeypatch.chdir(root)
    monkeypatch.setattr(teachers, "load_tokenizer", lambda source, **kwargs: tokenizers[source])
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text[:60]}) for text in SMALL_TEXTS[:8]))
    given = ["--config", str(RECIPES / f"{name}.yaml"), "--data", str(tmp_path / "data.jsonl"), "--use_cpu"]
    given += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--report_to", "none"]
    given += ["--plot", "false"]
    _, config = parse(given)
    assert (config.max_steps, config.scaling, config.max_scale) == (30000, "dynamic", float("inf"))
    assert config.loss_options == {"top_k": 8192}
    assert config.learn_projection is (len(LOSSES[name]) == 1)
    assert main(["train", *given, "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]) == 0
    printed = capsys.readouterr().out
    for line in LOSSES[name]:
        assert line in printed
    (logged,) = [one for one in history(tmp_path / "out") if "ce" in one]
    assert logged["kd"] != 0.0  # of a part of both vocabularies it may be negative
    trained = tmp_path / "out" / "projection-Qwen3-4B.safetensors"
    assert trained.exists() is config.learn_projection
    if trained.exists():
        (built,) = [one for one in (tmp_path / "cache").iterdir() if one.suffix == ".safetensors"]
        before, after = (ProjectionMatrix.load(path).weight for path in (built, trained))
        assert before.shape == after.shape
        assert not torch.equal(before, after)
