"""The state of a model and its optimiser as one flat dict of named tensors, the form in which checkpoints hold it.

Names are `model/<parameter or buffer>` and `optimizer/<parameter>/<entry>`; the tensors alias the live ones, and are
DTensors where the parameters are sharded, so that torch distributed checkpoint can move them between shardings. Under
tensor parallelism a rank's parameter is a box of the whole one, and stands as a `Held` in what is saved and loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from longspan.layout.weights import Box
from longspan.model.lora import is_adapter
from longspan.model.shards import local_part
from longspan.train.manifest import CheckpointError


class Held(torch.Tensor):
    """A part of a whole tensor, as torch distributed checkpoint asks a tensor for its parts. For its planners alone."""

    local: Tensor
    shape_of_whole: torch.Size
    place: ChunkStorageMetadata

    @staticmethod
    def of(tensor: Tensor, box: Box) -> Held:
        """`tensor`, a DTensor or plain, that stands in a whole one at `box`."""
        local, region = local_part(tensor, box)
        held = local.detach().as_subclass(Held)
        held.local, held.shape_of_whole = local.detach(), torch.Size(box.shape)
        held.place = ChunkStorageMetadata(torch.Size(r.start for r in region), local.shape)
        return held

    def size(self, dim: int | None = None) -> Any:
        return self.shape_of_whole if dim is None else self.shape_of_whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.place] if self.local.numel() else []

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        about = TensorWriteData(
            chunk=self.place, properties=TensorProperties.create_from_tensor(self.local), size=self.shape_of_whole
        )
        return [WriteItem(index=MetadataIndex(fqn, self.place.offsets), type=WriteItemType.SHARD, tensor_data=about)]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


def held(state: Mapping[str, Any], boxes: Mapping[str, Box]) -> dict[str, Any]:
    """A flat state in which tensors that are parts of whole ones say so; the others are as they were."""

    def part(key: str, value: Any) -> Any:
        box = boxes.get(name_of(key))
        return value if box is None or not isinstance(value, Tensor) or value.ndim == 0 else Held.of(value, box)

    return {key: part(key, value) for key, value in state.items()}


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
    """Inverse of `model_state`, of a flat state that may hold an optimiser's too."""
    given = {key.split("/", 1)[1]: value for key, value in state.items() if key.startswith("model/")}
    adapted = any(map(is_adapter, given))
    set_model_state_dict(model, given, options=StateDictOptions(strict=not adapted))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The tensors of every parameter's state; torch makes them where the optimiser has none yet."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    return {f"optimizer/{name}/{key}": value for name, part in state.items() for key, value in part.items()}


def parameter_of(key: str) -> str:
    """The parameter that a key of an optimiser's state is of."""
    return key.split("/", 1)[1].rsplit("/", 1)[0]


def name_of(key: str) -> str:
    """The parameter or buffer that a key of the flat state is of."""
    return parameter_of(key) if key.startswith("optimizer/") else key.split("/", 1)[1]


def set_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], absent: set[str]) -> None:
    """Inverse of `optimizer_state`, of a flat state that may hold a model's too; parameters in `absent` get none."""
    full: Any = get_optimizer_state_dict(model, optimizer)
    for key, value in state.items():
        if key.startswith("optimizer/"):
            full["state"][parameter_of(key)][key.rsplit("/", 1)[1]] = value
    set_optimizer_state_dict(model, optimizer, full)
    for name, parameter in model.named_parameters():
        if name in absent:
            optimizer.state.pop(parameter, None)


def described(state: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of a state, whole ones where it holds parts."""
    return {key: (tuple(value.size()), value.dtype) for key, value in state.items() if isinstance(value, Tensor)}


def check_same_architecture(
    path: Path, stored: Mapping[str, Any], model: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Refuses a checkpoint whose tensors are not those of the model, given as `described` of all ranks together."""
    different, dtypes = [], []
    for key in sorted(stored.keys() | model.keys()):
        name = key.split("/", 1)[1]
        if key not in model:
            different.append(f"{name} is in the checkpoint and not in the model")
        elif key not in stored:
            different.append(f"{name} is in the model and not in the checkpoint")
        elif isinstance(there := stored[key], TensorStorageMetadata):
            shape, dtype = model[key]
            if tuple(there.size) != shape:
                different.append(f"{name} has shape {tuple(there.size)} in the checkpoint and {shape} in the model")
            if there.properties.dtype != dtype:
                dtypes.append(f"{name} is {there.properties.dtype} in the checkpoint and {dtype} in the model")
    if different:
        raise CheckpointError(
            f"checkpoint {path.name} is of another architecture: {different[0]} ({len(different)} differences); "
            "build the model from the checkpoint's own config, or start without --resume"
        )
    if dtypes:
        raise CheckpointError(
            f"checkpoint {path.name} was trained in another precision: {dtypes[0]} ({len(dtypes)} differences); resume "
            "with its --plan.precision"
        )
