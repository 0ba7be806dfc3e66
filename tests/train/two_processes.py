"""What `test_processes` compares with one process: what the first of two has come to, written to a file."""

from __future__ import annotations

import functools
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import on_ranks
from small import (
    CHANGED,
    SMALL_TEXTS,
    by_names,
    encode,
    held_out,
    make_config,
    make_model,
    make_tokenizer,
    run_one_step,
    train_and_resume,
    train_on_policy,
    two_teachers,
)

from xtoken.train import load_model


def allow_fsdp_on_the_cpu() -> None:
    """accelerate leaves FSDP off without an accelerator, and says nothing; torch's FSDP2 runs on the CPU too."""
    start = AcceleratorState.__init__

    def start_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_with_fsdp


def allow_deepspeed_on_the_cpu() -> None:
    """accelerate takes two processes without an accelerator for one when DeepSpeed is on; DeepSpeed does not."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def loaded_whole(folder: Path, tokenizer: Any, options: dict[str, Any]) -> list[bool]:
    """Whether `load_model` gives all weights while ZeRO-3 is configured: of a teacher, and of the student."""
    if torch.distributed.get_rank() == 0:
        make_model(len(tokenizer), 1).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    torch.distributed.barrier()
    config = make_config(folder, **options)
    models = [load_model(folder / "model", may_shard=may_shard)[0] for may_shard in (False, True)]
    assert config.hf_deepspeed_config.is_zero3()
    return [all(weight.numel() for weight in model.parameters()) for model in models]


def run(folder: Path, work: dict[str, Any], rank: int) -> dict[str, Any]:
    """What one of the processes comes to."""
    student_tok, teacher_tok = make_tokenizer(700, "{1,3}", "<s>"), make_tokenizer(500, "", "<|begin|>")
    examples = encode(SMALL_TEXTS[:8], student_tok, teacher_tok, None)
    results: dict[str, Any] = {"gradients": [], "resumed": {}}
    results["held_out"] = [held_out(folder, student_tok, teacher_tok, *one) for one in work.get("held_out", [])]
    on_policy = work.get("on_policy", {})
    results["on_policy"] = {
        name: train_on_policy(folder / name, student_tok, teacher_tok, **one)
        for name, one in on_policy.items()
        if "fsdp" not in one
    }
    results["names"] = [by_names(folder / "names", *one) for one in work.get("names", [])]
    allow_fsdp_on_the_cpu()
    for one in work.get("gradients", []):  # FSDP stays switched on in a process, so its cases come last
        teachers = two_teachers(student_tok, teacher_tok, one.pop("learnable", False), one.pop("average", None))
        given = examples
        for name, change in CHANGED.items():
            given = change(given) if one.pop(name, False) else given
        results["gradients"].append(run_one_step(folder, student_tok, teachers, given, **one))
    for name, one in on_policy.items():
        if "fsdp" in one:
            results["on_policy"][name] = train_on_policy(folder / name, student_tok, teacher_tok, **one)
    for name, one in work["resumed"].items():
        if "deepspeed" in one:
            allow_deepspeed_on_the_cpu()
        results["resumed"][name] = train_and_resume(folder / name, student_tok, teacher_tok, **one)
        expected = DistributedType.DEEPSPEED if "deepspeed" in one else DistributedType.FSDP
        assert AcceleratorState().distributed_type == expected
        assert AcceleratorState().num_processes == 2
    if "zero3" in work["resumed"]:
        results["is_whole"] = loaded_whole(folder, teacher_tok, work["resumed"]["zero3"])
    return results


if __name__ == "__main__":
    gc.freeze()  # each run of a trainer looks for garbage, and need not among what is imported
    folder, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.save(on_ranks(2, functools.partial(run, folder, work), folder, as_torchrun=True)[0], folder / "results.pt")
