"""A training loop of one's own, under DDP and FSDP2: the gradients of several processes are those of one.

Counts are those of all ranks and micro-batches, as `XTokenLoss` asks for. The last rank has neither a label nor a
chunk, but takes part in what the others do together.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from old_versions import needs_fsdp
from processes import on_ranks
from small import SMALL_TEXTS, assert_same, collate, encode, make_model, two_teachers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from xtoken import XTokenLoss
from xtoken.train.head import linear_outputs

pytestmark = pytest.mark.slow

MICRO_BATCHES = 2
CASES: list[dict[str, Any]] = [
    {"wrap": "ddp", "fused": False},
    {"wrap": "ddp", "fused": True, "scaling": "dynamic"},
    {"wrap": "fsdp", "fused": False, "scaling": "dynamic"},
    {"wrap": "fsdp", "fused": True},
    {"wrap": "fsdp", "fused": True, "head_alone": True},
    {"wrap": "fsdp", "fused": False, "head_alone": True, "late_sync": True},
]


def wrapped(model: Any, wrap: str, head_alone: bool) -> Any:
    """The model whose gradients all ranks share; of FSDP its layers one by one, and perhaps the head."""
    if wrap == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in [*model.model.layers, *([model.lm_head] if head_alone else [])]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Step:
    """One step of training on examples; the objects are made before the processes are."""

    def __init__(self, student_tok: Any, teacher_tok: Any) -> None:
        self.vocabulary = len(student_tok)
        self.teachers = two_teachers(student_tok, teacher_tok, learnable=True)
        self.examples = encode(SMALL_TEXTS[:6], student_tok, teacher_tok, None)
        nothing = [
            {
                **one,
                "labels": [-100] * len(one["labels"]),
                "teachers": [{**one["teachers"][0], "spans": []}, one["teachers"][1]],
            }
            for one in self.examples[:2]
        ]
        self.of_ranks = {
            2: [self.examples, nothing],
            4: [self.examples[:2], self.examples[2:5], self.examples[5:], nothing],
        }

    def micro_batches(self, rank: int, world: int, count: int) -> list[dict[str, Any]]:
        own = self.of_ranks[world][rank]
        return [collate(own[k::count] or self.of_ranks[world][-1][:1]) for k in range(count)]

    def run(
        self, batches: list[dict[str, Any]], scaling: str = "fixed", fused: bool = False, wrap: str = "",
        head_alone: bool = False, late_sync: bool = False,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The gradients, those of W too, and CE and KD of all micro-batches together."""
        criterion = XTokenLoss([one.objective for one in self.teachers], scaling=scaling)
        criterion.zero_grad()
        inner = make_model(self.vocabulary, seed=0)
        model = wrapped(inner, wrap, head_alone) if wrap else inner
        world = dist.get_world_size() if wrap else 1

        def added(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            if world > 1:
                dist.all_reduce(values)
            return values

        aligned = [[entry["alignment"] for entry in batch["teachers"]] for batch in batches]
        counted = [criterion.counts(one["labels"], own) for one, own in zip(batches, aligned, strict=True)]
        items, *chunks = added(torch.tensor([[one, *more] for one, more in counted]).sum(0)).clamp_min(1)
        logged = torch.zeros(2)
        for k, (batch, own) in enumerate(zip(batches, aligned, strict=True)):
            is_last = k + 1 == len(batches)
            if wrap == "fsdp":
                model.set_requires_gradient_sync(is_last or not late_sync)
            with model.no_sync() if wrap == "ddp" and not is_last else nullcontext():
                inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                outputs = linear_outputs(model, inner, **inputs) if fused else model(**inputs)
                logits = []
                for teacher, entry, alignment in zip(self.teachers, batch["teachers"], own, strict=True):
                    theirs = {name: entry.get(name, inputs[name]) for name in inputs}
                    has_nothing = alignment is not None and not alignment.num_chunks
                    with torch.no_grad():
                        logits.append(None if has_nothing else teacher.model(**theirs).logits)
                total, parts = criterion(
                    outputs.logits, batch["labels"], logits, own, items, chunks, reduce=added if world > 1 else None
                )
                (total * world).backward()
            logged += torch.stack([parts["ce"], parts["kd"]]).detach()
        found = {name: weight.grad for name, weight in inner.named_parameters()}
        gradients = {name: getattr(one, "full_tensor", one.clone)() for name, one in found.items()}
        for k, weight in enumerate(criterion.parameters()):
            assert weight.grad is not None
            gradients[f"W{k}"] = added(weight.grad) / world
        return {**gradients, "logged": added(logged)}


@pytest.fixture(scope="module")
def step(student_tok: Any, teacher_tok: Any) -> Step:
    torch.set_num_threads(1)
    return Step(student_tok, teacher_tok)


def on_rank(step: Step, rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    return [
        step.run(step.micro_batches(rank, world, 1 if case.get("scaling") else MICRO_BATCHES), **case) for case in cases
    ]


@pytest.mark.parametrize(
    ("world", "cases"),
    [(2, CASES[:2]), pytest.param(2, CASES[2:], marks=needs_fsdp), (4, CASES[1:2]),
     pytest.param(4, CASES[4:5], marks=needs_fsdp)],
)  # fmt: skip
def test_gradients_are_those_of_one_process(
    step: Step, tmp_path: Path, world: int, cases: list[dict[str, Any]]
) -> None:
    results = on_ranks(world, lambda rank: on_rank(step, rank, world, cases), tmp_path)
    want = {scaling: step.run([collate(step.examples)], scaling) for scaling in ("fixed", "dynamic")}
    for case, *of_ranks in zip(cases, *results, strict=True):
        for got in of_ranks:
            assert_same(got, want[case.get("scaling", "fixed")])
