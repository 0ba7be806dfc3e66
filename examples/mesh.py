"""Distillation on a mesh of devices, in the style of torchtitan: DTensors, FSDP2, tensor parallelism, one mesh.

Student and teacher are tensor-parallel over the dimension "tp", and so are their logits: DTensors whose columns are
shared out, which the loss takes as they are. No rank ever has a whole row. The student's weights are sharded over "dp".

    torchrun --nproc-per-node 4 examples/mesh.py --tp 2 [--steps 20] [--device cuda]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from small_pair import TEXTS, Pair, Transformer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import xtoken

LAYER = {
    **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
    "attention.wo": RowwiseParallel(),
    "w1": ColwiseParallel(),
    "w2": RowwiseParallel(),
}


def parallel(model: Transformer, tp: DeviceMesh) -> Transformer:
    """The model with its layers and logits shared out."""
    for layer in model.layers:
        parallelize_module(layer, tp, LAYER)
    ends: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(use_local_output=False),  # a DTensor: its columns stay where they are
    }
    parallelize_module(model, tp, ends)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("Start it with torchrun: torchrun --nproc-per-node 4 examples/mesh.py --tp 2")

    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    world = dist.get_world_size()
    mesh = init_device_mesh(options.device, (world // options.tp, options.tp), mesh_dim_names=("dp", "tp"))
    dp = mesh["dp"]

    pair = Pair()
    student = parallel(Transformer(pair.sizes[0], width=32), mesh["tp"]).to(options.device)
    teacher = parallel(Transformer(pair.sizes[1], width=64, seed=1), mesh["tp"]).to(options.device).eval()
    for layer in student.layers:
        fully_shard(layer, mesh=dp)
    fully_shard(student, mesh=dp)
    criterion = xtoken.XTokenLoss([xtoken.Teacher(pair.W, top_k=None)])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

    for step in range(options.steps):
        batch = pair.batch(TEXTS[dp.get_local_rank() :: dp.size()])  # each group of tp ranks reads the same texts
        # What to divide by is counted over all groups; FSDP averages gradients, hence the factor of the loss.
        items, chunks = criterion.counts(batch.labels, batch.alignment)
        counts = torch.tensor([items, *chunks], device=options.device)
        dist.all_reduce(counts, group=dp.get_group())
        with torch.no_grad():
            wanted = teacher(batch.teacher_ids.to(options.device))
        logits = student(batch.student_ids.to(options.device))
        total, parts = criterion(logits, batch.labels, wanted, batch.alignment, counts[0], counts[1])
        (total * dp.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = torch.stack([parts["ce"], parts["kd"]])
        dist.all_reduce(shown, group=dp.get_group())
        if dist.get_rank() == 0:
            print(f"step {step}: cross-entropy {shown[0]:.3f}, distillation {shown[1]:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
