"""The state of a model and its optimiser as one flat dict of named tensors, the form in which checkpoints hold it.

Names are `model/<parameter or buffer>` and `optimizer/<parameter>/<entry>`; the tensors alias the live ones, and are
DTensors where the parameters are sharded, so that torch distributed checkpoint can move them between shardings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from longspan.model.lora import is_adapter
from longspan.train.manifest import CheckpointError


class Writer(FileSystemWriter):
    """torch's writer, whose zip code turns a failed write into a RuntimeError about positions: the OSError behind it
    is raised instead, before the error travels to other ranks (pickling drops an exception's context)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            behind = error.__cause__ or error.__context__
            while behind is not None and not isinstance(behind, OSError):
                behind = behind.__cause__ or behind.__context__
            raise (behind or error) from None


def model_state(model: nn.Module) -> dict[str, Any]:
    """Of a model with adapters these alone: the rest is as in the checkpoint that the run began with."""
    state = get_model_state_dict(model)
    adapters = {name: value for name, value in state.items() if is_adapter(name)}
    return {f"model/{name}": value for name, value in (adapters or state).items()}


def set_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    given = {key.split("/", 1)[1]: value for key, value in state.items() if key.startswith("model/")}
    adapted = any(map(is_adapter, given))
    set_model_state_dict(model, given, options=StateDictOptions(strict=not adapted))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    return {f"optimizer/{name}/{key}": value for name, part in state.items() for key, value in part.items()}


def parameter_of(key: str) -> str:
    return key.split("/", 1)[1].rsplit("/", 1)[0]


def set_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], absent: set[str]) -> None:
    full: Any = get_optimizer_state_dict(model, optimizer)
    for key, value in state.items():
        if key.startswith("optimizer/"):
            full["state"][parameter_of(key)][key.rsplit("/", 1)[1]] = value
    set_optimizer_state_dict(model, optimizer, full)
    for name, parameter in model.named_parameters():
        if name in absent:
            optimizer.state.pop(parameter, None)


def check_same_architecture(path: Path, stored: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose tensors are not those of the model."""
    different = []
    for key in sorted(stored.keys() | state.keys()):
        name = key.split("/", 1)[1]
        if key not in state:
            different.append(f"{name} is in the checkpoint and not in the model")
        elif key not in stored:
            different.append(f"{name} is in the model and not in the checkpoint")
        elif isinstance(there := stored[key], TensorStorageMetadata) and isinstance(here := state[key], torch.Tensor):
            for what, a, b in (
                ("shape", tuple(there.size), tuple(here.shape)),
                ("dtype", there.properties.dtype, here.dtype),
            ):
                if a != b:
                    different.append(f"{name} has {what} {a} in the checkpoint and {b} in the model")
    if different:
        raise CheckpointError(
            f"checkpoint {path.name} is of another architecture: {different[0]} ({len(different)} differences); "
            "build the model from the checkpoint's own config, or start without --resume"
        )
