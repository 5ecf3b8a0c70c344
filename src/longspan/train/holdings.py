"""What each rank of a run holds, told by the rank itself: its place on every axis, its layers, its parameters."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from longspan.layout.mesh import AXES
from longspan.train.loop import Trainer


def holdings(trainer: Trainer) -> list[dict[str, Any]]:
    """A dict for each rank, by rank: its coordinates by axis, ``layers`` in words, ``parameters`` (elements that it
    keeps between steps). Collective."""
    model, mesh = trainer.model, trainer.mesh
    layers = [int(name) for name, _ in model.blocks.named_children()]
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    mine = {
        **{axis: getattr(mesh, axis).rank for axis in AXES},
        "layers": in_words(layers, model.config.num_layers),
        "parameters": sum(p.numel() for p in locals_),
    }
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return of_all


def in_words(layers: list[int], num_layers: int) -> str:
    """Layer numbers as runs: "0–3, 8–11"; "all 12" for all of them."""
    if len(layers) == num_layers:
        return f"all {num_layers}"
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
