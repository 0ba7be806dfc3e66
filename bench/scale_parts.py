"""The parts of `bench_scale.py` that start processes, and its plan.

Traffic: the bytes that processes of this machine hand to collectives in a step, counted below torch's API, beside the
closed forms. Time: processor seconds of a rank's forward and backward by number of rows and of chunks, vocabulary and
ranks. Plan: memory, traffic and time a device of a 70B-class teacher and an 8B student, from formulas, what a real pair
sends, and one measured time.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from measure import ROOT, Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUTS = {"whole": None, "in parts": 0.5, "cut elsewhere": 0.7}
"""The first rank's share of the teacher's columns; the student's are shared out evenly."""


class Traffic(TorchDispatchMode):
    """Counts the bytes of floating-point tensors that collectives are given (or, gathering, return), by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            is_input_second = "reduce_scatter" in name or "alltoall" in name
            tensors, _ = torch.utils._pytree.tree_flatten(args[1] if is_input_second else args[0])
            sizes = [one.numel() * one.element_size() for one in tensors if one.is_floating_point()]
            self.bytes[name.strip("_")] += sum(sizes)
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Of all collectives."""
        return sum(self.bytes.values())


def losses_in_parts() -> dict[str, Any]:
    """The losses that take logits in parts, by name."""
    from xtoken.losses.backends import kernels_of
    from xtoken.losses.loss import registered

    return {name: one for name, one in registered().items() if not one.whole_rows and kernels_of(name, "parallel")}


def case_of(loss: Any, rows: int, size: int, tokens: int = 1) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Logits [1, rows + 1, size] of both sides, chunks of so many tokens, and what else the loss is given: two
    vocabularies of the same tokens."""
    import xtoken
    from xtoken.losses.loss import Needs

    generator = torch.Generator().manual_seed(0)
    logits = list(torch.randn(2, 1, rows + 1, size, generator=generator))
    ids = torch.arange(rows + 1)[None] % size
    spans = [[k, k + tokens] * 2 for k in range(1, rows + 1, tokens)]
    given: list[Any] = [xtoken.Alignment(spans, [0, len(spans)], ids, ids)]
    if loss.needs is Needs.PROJECTION:
        ones = [[1.0]] * size
        given.append(xtoken.ProjectionMatrix.from_topk([[k] for k in range(size)], ones, teacher_vocab_size=size))
    if loss.needs is Needs.PIECES:
        texts = [bytes([97 + k // 676, 97 + k // 26 % 26, 97 + k % 26]) for k in range(size)]
        given.append(xtoken.PieceIndex.build(xtoken.Vocabulary(texts), xtoken.Vocabulary(texts)))
    options = {name: value for name, value in (("top_k", None), ("uncommon_top_k", 0)) if name in loss.options()}
    if loss.needs is Needs.SAME_TOKENIZER:
        options["vocab_size"] = size
    return logits, given, options


def part_of(logits: Tensor, share: float | None, rank: int, world: int) -> Tensor:
    """The columns of a rank: evenly, but for the first rank's share; None: all."""
    size = logits.shape[-1]
    first = size // world if share in (None, 0.5) else round(size * float(share or 0))
    rest = (size - first) // max(1, world - 1)
    bounds = [0, *(first + rest * k for k in range(world - 1)), size]
    return logits if share is None else logits[..., bounds[rank] : bounds[rank + 1]].contiguous()


@contextmanager
def keeping(module: Any, name: str) -> Iterator[list[Any]]:
    """Keeps what a function or class of a module returns."""
    made, kept = getattr(module, name), list[Any]()

    def keep(*arguments: Any) -> Any:
        kept.append(made(*arguments))
        return kept[-1]

    with mock.patch.object(module, name, keep):
        yield kept


def step(
    loss: Any, rows: int, size: int, rank: int, world: int, share: float | None, tokens: int = 1
) -> Callable[[], None]:
    """Forward and backward of a rank's part; of one rank by the kernels."""
    (student, teacher), given, options = case_of(loss, rows, size, tokens)
    group = dist.group.WORLD if world > 1 else None
    leaf = part_of(student, 0.5, rank, world).requires_grad_()
    other = part_of(teacher, share, rank, world)

    def run() -> None:
        loss.function()(leaf, other, *given, **options, tp_group=group).backward()

    return run


