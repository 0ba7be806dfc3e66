"""DTensors as the parts that they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Replicate, Shard

from xtoken.losses.logits import AnyLogits, LinearLogits


def local_part(logits: AnyLogits, name: str, tp_group: Any) -> tuple[AnyLogits, Any, bool | None]:
    """The logits of this rank, the group over which their columns are sharded, and whether they are.

    None for both where the logits do not say it, since they are no DTensors. Sharded samples are this rank's own ones.
    Raises ValueError for placements that no loss can take.
    """
    if isinstance(logits, LinearLogits):
        return _local_layer(logits, name, tp_group)
    if not isinstance(logits, DTensor):
        return logits, None, None
    last = logits.dim() - 1
    group, is_sharded = _group(logits, last, name)
    return logits.to_local(), group, is_sharded


def _local_layer(logits: LinearLogits, name: str, tp_group: Any) -> tuple[AnyLogits, Any, bool | None]:
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    if not isinstance(weight, DTensor):
        if isinstance(hidden, DTensor):
            raise ValueError(f"{name}: expected an output layer that is a DTensor too, as the hidden states are")
        return logits, None, None
    group, is_sharded = _group(weight, 0, f"{name}: weight")
    if is_sharded and not isinstance(hidden, DTensor) and tp_group is None:
        raise ValueError(
            f"{name}: expected tp_group, or hidden states that are a DTensor too, with a sharded output layer: "
            "that of FSDP has the same columns for other samples, and has to be whole (unshard() or full_tensor())"
        )
    if isinstance(hidden, DTensor):
        if hidden.device_mesh != weight.device_mesh:
            raise ValueError(f"{name}: expected hidden states on the mesh of the output layer")
        of_hidden = _group(hidden, hidden.dim() - 1, f"{name}: hidden")
        if of_hidden[1]:
            raise ValueError(f"{name}: expected whole hidden states, got their last dimension sharded")
        hidden = hidden.to_local()
    local = replace(
        logits, hidden=hidden, weight=weight.to_local(), bias=bias.to_local() if isinstance(bias, DTensor) else bias
    )
    return local, group, is_sharded


def _group(tensor: Any, dimension: int, name: str) -> tuple[Any, bool]:
    """The group of the mesh over which a dimension is sharded, or if it is not any of it, and whether it is."""
    group, is_sharded = None, False
    for k, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard) and placement.dim % tensor.dim() == dimension:
            if is_sharded:
                raise ValueError(f"{name}: expected columns sharded over one dimension of the mesh, got two")
            group, is_sharded = tensor.device_mesh.get_group(k), True
        elif isinstance(placement, Shard) and placement.dim % tensor.dim() == 0 and tensor.dim() == 3:
            continue
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"{name}: expected columns sharded (Shard({dimension})) or whole (Replicate()), got {placement}"
                + ("; positions go with cp_group" if isinstance(placement, Shard) else "")
            )
    if group is None and tensor.device_mesh.ndim == 1:
        group = tensor.device_mesh.get_group(0)
    return group, is_sharded
