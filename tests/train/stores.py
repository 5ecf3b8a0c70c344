"""Checkpoint stores of a toy model for the tests, and what they must hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longspan.train.checkpoint import CheckpointStore
from tests.train.toy import build, train_step

Flat = dict[str, torch.Tensor]


def flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> Flat:
    """Full tensors of parameters and optimiser state, by parameter name (an oracle that does not use torch's names)."""
    flat: Flat = {}
    for name, parameter in model.named_parameters():
        tensors = {"": parameter.detach(), **{f".{k}": v for k, v in optimizer.state[parameter].items()}}
        for key, value in tensors.items():
            flat[name + key] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return flat


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    return [train_step(model, optimizer, step) for step in range(first, last)]


def assert_same(a: Flat, b: Flat) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) and value.dtype == b[name].dtype, name


def saved(directory: Path, steps: list[int], keep: int = 9) -> tuple[CheckpointStore, dict[int, Flat]]:
    """A store of one process with these steps, and what each holds."""
    store, states = CheckpointStore(directory, keep), {}
    model, optimizer = build(shard=False, world_size=1)
    for step in steps:
        train(model, optimizer, step, step + 1)
        states[step] = flatten(model, optimizer)
        store.save_async(step, model, optimizer, {"step": step, "position": 17 * step})
        assert store.wait()
    return store, states


def tensor_file(store: CheckpointStore, step: int) -> Path:
    return max(store.path(step).glob("*.distcp"), key=lambda path: path.stat().st_size)