def traffic_of_losses(rank: int, world: int, rows: int, sizes: list[int]) -> list[Row]:
    """What a rank gives for a chunk, and what the closed form says."""
    from xtoken.losses.backends import kernels_of

    found: list[Row] = []
    for name, loss in losses_in_parts().items():
        for size in sizes:
            for cut, share in CUTS.items():
                run = step(loss, rows, size, rank, world, share)
                with keeping(kernels_of(name, "parallel"), "InParts") as kept, Traffic() as traffic:
                    run()
                row = {"loss": loss.title, "ranks": world, "vocabulary": size, "teacher": cut}
                found.append({**row, "bytes_a_chunk": traffic.total / rows, "by_formula": 4.0 * kept[-1].exchanged})
    return found


def traffic_of_sequences(rank: int, world: int, rows: int, sizes: list[int]) -> list[Row]:
    """What a rank gives for a chunk that several have a row of: the last rank begins later in the student's sequence
    than in the teacher's."""
    from xtoken.losses.backends import kernels_of
    from xtoken.parallel import call

    found: list[Row] = []
    for name, loss in losses_in_parts().items():
        for size in sizes:
            logits, given, options = case_of(loss, rows, size)
            parts = []
            for k, one in enumerate(logits):
                cuts = [(rows + 1) * (end + 1) // world for end in range(world - 1)]
                cuts[-1] -= k * (rows // (2 * world))
                parts.append(one[:, slice(*[0, *cuts, rows + 1][rank : rank + 2])].contiguous())
            formula = kernels_of(name, "parallel")
            with keeping(formula, "InParts") as kept, keeping(call, "share") as shares, Traffic() as traffic:
                loss.function()(
                    parts[0].requires_grad_(), parts[1], *given, **options, cp_group=dist.group.WORLD
                ).backward()
            split = shares[-1].split
            found.append({
                "loss": loss.title, "ranks": world, "vocabulary": size, "chunks_on_several": len(split),
                "bytes": traffic.total, "by_formula": 8 + 4 * kept[-1].across(split),
            })  # fmt: skip
    return found


def training_traffic(rank: int, world: int) -> list[Row]:
    """What data parallelism moves for the student's gradients, and under FSDP2 for its weights too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64 * world, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip

    ids, found = torch.arange(8)[None], []
    for wrap in ("DDP", "FSDP2"):
        whole = model()
        weights = 4 * sum(weight.numel() for weight in whole.parameters())
        in_layers = 4 * sum(weight.numel() for layer in whole.model.layers for weight in layer.parameters())
        by_formula: dict[str, int] = {"allreduce": weights}
        if wrap == "FSDP2":
            mesh = init_device_mesh("cpu", (world,))
            for layer in whole.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped: Any = fully_shard(whole, mesh=mesh)
            # The last layer's weights stay for backward only if it is told so; all layers are gathered twice.
            by_formula = {"_allgather_base": weights + in_layers, "_reduce_scatter_base": weights}
        else:
            wrapped = DistributedDataParallel(whole)
        with Traffic() as traffic:
            wrapped(input_ids=ids, labels=ids).loss.backward()
        for name, size in by_formula.items():
            found.append({
                "training": wrap, "ranks": world, "collective": name.strip("_"),
                "bytes": traffic.bytes[name.strip("_")], "by_formula": size,
            })  # fmt: skip
    return found


def time_of_losses(rank: int, world: int, rows: list[int], sizes: list[int], repeat: int) -> list[Row]:
    """Processor seconds of a rank."""
    from xtoken.losses.loss import Needs

    found = []
    for loss in losses_in_parts().values():
        is_same = loss.needs is Needs.SAME_TOKENIZER
        for size, count, tokens in itertools.product(sizes, rows, (1,) if is_same else (1, 4)):
            run = step(loss, count, size, rank, world, 0.5 if world > 1 else None, tokens)
            run()
            seconds = []
            for _ in range(repeat):
                started = time.process_time()
                run()
                seconds.append(time.process_time() - started)
            best = min(seconds)
            row = {
                "loss": loss.title,
                "ranks": world,
                "rows": count,
                "chunks": count // tokens,
                "vocabulary": size,
                "milliseconds": best * 1e3,
            }
            found.append({**row, "nanoseconds_a_logit": best * 1e9 / (count * size)})
    return found


def on_processes(world: int, function: Callable[[int], list[Row]]) -> list[Row]:
    """The rows of the first of so many processes."""
    sys.path.insert(0, str(ROOT / "tests" / "parallel"))
    from processes import on_ranks

    with tempfile.TemporaryDirectory() as folder:
        rows: list[Row] = on_ranks(world, function, Path(folder))[0]
    return rows


# ---- the plan

STUDENT = {"parameters": 8.0e9, "layers": 36, "hidden": 4096, "vocabulary": 128_256}
TEACHER = {"parameters": 70.0e9, "layers": 80, "hidden": 8192, "vocabulary": 151_936}
PAIR = "llama3/qwen3"
TOKENS = 8192
"""Of a micro-batch of one device group."""

FLOPS = 400e12
"""A second that a device is assumed to reach, of the 990e12 that an H200 has in bfloat16."""

LINK, NETWORK = 450e9, 50e9
"""Bytes a second and direction that are assumed within a node of 8, and between nodes."""

LOSS_SECONDS = 6.23e-3 / 4096
"""Of a row, forward and backward, by a projection, bfloat16, Llama 3 and Qwen3: once on an H200, with Python around it;
the kernels alone take less now (docs/speed.md)."""

PLAIN = 10
"""Times as long as kernels the plain formula takes there, which is what computes logits in parts."""


def plan(world: int, tp: int, teacher: str = "whole", numbers: float = 0.0) -> Row:
    """Memory, traffic and time a device of a step with one micro-batch of `TOKENS` for each group of `tp` devices:
    teacher and student are tensor-parallel within it, and sharded by FSDP2 over all groups.

    `teacher`: whether its logits are brought together in the group before the loss; `numbers` are what a rank then
    sends for a chunk. Every token is taken as a chunk, and a ring as moving 2 (tp - 1) / tp of what is summed.
    """
    data, share, kept = world // tp, 1 - tp / world, 1 - 1 / tp
    of_student, of_teacher = STUDENT["parameters"] / tp, TEACHER["parameters"] / tp
    logits = [2 * TOKENS * side["vocabulary"] for side in (STUDENT, TEACHER)]
    # In bfloat16: weights of the student twice, and its gradients, and weights of the teacher once.
    weights = 2 * share * (3 * of_student + of_teacher)
    # Two sums a layer in forward, and two more in the student's backward.
    layers = 4 * STUDENT["layers"] * STUDENT["hidden"] + 2 * TEACHER["layers"] * TEACHER["hidden"]
    sums = 2 * kept * 2 * TOKENS * layers
    gathered = kept * logits[1] if teacher == "whole" else 0.0
    reduced = 4 * TOKENS * numbers
    compute = (6 * STUDENT["parameters"] + 2 * TEACHER["parameters"]) * TOKENS / tp / FLOPS
    loss = TOKENS * LOSS_SECONDS * (PLAIN if tp > 1 else 1) / tp
    return {
        "devices": world,
        "tp": tp,
        "teacher's logits": teacher,
        "groups": data,
        "student, GB": 16 * STUDENT["parameters"] / world / 1e9,
        "teacher, GB": 2 * TEACHER["parameters"] / world / 1e9,
        "logits, GB": (logits[0] / tp + logits[1] / (1 if teacher == "whole" else tp)) / 1e9,
        "weights moved, GB": weights / 1e9,
        "activations moved, GB": sums / 1e9,
        "moved for the loss, GB": (gathered + reduced) / 1e9,
        "compute, s": compute,
        "weights, s": weights / NETWORK,
        "activations, s": sums / LINK,
        "loss, s": loss,
        "traffic of the loss, s": (gathered + reduced) / LINK,
        "share of the loss, %": 100 * (loss + (gathered + reduced) / LINK) / (loss + compute),
    }


def plans(rows: list[Row]) -> list[Row]:
    """Plans of 64 and 512 devices, with what a loss by a projection sends on 8, of Llama 3's and Qwen3's columns, by
    the rows of `bench_scale.sent`."""
    from xtoken.losses.loss import Needs

    title = next(loss.title for loss in losses_in_parts().values() if loss.needs is Needs.PROJECTION)
    sent = {
        row["teacher"]: row["numbers_a_chunk"]
        for row in rows
        if (row["pair"], row["loss"], row["ranks"]) == (PAIR, title, 8)
    }
    return [one for world in (64, 512) for one in (plan(world, 1), *(plan(world, 8, *way) for way in sent.items()))]


def crossover(share: float) -> float:
    """How many parameters a student has with a teacher as large, where the loss takes this share of their time."""
    return LOSS_SECONDS * FLOPS * (1 - share) / share / 8
