"""Distillation over process groups, in the style of Megatron: a vocabulary-parallel output layer, and positions of a
sequence on several ranks in zigzag order.

Weights and activations are plain tensors of this rank's part; collectives are called by hand. The loss gets hidden
states and the rank's rows of the output layer, `tp_group` and `cp_group`; logits of a micro-batch never exist whole.

    torchrun --nproc-per-node 4 examples/groups.py --tp 2 --cp 2 [--steps 20]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from small_pair import TEXTS, Pair, Transformer
from torch import Tensor, nn

import xtoken


def make_groups(tp: int, cp: int) -> tuple[Any, Any, Any]:
    """The groups of this rank: neighbours are tensor-parallel, then context-parallel, then data-parallel."""
    ranks = torch.arange(dist.get_world_size()).view(-1, cp, tp)
    found: list[Any] = []
    for ordered in (ranks.flatten(0, 1), ranks.transpose(1, 2).flatten(0, 1), ranks.flatten(1).T):
        for members in ordered.tolist():
            group = dist.new_group(members)
            if dist.get_rank() in members:
                found.append(group)
    return found[0], found[1], found[2]


def zigzag(ids: Tensor, group: Any) -> Tensor:
    """Of 2 n equal parts of the positions the parts r and 2 n - 1 - r."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = ids.chunk(2 * size, 1)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]], 1)


class VocabularyParallel(nn.Module):
    """This rank's rows of an output layer; the hidden states that it is given are those of all ranks."""

    def __init__(self, weight: Tensor, group: Any) -> None:
        super().__init__()
        own = weight.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
        self.weight = nn.Parameter(own.detach().clone())


class Model(nn.Module):
    """Embedding and feed-forward layers, which need no other position, and a vocabulary-parallel output layer.

    Attention under context parallelism is the model's own affair: a ring of keys and values."""

    def __init__(self, vocabulary: int, width: int, seed: int, tp_group: Any) -> None:
        super().__init__()
        whole = Transformer(vocabulary, width, seed=seed)
        self.embedding, self.norm = whole.embedding, whole.norm
        self.layers = nn.ModuleList(nn.Sequential(one.mlp_norm, one.w1, nn.SiLU(), one.w2) for one in whole.layers)
        self.output = VocabularyParallel(whole.output.weight, tp_group)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states."""
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.norm(x)
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("Start it with torchrun: torchrun --nproc-per-node 4 examples/groups.py --tp 2 --cp 2")

    dist.init_process_group("gloo")
    tp_group, cp_group, dp_group = make_groups(options.tp, options.cp)
    pair = Pair()
    student = Model(pair.sizes[0], 32, 0, tp_group)
    teacher = Model(pair.sizes[1], 64, 1, tp_group)
    criterion = xtoken.XTokenLoss(
        [xtoken.Teacher(pair.W, top_k=None)], tp_group=tp_group, cp_group=cp_group, cp_layout="zigzag"
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    replicas, replica = dist.get_world_size(dp_group), dist.get_rank(dp_group)

    for step in range(options.steps):
        batch = pair.batch(TEXTS[replica::replicas])  # the whole sequences; each rank computes its positions
        items, chunks = criterion.counts(batch.labels, batch.alignment)
        counts = torch.tensor([items, *chunks])
        dist.all_reduce(counts, group=dp_group)
        with torch.no_grad():
            wanted = xtoken.LinearLogits(teacher(zigzag(batch.teacher_ids, cp_group)), teacher.output.weight)
        logits = xtoken.LinearLogits(student(zigzag(batch.student_ids, cp_group)), student.output.weight)
        total, parts = criterion(logits, batch.labels, wanted, batch.alignment, counts[0], counts[1])
        total.backward()
        # Each rank has the gradient of its own positions and texts, which add up; of its rows of the output layer only
        # itself. Tensor-parallel ranks have the same gradients of everything else.
        for weight in student.parameters():
            for group in (cp_group, dp_group):
                dist.all_reduce(weight.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()
        shown = torch.stack([parts["ce"], parts["kd"]])
        dist.all_reduce(shown, group=dp_group)
        if dist.get_rank() == 0:
            print(f"step {step}: cross-entropy {shown[0]:.3f}, distillation {shown[1]:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
